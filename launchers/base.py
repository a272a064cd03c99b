"""The contract between what composes runs and what starts them: `Launcher` and `Handle`."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from atlas.run.directory import Run


class Handle(abc.ABC):
    """A run that was submitted to a launcher."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @abc.abstractmethod
    def wait(self) -> int:
        """Block until the run has ended and return its exit code: 0 done, 75 resumable, else failed."""

    @abc.abstractmethod
    def cancel(self) -> None:
        """Ask the run to save and stop."""

    def describe(self) -> str:
        """Return where the run is and the commands to follow it, or "" if it has ended already."""
        return ""


class EndedHandle(Handle):
    """A run that has ended before its handle was returned."""

    def __init__(self, run: Run, code: int) -> None:
        super().__init__(run)
        self._code = code

    def wait(self) -> int:
        """Return the exit code."""
        return self._code

    def cancel(self) -> None:
        """Do nothing: the run has ended."""


class Launcher(abc.ABC):
    """Starts runs, each with `nodes` x `nproc_per_node` ranks and one GPU per rank."""

    name: str
    # Whether the runs are left to a queue, and nobody waits for their end.
    is_detached: bool = False
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
        """The number of ranks over all nodes."""
        return self.nodes * self.nproc_per_node

    @abc.abstractmethod
    def check(self) -> None:
        """Raise `ConfigError` for settings that cannot work here."""

    def preflight(self, configs: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027
        """Raise `ConfigError` for what would only fail after a wait in a queue.

        It is called before the runs of `configs` are created.
        """

    def is_active(self, run: Run) -> bool:
        """Return whether `run` has been started or queued and has not ended."""
        return run.lock.live_holder() is not None

    def script(self, run: Run, config: Mapping[str, Any]) -> str:
        """Return what `dry_run` shows of the submission, or "" if there is no script."""
        return ""

    @abc.abstractmethod
    def submit(self, runs: Sequence[Run]) -> list[Handle]:
        """Start or queue all `runs`, together if possible, and return their handles in order."""

    @abc.abstractmethod
    def _ranks_per_node(self, wanted: int | str) -> int:
        """Return the number that `cluster.nproc_per_node` means, which can be `auto`."""
