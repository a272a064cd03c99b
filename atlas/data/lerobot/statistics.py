"""What a model normalises by: a centre and a scale for each column."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("mean_std", "percentile")
PERCENTILES = (1.0, 99.0)
KEPT = 200_000  # rows that percentiles are taken of, evenly spread where there are more

Array = NDArray[Any]
Statistics = dict[str, list[float]]


def statistics(parts: Iterable[Array], rows: int, kind: str) -> Statistics:
    """Of arrays [*, D] put after each other, about `rows` in all.

    `mean` and `std` are what a model subtracts and divides by: with "mean_std" what they say, with
    "percentile" the middle between the 1st and the 99th percentile and half their distance, so
    that what lies between them comes to -1 to 1; these are given as `q01` and `q99`.
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
    return {"mean": mean.tolist(), "std": _not_too_small(std).tolist()}


def _percentiles(parts: Iterable[Array], rows: int) -> Statistics:
    every = -(-rows // KEPT)
    kept = np.concatenate([part[::every] for part in parts])
    low, high = np.percentile(kept.astype(np.float64), PERCENTILES, axis=0)
    return {
        "mean": ((low + high) / 2).tolist(),
        "std": _not_too_small((high - low) / 2).tolist(),
        "q01": low.tolist(),
        "q99": high.tolist(),
    }


def _not_too_small(scale: Array) -> Array:
    """A joint that (nearly) never moved is not blown up to the size of those that did."""
    floor = 1e-3 * float(scale.max()) or 1.0
    return np.maximum(scale, floor)
