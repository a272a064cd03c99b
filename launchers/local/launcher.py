"""This machine: one rank in the person's own process, many as processes forked from a warm one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from atlas import worker
from atlas.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, ConfigError
from atlas.record.shipping.shipper import open_pool_shipper
from atlas.run.directory import Run
from atlas.run.summary import summary
from atlas.system.devices import visible_gpus
from launchers.base import Handle, Launcher
from launchers.local.pool import Pool
from launchers.local.ranks import failure_text


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
    """Runs in the foreground: returns when all have ended.

    `runs_at_once` bounds how many runs of a sweep share the machine on the CPU (`auto`: as many as
    its cores have room for); on GPUs it is as many as there are GPUs for.
    """

    name = "local"

    def __init__(
        self,
        nodes: int = 1,
        nproc_per_node: int | str = "auto",
        device: str = "auto",
        runs_at_once: int | str = "auto",
        required_gpus: int | None = None,
        sharding: str | None = None,
    ) -> None:
        super().__init__(nodes, nproc_per_node, device, sharding)
        self._runs_at_once = runs_at_once
        self._required_gpus = required_gpus

    def check(self) -> None:
        if self.nodes != 1:
            raise ConfigError(
                f"cluster.nodes={self.nodes} and cluster=local is one machine; use cluster.nodes=1"
            )
        there = len(visible_gpus())
        if (
            self._required_gpus is not None
            and self.device != "cpu"
            and there != self._required_gpus
        ):
            raise ConfigError(
                f"this cluster is a machine with {self._required_gpus} GPUs and {there} are visible; "
                "use cluster=local to train on those, or look at CUDA_VISIBLE_DEVICES"
            )
        check_gpus(self.nproc_per_node, self.device)

    def submit(self, runs: Sequence[Run]) -> list[Handle]:
        if len(runs) == 1 and self.world_size == 1:
            # In this process, so that a debugger and Ctrl-C work as in any script.
            return [Ended(runs[0], worker.main(runs[0].path))]
        codes = self._pool(1).run(runs, self._tell) if len(runs) == 1 else self._run_many(runs)
        return [Ended(run, code) for run, code in zip(runs, codes, strict=True)]

    def _run_many(self, runs: Sequence[Run]) -> list[int]:
        """All `runs`, with one process that sends their journals to MLflow."""
        pool = self._pool(len(runs))
        shipper = open_pool_shipper(runs)
        shipper.start()
        codes = pool.run(runs, self._tell_short)
        if missing := shipper.finish():
            print(f"warning: {missing}", file=sys.stderr)
        return codes

    def _pool(self, runs: int) -> Pool:
        gpus = visible_gpus() if self.device != "cpu" else []
        cores = len(os.sched_getaffinity(0))
        places = self._runs_at_once
        if places == "auto":
            places = max(1, cores // self.world_size)
        places = min(int(places), runs)
        threads = max(1, cores // (self.world_size * places))
        return Pool(self.world_size, gpus, places, threads)

    def _ranks_per_node(self, wanted: int | str) -> int:
        if wanted != "auto":
            return int(wanted)
        return max(1, len(visible_gpus())) if self.device != "cpu" else 1

    @staticmethod
    def _tell(run: Run, code: int) -> None:
        """How the only run ended; its rank 0 has said so itself where it got that far."""
        if code == EXIT_INTERRUPTED:
            print(f"left at once; the same command goes on from the last checkpoint of {run.path}")
        elif code not in (EXIT_DONE, EXIT_STOPPED):
            print(failure_text(run), file=sys.stderr)

    @staticmethod
    def _tell_short(run: Run, code: int) -> None:
        """One line for a run among many."""
        print(summary(run).splitlines()[0], flush=True)


def check_gpus(wanted: int, device: str) -> None:
    """Raise `ConfigError` if this machine has fewer GPUs than `wanted` ranks on `device` need."""
    visible = len(visible_gpus())
    if device == "cuda" and visible == 0:
        raise ConfigError(
            "cluster.device=cuda and this machine shows no GPU (see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES); use cluster.device=cpu to train on the CPU"
        )
    if device != "cpu" and visible and wanted > visible:
        raise ConfigError(
            f"cluster.nproc_per_node={wanted} asks for more GPUs than the {visible} that are "
            f"visible; use cluster.nproc_per_node={visible}, or cluster.device=cpu for processes on "
            "the CPU"
        )
