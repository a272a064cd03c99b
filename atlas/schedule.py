"""The learning rate of every module in every update, from the standard library alone.

A schedule is called as `schedule(step, total)` and returns the factor on the base rate in update number
`step`, counted from 0, of `total`. It keeps nothing between calls, so a resumed run restores no state of
it, and any step can be asked for in any order. `LearningRate` is the one rule that the dry run prints,
the optimizer applies and the journal records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

ScheduleFunction = Callable[[int, int], float]  # (step, total) -> factor on the base rate


def scaling(kind: str, effective_batch: int, base_batch_size: int) -> float:
    """Return the factor of `optim.scale_lr`: 1, r or the root of r, r = effective / base batch size.

    Linear: Goyal et al. 2017; square root: Krizhevsky 2014.
    """
    ratio = effective_batch / base_batch_size
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[kind]


@dataclass(frozen=True)
class LearningRate:
    """Base rate (`optim.lr` x `scaling`) x a module's multiplier x the schedule's factor."""

    base: float
    schedule: ScheduleFunction
    steps: int  # updates of the run

    def rates(self, step: int, multipliers: Mapping[str, float]) -> dict[str, float]:
        """Return the rate of each module in update `step`, by the names in `multipliers`."""
        factor = self.schedule(step, self.steps)
        return {name: self.base * multiplier * factor for name, multiplier in multipliers.items()}


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
