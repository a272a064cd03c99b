"""Samples that cannot be read or are not finite: told of by name, or skipped.

What takes a bad sample's place is a function of the seed and of the position in the stream, so that
a resumed run, or one that is cut over other ranks, takes the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from atlas.data.protocol import Describes
from atlas.errors import BadSampleError
from atlas.protocol import offers

log = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]
ATTEMPTS = 100  # replacements that are tried: if all are bad, it is not a matter of single samples


class Reader(Protocol):
    """What is needed of a `Fetcher`."""

    dataset: Any

    def fetch(self, ids: Ids, positions: Sequence[int] | Ids) -> Any: ...
    def one(self, index: int, position: int) -> Any: ...
    def replacement(self, position: int, attempt: int) -> int: ...


def skipping(
    reader: Reader, ids: Ids, positions: Sequence[int] | Ids, refill: bool
) -> tuple[Ids, Any]:
    """The batch of `ids` with every bad sample replaced (`refill`) or left out, and its ids."""
    try:
        batch = reader.fetch(ids, positions)
        if not_finite(batch) is None:
            return ids, batch
    except BadSampleError:
        pass
    kept = [
        (good, int(position))
        for index, position in zip(ids, positions)
        if (good := _good(reader, int(index), int(position), refill)) is not None
    ]
    read = np.array([index for index, _ in kept], np.int64)
    if not kept:
        return read, None
    return read, reader.fetch(read, [position for _, position in kept])


def tell(reader: Reader, ids: Ids, positions: Sequence[int] | Ids, error: Exception) -> None:
    """Raise `BadSampleError` from `error`, naming the first of `ids` that cannot be read."""
    for index, position in zip(ids, positions):
        try:
            reader.one(int(index), int(position))
        except Exception as alone:
            text = f"{name(reader.dataset, int(index))} cannot be read: {_words(alone)}"
            raise BadSampleError(text) from error


def first_not_finite(reader: Reader, ids: Sequence[int], start: int) -> str | None:
    """The first of `ids`, which stand from position `start` on, that is not finite, in words."""
    for index, position in zip(ids, range(start, start + len(ids))):
        if problem := _problem(reader, index, position):
            return f"{name(reader.dataset, index)} {problem}"
    return None


def not_finite(batch: Any, path: str = "") -> str | None:
    """The place in `batch` of the first tensor that is not finite."""
    for key, value in _parts(batch):
        inner = f"{path}.{key}" if path else str(key)
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                return inner
        elif found := not_finite(value, inner):
            return found
    return None


def name(dataset: Any, index: int) -> str:
    """A sample in words; a data set with `describe(id)` says where it was recorded."""
    text = f"sample {index} of {type(dataset).__name__}"
    try:
        return f"{text} ({dataset.describe(index)})" if offers(dataset, Describes) else text
    except Exception:  # it is about a bad sample: what it can say of it can be bad too
        return text


def _good(reader: Reader, index: int, position: int, refill: bool) -> int | None:
    """`index`, or what replaces it; None where it is left out."""
    problem = _problem(reader, index, position)
    if problem is None:
        return index
    log.warning("%s %s; it is skipped", name(reader.dataset, index), problem)
    if not refill:
        return None
    for attempt in range(ATTEMPTS):
        other = reader.replacement(position, attempt)
        if other != index and _problem(reader, other, position) is None:
            return other
    raise BadSampleError(
        f"data.on_bad=skip: {ATTEMPTS} samples drawn in place of {name(reader.dataset, index)} are "
        f"bad as well; it {problem}"
    )


def _problem(reader: Reader, index: int, position: int) -> str | None:
    try:
        place = not_finite(reader.one(index, position))
    except Exception as error:
        return f"cannot be read: {_words(error)}"
    return None if place is None else f"is not finite: {place}"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}"


def _parts(batch: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(batch, torch.Tensor):
        yield "tensor", batch
    elif isinstance(batch, Mapping):
        yield from batch.items()
    elif isinstance(batch, list | tuple):
        yield from enumerate(batch)
