"""Which rank this process is, on which device, and what the ranks say to each other."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from atlas.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among the others; handed on to whoever needs to know."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    cpu_group: Any = None  # gloo, for what must not wait for the GPU

    @property
    def is_main(self) -> bool:
        """Rank 0 alone writes, tracks and shows."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def count(self, mine: int) -> int:
        """The sum of a number that each rank has on its CPU."""
        if self.size == 1:
            return mine
        total = torch.tensor(mine)
        dist.all_reduce(total, group=self.cpu_group)
        return int(total)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier(group=self.cpu_group)

    def from_main(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        return self.broadcast(value, source=0)

    def broadcast(self, value: Any, source: int) -> Any:
        """The `value` of rank `source`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.cpu_group)
        return box[0]


def is_cut(value: Any) -> bool:
    """Whether a tensor is spread over the ranks (a DTensor, whose import takes a second)."""
    return hasattr(value, "full_tensor")


def local(value: Any) -> torch.Tensor:
    """This rank's part of a tensor that is cut, in the same memory; any other as it is."""
    return value.to_local() if is_cut(value) else value


def init(device: str) -> World:
    """Join the other ranks as the environment says; `device` is auto, cuda or cpu."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    where = choose_device(device, local_rank)
    if where.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(int(os.environ.get("ATLAS_THREADS", 0)) or spare_core(size))
    group = None
    if size > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        timeout = datetime.timedelta(minutes=30)
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
        group = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None
    return World(rank, local_rank, size, where, group)


def spare_core(world_size: int) -> int:
    """Threads for a rank on the CPU: all cores but one, shared by the ranks.

    A core is left to the shipper and the data: threads that wait for each other on a core that is
    taken are many times slower than one thread fewer.
    """
    return max(1, (len(os.sched_getaffinity(0)) - 1) // world_size)


def choose_device(device: str, local_rank: int) -> torch.device:
    """The device of `local_rank`; CUDA that was asked for and is not there is an error."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "cluster.device=cuda and torch finds no GPU here; check the driver and that torch is a "
            "CUDA build, or use cluster.device=cpu"
        )
    # Launchers that narrow CUDA_VISIBLE_DEVICES to one GPU a rank call that GPU cuda:0.
    index = local_rank if torch.cuda.device_count() > 1 else 0
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def shared_store(timeout: datetime.timedelta) -> Any:
    """The key-value store at MASTER_ADDR:MASTER_PORT that every rank reaches."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return store


def finish() -> None:
    """Leave the group of ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
