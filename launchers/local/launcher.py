"""This machine: one rank in the user's own process, several as processes forked from a warm one."""

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
from launchers.base import EndedHandle, Handle, Launcher
from launchers.local.pool import Pool
from launchers.local.ranks import Ranks, failure_text, warm_context


class LocalLauncher(Launcher):
    """Runs in the foreground: `submit` returns when all runs have ended.

    `runs_at_once` bounds how many runs of a sweep share the CPU (`auto`: as many as there are cores
    for); on GPUs it is as many as there are GPUs for. With `required_gpus`
    another number of visible GPUs is an error.
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
        """Raise `ConfigError` for more than one node, or for GPUs that this machine does not have."""
        if self.nodes != 1:
            raise ConfigError(
                f"cluster.nodes={self.nodes} and cluster=local is one machine; use cluster.nodes=1"
            )
        visible = len(visible_gpus())
        if self._required_gpus not in (None, visible) and self.device != "cpu":
            raise ConfigError(
                f"cluster.required_gpus={self._required_gpus} and {visible} GPUs are visible; use "
                "cluster=local to train on those, or check CUDA_VISIBLE_DEVICES"
            )
        check_gpus(self.nproc_per_node, self.device)

    def submit(self, runs: Sequence[Run]) -> list[Handle]:
        """Run all of `runs` to their end."""
        if len(runs) == 1 and self.world_size == 1:
            # In this process, so that a debugger and Ctrl-C work as in any script.
            return [EndedHandle(runs[0], worker.main(runs[0].path))]
        codes = self._run_one(runs[0]) if len(runs) == 1 else self._run_many(runs)
        return [EndedHandle(run, code) for run, code in zip(runs, codes, strict=True)]

    def _run_one(self, run: Run) -> list[int]:
        return self._pool(1).run([run], on_end=_report_failure)

    def _run_many(self, runs: Sequence[Run]) -> list[int]:
        """Run `runs` with one process that sends all their journals to MLflow."""
        pool = self._pool(len(runs))
        shipper = open_pool_shipper(runs)
        shipper.start()
        codes = pool.run(runs, on_end=_report_in_one_line)
        if missing := shipper.finish():
            print(f"warning: {missing}", file=sys.stderr)
        return codes

    def _pool(self, runs: int) -> Pool:
        context = warm_context()
        size = self.world_size
        cores = len(os.sched_getaffinity(0))
        limit = max(1, cores // size) if self._runs_at_once == "auto" else int(self._runs_at_once)
        at_once = min(limit, runs)
        threads = max(1, cores // (size * at_once))

        def start(run: Run, gpus: Sequence[str] | None) -> Ranks:
            return Ranks.start(context, run, size, gpus, is_alone=runs == 1, threads=threads)

        return Pool(start, self._slots(at_once))

    def _slots(self, at_once: int) -> list[list[str] | None]:
        """Return the GPUs of each run that is started at the same time; None on the CPU."""
        gpus = visible_gpus() if self.device != "cpu" else []
        if not gpus:
            return [None] * at_once
        size = self.world_size
        return [gpus[first : first + size] for first in range(0, len(gpus) - size + 1, size)]

    def _ranks_per_node(self, wanted: int | str) -> int:
        if wanted != "auto":
            return int(wanted)
        return max(1, len(visible_gpus())) if self.device != "cpu" else 1


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


def _report_failure(run: Run, code: int) -> None:
    """Print why the only run failed; how it ended otherwise its rank 0 has printed itself."""
    if code == EXIT_INTERRUPTED:
        print(f"aborted; run the same command to resume from the last checkpoint in {run.path}")
    elif code not in (EXIT_DONE, EXIT_STOPPED):
        print(failure_text(run), file=sys.stderr)


def _report_in_one_line(run: Run, code: int) -> None:
    print(summary(run).splitlines()[0], flush=True)
