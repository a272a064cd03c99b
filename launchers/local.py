"""This machine: one run at a time, in the person's own process where it has one rank."""

from __future__ import annotations

from collections.abc import Sequence

from atlas import worker
from atlas.errors import ConfigError
from atlas.run import Run
from launchers.base import Handle, Launcher, check_gpus
from launchers.devices import visible_gpus


class Ended(Handle):
    """A run that has ended by the time it is handed back."""

    def __init__(self, run: Run, code: int) -> None:
        super().__init__(run)
        self.code = code

    def wait(self) -> int:
        return self.code

    def cancel(self) -> None:
        """Nothing is left to cancel."""


class LocalLauncher(Launcher):
    """Runs in the foreground, one after the other."""

    name = "local"

    def check(self) -> None:
        if self.nodes != 1:
            raise ConfigError(
                f"cluster.nodes={self.nodes} and cluster=local is one machine; use cluster.nodes=1"
            )
        check_gpus(self.nproc_per_node, self.device)

    def submit(self, runs: Sequence[Run]) -> list[Handle]:
        # In this process, so that a debugger and Ctrl-C work as in any script.
        return [Ended(run, worker.main(run.path)) for run in runs]

    def _ranks_per_node(self, wanted: int | str) -> int:
        if wanted != "auto":
            return int(wanted)
        return max(1, len(visible_gpus())) if self.device != "cpu" else 1
