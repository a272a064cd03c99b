"""How ranks agree to stop or to save at the same step without waiting for each other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from atlas.training.ranks.world import World


class Requests(NamedTuple):
    """What a rank wants: `stop` is a `Stop.code`, `save` 1 where a checkpoint is due by the clock,
    `time_up` 1 where `trainer.max_time` is over."""

    stop: int = 0
    save: int = 0
    time_up: int = 0

    @property
    def end(self) -> bool:
        """Whether the run is to be left."""
        return bool(self.stop or self.time_up)

    def and_also(self, other: Requests) -> Requests:
        """Both: the maximum of each."""
        return Requests(*map(max, self, other))


class Agreement:
    """The maximum of all ranks' requests, started while an update is finished and read after it.

    The reduction runs on a CPU group beside the update, so that nothing waits for it; alone, a rank
    agrees with itself at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._work: Any = None
        self._flags = torch.zeros(len(Requests._fields), dtype=torch.int64)
        self._alone = Requests()

    def start(self, mine: Requests) -> None:
        """Say what this rank wants; every rank has to read the answer before it starts again."""
        if self._world.size == 1:
            self._alone = mine
            return
        self._flags = torch.tensor(mine, dtype=torch.int64)
        self._work = dist.all_reduce(
            self._flags, op=dist.ReduceOp.MAX, group=self._world.cpu_group, async_op=True
        )

    def read(self) -> Requests:
        """What the ranks want; nothing where they were not asked since this was last read."""
        if self._world.size == 1:
            mine, self._alone = self._alone, Requests()
            return mine
        if self._work is None:
            return Requests()
        self._work.wait()
        self._work = None
        return Requests(*self._flags.tolist())
