"""How ranks agree to stop or to save at the same step without waiting for each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from atlas.training.distributed import World


class Requests(NamedTuple):
    """What a rank wants: `stop` is a `Stop.code`, `save` 1 where a checkpoint is due by the clock,
    `time_up` 1 where `trainer.max_time` is over."""

    stop: int = 0
    save: int = 0
    time_up: int = 0


class Agreement:
    """The maximum of all ranks' requests, started in one step and read in the next.

    The reduction runs on a CPU group beside the step, so that nothing waits for it; alone, a rank
    agrees with itself at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._work: Any = None
        self._flags = torch.zeros(len(Requests._fields), dtype=torch.int64)

    def exchange(self, mine: Requests) -> Requests:
        """Put `mine` in, and get what the ranks put in a step ago."""
        if self._world.size == 1:
            return mine
        agreed = self._read()
        self._flags = torch.tensor(mine, dtype=torch.int64)
        self._work = dist.all_reduce(
            self._flags, op=dist.ReduceOp.MAX, group=self._world.cpu_group, async_op=True
        )
        return agreed

    def close(self) -> None:
        """Let the last exchange end, so that no rank is left in it."""
        self._read()

    def _read(self) -> Requests:
        if self._work is None:
            return Requests()
        self._work.wait()
        self._work = None
        return Requests(*self._flags.tolist())
