"""Learning-rate schedules: pure functions of the step, standard library only.

A schedule is called as `schedule(step, total)` and returns the factor that the base rate is
multiplied by in update number `step`, counted from 0, of `total`. It keeps nothing between calls,
so a resumed run needs no state of it and every step can be asked for in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup` updates, then whatever the subclass says.

    `floor` is the fraction of the base rate at which the decay ends (0 to 1).
    """

    warmup: int = 0
    floor: float = 0.0

    def __call__(self, step: int, total: int) -> float:
        if step < self.warmup:
            return step / self.warmup
        # A run whose last update is the last of the warm-up has nothing left to decay over.
        done = min(1.0, (step - self.warmup) / max(1, total - self.warmup))
        return self.floor + (1.0 - self.floor) * self.decay(done)

    def decay(self, done: float) -> float:
        """From 1 at `done` = 0 to 0 at `done` = 1, the share of the updates after the warm-up."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cosine(Schedule):
    """`(1 + cos(pi * done)) / 2` after the warm-up (Loshchilov & Hutter 2017, one period)."""

    def decay(self, done: float) -> float:
        return (1.0 + math.cos(math.pi * done)) / 2.0


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line down to the floor after the warm-up."""

    def decay(self, done: float) -> float:
        return 1.0 - done


@dataclass(frozen=True)
class Constant(Schedule):
    """The full rate after the warm-up."""

    def decay(self, done: float) -> float:
        return 1.0
