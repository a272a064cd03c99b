"""Statistics that a model normalises by: a centre and a scale for each column."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from atlas.data.arrays import Array

KINDS = ("mean_std", "percentile")
PERCENTILES = (1.0, 99.0)
KEPT = 200_000  # rows that percentiles are computed from; of more, every n-th

Statistics = dict[str, list[float]]


def statistics(parts: Iterable[Array], rows: int, kind: str) -> Statistics:
    """Return the statistics of concatenated arrays [*, D] with about `rows` rows in total.

    A model subtracts `mean` and divides by `std`. With "mean_std" these are mean and standard
    deviation. With "percentile" they are the centre of the 1st and the 99th percentile and half
    their distance, so that values between the two are mapped to -1 to 1; the percentiles
    themselves are returned as `q01` and `q99`.
    """
    return _percentiles(parts, rows) if kind == "percentile" else _moments(parts)


def _moments(parts: Iterable[Array]) -> Statistics:
    count, total, square = 0, np.zeros(()), np.zeros(())
    for part in parts:
        part = part.astype(np.float64)
        count += len(part)
        total = total + part.sum(axis=0)
        square = square + (part**2).sum(axis=0)
    mean = total / max(count, 1)
    std = np.sqrt(np.maximum(square / max(count, 1) - mean**2, 0))
    return {"mean": mean.tolist(), "std": _limit(std).tolist()}


def _percentiles(parts: Iterable[Array], rows: int) -> Statistics:
    every = -(-rows // KEPT)
    kept = np.concatenate([part[::every] for part in parts])
    low, high = np.percentile(kept.astype(np.float64), PERCENTILES, axis=0)
    return {
        "mean": ((low + high) / 2).tolist(),
        "std": _limit((high - low) / 2).tolist(),
        "q01": low.tolist(),
        "q99": high.tolist(),
    }


def _limit(scale: Array) -> Array:
    # Otherwise the noise of a joint that hardly moved would be as large as another's motion.
    floor = 1e-3 * float(scale.max()) or 1.0
    return np.maximum(scale, floor)
