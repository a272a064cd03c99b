"""Calls of a model in an evaluation, where ranks can have different numbers of batches.

A sharded model cannot be called by one rank alone: to run a layer is to gather its weights, a collective
in which every rank takes part. In training all ranks have equally many batches. In a validation or a
rollout they may not, and a rank that stopped calling would leave the others waiting for ever. So before
each call the ranks agree whether any of them has a batch; if so, every rank calls, and a rank
without a batch calls with a copy of another one and drops the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from atlas.training.ranks.world import World


class Caller:
    """Calls a model with a batch, independently of the other ranks."""

    def __init__(self, call: Callable[[Any], Any]) -> None:
        self._call = call

    def __call__(self, batch: Any) -> Any:
        return self._call(batch)

    def skip(self) -> bool:
        """Take part in a call without a batch of one's own; return whether any rank had one."""
        return False


class JointCaller(Caller):
    """Calls a sharded model on all ranks together; each rank must call or skip equally often."""

    def __init__(self, call: Callable[[Any], Any], world: World) -> None:
        super().__init__(call)
        self._world = world
        self._batch: Any = None

    def __call__(self, batch: Any) -> Any:
        self._batch = batch
        self._agree(has_batch=True)
        return self._call(batch)

    def skip(self) -> bool:
        called = self._agree(has_batch=False)
        if called:
            self._call(self._batch)
        return called

    def _agree(self, has_batch: bool) -> bool:
        """Return whether any rank has a batch; afterwards every rank has one to call with."""
        size, rank = self._world.size, self._world.rank
        flags = torch.tensor([(size - rank) * has_batch, int(self._batch is None)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._world.cpu_group)
        first, any_without = flags.tolist()
        if first and any_without:
            given = self._world.broadcast(self._batch, size - first)
            self._batch = given if self._batch is None else self._batch
        return bool(first)
