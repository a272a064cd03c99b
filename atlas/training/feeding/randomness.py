"""Seeds as a function of where in the run they are used, so that no generator is ever restored."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """A 63-bit seed from `parts`, each finalised by SplitMix64 (Steele, Lea & Flood 2014)."""
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def sample_seeds(seed: int, positions: Sequence[int] | npt.NDArray[np.int64]) -> list[int]:
    """One seed per position in the sample stream, for augmentation."""
    return [mix(seed, 1, int(position)) for position in positions]


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


class StepSeeds:
    """Seeds torch's generators before each micro-batch; about a microsecond on the CPU."""

    def __init__(self, seed: int, rank: int, device: torch.device) -> None:
        self._seed = seed
        self._rank = rank
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            torch.cuda.init()
            self._generators.append(torch.cuda.default_generators[device.index or 0])

    def training(self, step: int, micro: int) -> None:
        """Before micro-batch `micro` of update `step`."""
        self._set(mix(self._seed, 2, step, micro, self._rank))

    def update(self, step: int) -> None:
        """Before the optimizer's part of update `step`, the same on every rank."""
        self._set(mix(self._seed, 5, step))

    def validation(self, chunk: int) -> None:
        """Before chunk `chunk` of a validation, the same in every validation."""
        self._set(mix(self._seed, 3, chunk))

    def _set(self, seed: int) -> None:
        for generator in self._generators:
            generator.manual_seed(seed)
