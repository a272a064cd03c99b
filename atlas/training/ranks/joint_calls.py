"""Calls of a model in an evaluation, where ranks can have different numbers of batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from atlas.training.ranks.world import World


class Calls:
    """Calls `call` with a batch; no rank needs another for it."""

    def __init__(self, call: Callable[[Any], Any]) -> None:
        self._call = call

    def __call__(self, batch: Any) -> Any:
        return self._call(batch)

    def skip(self) -> bool:
        """Without a batch where the other ranks may have one; whether one of them had."""
        return False


class SharedCalls(Calls):
    """Calls that all ranks make together, since each needs the weights that the others hold.

    Every rank has to call or to skip equally often. One that skips while another has a batch calls as
    well, with the last that it had, or a copy of the other's, and drops what comes of it.
    """

    def __init__(self, call: Callable[[Any], Any], world: World) -> None:
        super().__init__(call)
        self._world = world
        self._batch: Any = None

    def __call__(self, batch: Any) -> Any:
        self._batch = batch
        self._meet(has_batch=True)
        return self._call(batch)

    def skip(self) -> bool:
        called = self._meet(has_batch=False)
        if called:
            self._call(self._batch)
        return called

    def _meet(self, has_batch: bool) -> bool:
        """Whether a rank has a batch for this call; every rank has one to call with, then."""
        size, rank = self._world.size, self._world.rank
        said = torch.tensor([(size - rank) * has_batch, int(self._batch is None)])
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._world.cpu_group)
        first, lacking = said.tolist()
        if first and lacking:
            given = self._world.broadcast(self._batch, size - first)
            self._batch = given if self._batch is None else self._batch
        return bool(first)
