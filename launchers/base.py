"""The contract between what composes runs and what starts them."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from atlas.errors import ConfigError
from atlas.run.directory import Run
from atlas.system.devices import visible_gpus


class Handle(abc.ABC):
    """A run that was handed to a launcher."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @abc.abstractmethod
    def wait(self) -> int:
        """Block until the run has ended; the exit code (0 done, 75 resumable, else failed)."""

    @abc.abstractmethod
    def cancel(self) -> None:
        """Ask the run to save and stop."""

    def describe(self) -> str:
        """Where the run is, and the commands that follow it; empty where that is plain."""
        return ""


class Launcher(abc.ABC):
    """Starts runs; `nodes` x `nproc_per_node` ranks each, a GPU a rank."""

    name: str
    is_detached: bool = (
        False  # whether the runs are left to a queue, and nobody waits for their end
    )
    # Whether the runs are on other machines than this one, whose devices say nothing about theirs.
    is_remote: bool = False

    def __init__(
        self, nodes: int, nproc_per_node: int | str, device: str, sharding: str | None = None
    ) -> None:
        self.nodes = nodes
        self.device = device
        self.sharding = sharding
        self.nproc_per_node = self._ranks_per_node(nproc_per_node)

    @property
    def world_size(self) -> int:
        """Ranks in all, over all nodes."""
        return self.nodes * self.nproc_per_node

    @abc.abstractmethod
    def check(self) -> None:
        """Raise `ConfigError` for what this place cannot do."""

    def preflight(self, configs: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027
        """Raise `ConfigError` for what would fail after the wait, before anything is created."""

    def is_active(self, run: Run) -> bool:
        """Whether `run` has been started or queued already and has not ended."""
        return run.lock.live_holder() is not None

    def script(self, run: Run, config: Mapping[str, Any]) -> str:
        """What `dry_run` shows of the submission; empty where there is nothing to show."""
        return ""

    @abc.abstractmethod
    def submit(self, runs: Sequence[Run]) -> list[Handle]:
        """Start or queue all `runs`, in one go where the place allows it."""

    @abc.abstractmethod
    def _ranks_per_node(self, wanted: int | str) -> int:
        """What `cluster.nproc_per_node` comes to; `auto` is decided here."""


def check_gpus(wanted: int, device: str) -> None:
    """Raise `ConfigError` where `wanted` ranks on CUDA have fewer GPUs on this machine."""
    there = len(visible_gpus())
    if device == "cuda" and there == 0:
        raise ConfigError(
            "cluster.device=cuda and this machine shows no GPU (see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES); use cluster.device=cpu to train on the CPU"
        )
    if device != "cpu" and there and wanted > there:
        raise ConfigError(
            f"cluster.nproc_per_node={wanted} asks for more GPUs than the {there} that are visible; "
            f"use cluster.nproc_per_node={there}, or cluster.device=cpu for processes on the CPU"
        )
