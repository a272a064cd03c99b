"""Slurm: runs are put into its queue, and from there on take care of themselves."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atlas.errors import ConfigError
from atlas.run.directory import Run
from launchers.base import Handle, Launcher
from launchers.slurm import submission
from launchers.slurm.handle import SlurmHandle
from launchers.slurm.queue import QueuedJob, array_limit, queue, sbatch_verdict
from launchers.slurm.sbatch import BatchJob
from launchers.slurm.settings import SlurmSettings, problems


class SlurmLauncher(Launcher):
    """Queues every run as a job, several at once as a job array; keys as in conf/cluster/slurm.yaml."""

    name = "slurm"
    is_remote = True

    def __init__(
        self,
        nodes: int,
        nproc_per_node: int | str,
        device: str,
        sharding: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(nodes, nproc_per_node, device, sharding)
        self._values = settings
        self.is_detached = not settings.get("wait")
        self._jobs: dict[str, QueuedJob] | None = None

    @functools.cached_property
    def settings(self) -> SlurmSettings:
        """The typed settings; `check` them first."""
        return SlurmSettings.of(self._values)

    def check(self) -> None:
        """Raise `ConfigError` with everything that is wrong with the settings."""
        if found := problems(self._values):
            raise ConfigError(found)

    def preflight(self, configs: Sequence[Mapping[str, Any]]) -> None:
        """Raise an error for what would make a job fail after its wait, such as a wrong model."""
        if not shutil.which("sbatch"):
            raise ConfigError(
                "cluster=slurm needs sbatch, which is not installed on this machine; run the "
                "command on a login node of the cluster, or use cluster=local"
            )
        submission.refuse_queued([self._run_of(config) for config in configs])
        if self.settings.preflight == "full":
            from launchers.preflight import preflight

            for note in preflight(configs, self.world_size):
                print(f"not checked: {note}", flush=True)

    def is_active(self, run: Run) -> bool:
        """Return whether `run` is running, or has a job in the queue."""
        if self._jobs is None:
            self._jobs = queue(["--me"])  # one query for all runs of a sweep
        return super().is_active(run) or submission.queued_state(run, self._jobs) is not None

    def script(self, run: Run, config: Mapping[str, Any]) -> str:
        """Return the batch script, and what sbatch --test-only says about it."""
        text = self._job([run], submission.next_folder(run)).script()
        return text + sbatch_verdict(text)

    def submit(self, runs: Sequence[Run]) -> list[Handle]:
        """Queue `runs`: one as a job, more as job arrays within the cluster's limit."""
        handles: list[Handle] = []
        size = array_limit() if len(runs) > 1 else 1
        for first in range(0, len(runs), size):
            handles += self._submit(runs[first : first + size])
        return handles

    def _submit(self, runs: Sequence[Run]) -> list[SlurmHandle]:
        with submission.guard(runs):
            submission.refuse_queued(runs)
            folder = submission.new_folder(runs)
            ids = self._job(runs, folder).submit()
            for run, job_id in zip(runs, ids, strict=True):
                submission.record(run, folder, job_id)
        return [
            SlurmHandle(run, job_id, folder, ids) for run, job_id in zip(runs, ids, strict=True)
        ]

    def _job(self, runs: Sequence[Run], folder: Path) -> BatchJob:
        return BatchJob(
            runs, folder, self.settings, self.nodes, self.nproc_per_node, device=self.device
        )

    def _run_of(self, config: Mapping[str, Any]) -> Run:
        if config.get("resume"):
            return Run.find(str(config["resume"]), config["outputs"])
        return Run.locate(config, self.world_size)

    def _ranks_per_node(self, wanted: int | str) -> int:
        if wanted == "auto":
            raise ConfigError(
                "cluster.nproc_per_node=auto counts this machine's GPUs, and the job runs on "
                "others; give the number of GPUs of a node, for example cluster.nproc_per_node=8"
            )
        return int(wanted)
