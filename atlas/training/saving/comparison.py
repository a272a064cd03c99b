"""Two runs that should be equal to the bit, and the first place where they are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from atlas.training.saving.checkpoint import Checkpoints


def first_difference(one: Path, other: Path) -> str | None:
    """Where the newest checkpoints in the folders `one` and `other` differ; None where nowhere.

    The weights come first, then the optimizer, the average and all else that a resume rests on.
    """
    states = [Checkpoints(folder).latest() for folder in (one, other)]
    if states[0] is None or states[1] is None:
        missing = one if states[0] is None else other
        return f"{missing} holds no checkpoint that can be read"
    return next(differences(states[0], states[1]), None)


def differences(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Every leaf in which `one` and `other` differ, by its path, such as `model.head.weight`."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if text := _tensors_differ(one, other):
            yield f"{name}: {text}"
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*one, *other]):
            path = f"{name}.{key}" if name else str(key)
            if key in one and key in other:
                yield from differences(one[key], other[key], path)
            else:
                yield f"{path}: only in the {'first' if key in one else 'second'}"
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield f"{name}: {len(one)} and {len(other)} entries"
        for index, pair in enumerate(zip(one, other)):
            yield from differences(*pair, f"{name}[{index}]")
    elif one != other and not (one != one and other != other):
        yield f"{name}: {one!r} and {other!r}"


def _tensors_differ(one: torch.Tensor, other: torch.Tensor) -> str | None:
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
    # As bytes: NaN equals itself there, and -0.0 does not equal 0.0.
    apart = (_bytes(one) != _bytes(other)).reshape(max(1, one.numel()), -1).any(dim=1)
    count = int(apart.sum())
    if not count:
        return None
    gap = (one.double() - other.double()).abs().max() if not one.is_complex() else torch.nan
    return f"{count} of {one.numel()} elements differ, the largest by {float(gap):.3g}"


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
