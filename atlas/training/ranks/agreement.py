"""How ranks agree to stop or to save at the same step without waiting for each other.

A signal reaches each rank at another moment, and a clock runs out at another moment on each. A rank that
stopped by itself would leave the others in the gradient's all-reduce of the next update, where they
would wait until a timeout of half an hour. So ranks stop only after an update that all have agreed on.

The agreement is a maximum over all ranks' requests. To wait for it would cost every step a round trip,
so it is started while an update is being finished and read after that update, on a CPU group beside the
update's own work: a request takes effect at most one update later. Every rank starts and reads equally
often, once an update and once a round of a validation. That is the whole protocol: as long as it holds,
all ranks read the same answer at the same place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from atlas.training.ranks.world import World


class Requests(NamedTuple):
    """What a rank asks for.

    `stop`: a `Stop.code`. `save`: 1 if a checkpoint is due by the clock. `time_up`: 1 if
    `trainer.max_time` is over.
    """

    stop: int = 0
    save: int = 0
    time_up: int = 0

    @property
    def end(self) -> bool:
        """Whether the run is to end."""
        return bool(self.stop or self.time_up)

    def merged(self, other: Requests) -> Requests:
        """Return both requests as one: the maximum of each field."""
        return Requests(*map(max, self, other))


class Agreement:
    """The maximum of all ranks' requests; a single rank agrees with itself at once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._work: Any = None
        self._flags = torch.zeros(len(Requests._fields), dtype=torch.int64)
        self._alone = Requests()

    def start(self, mine: Requests) -> None:
        """Start to exchange requests; every rank must `read` the answer before it starts again."""
        if self._world.size == 1:
            self._alone = mine
            return
        self._flags = torch.tensor(mine, dtype=torch.int64)
        self._work = dist.all_reduce(
            self._flags, op=dist.ReduceOp.MAX, group=self._world.cpu_group, async_op=True
        )

    def read(self) -> Requests:
        """Return what the ranks agreed on, and no request if none was started since the last read."""
        if self._world.size == 1:
            mine, self._alone = self._alone, Requests()
            return mine
        if self._work is None:
            return Requests()
        self._work.wait()
        self._work = None
        return Requests(*self._flags.tolist())
