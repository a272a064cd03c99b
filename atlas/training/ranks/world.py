"""Which rank this process is, on which device, and how the ranks exchange values."""

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
    """This process as one of the ranks: read from the environment once, and passed on."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    cpu_group: Any = None  # gloo, for values that must not wait for the GPU

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files, tracks and prints."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values` over all ranks, computed in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def count(self, mine: int) -> int:
        """Return the sum over all ranks of a number on the CPU."""
        if self.size == 1:
            return mine
        total = torch.tensor(mine)
        dist.all_reduce(total, group=self.cpu_group)
        return int(total)

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            dist.barrier(group=self.cpu_group)

    def from_main(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank."""
        return self.broadcast(value, source=0)

    def broadcast(self, value: Any, source: int) -> Any:
        """Return the `value` of rank `source` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.cpu_group)
        return box[0]


def is_sharded(value: Any) -> bool:
    """Return whether a tensor is a DTensor, told without its import, which takes a second."""
    return hasattr(value, "full_tensor")


def local_part(value: Any) -> torch.Tensor:
    """Return this rank's part of a sharded tensor, in the same memory; any other tensor itself."""
    return value.to_local() if is_sharded(value) else value


def join_ranks(device: str) -> World:
    """Join the process group that the environment describes; `device` is auto, cuda or cpu."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    where = choose_device(device, local_rank)
    if where.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(int(os.environ.get("ATLAS_THREADS", 0)) or threads_per_rank(size))
    group = None
    if size > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        timeout = datetime.timedelta(minutes=30)
        backend = "nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
        group = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None
    return World(rank, local_rank, size, where, group)


def threads_per_rank(world_size: int) -> int:
    """Return how many threads a rank on the CPU computes with: all cores but one, shared by the ranks.

    One core is left to the shipper and the data workers. Threads that wait for one another on a core
    that is taken make a step many times slower, and one thread fewer costs little.
    """
    return max(1, (len(os.sched_getaffinity(0)) - 1) // world_size)


def choose_device(device: str, local_rank: int) -> torch.device:
    """Return the device of `local_rank`; raise `ConfigError` if CUDA is asked for and missing."""
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
    """Return the key-value store at MASTER_ADDR:MASTER_PORT, which every rank can reach."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return store


def leave_ranks() -> None:
    """Leave the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
