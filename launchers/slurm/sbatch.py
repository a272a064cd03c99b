"""What sbatch gets of a job: parameters, batch script and pickles, by way of submitit."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas.errors import AtlasError
from atlas.run.directory import Run
from atlas.version import ROOT
from launchers.slurm import epilog
from launchers.slurm.queue import one_line, outside_allocation
from launchers.slurm.settings import SlurmSettings
from launchers.slurm.task import Task

# Any of these among the further parameters replaces the request for one GPU per rank.
GPU_REQUESTS = (
    *("gres", "gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "tres-per-task"),
)


@dataclass(frozen=True)
class BatchJob:
    """A job that trains one run, or a job array with one task per run."""

    runs: Sequence[Run]
    folder: Path  # for what submitit writes: scripts, pickles and logs
    settings: SlurmSettings
    nodes: int
    ranks_per_node: int
    device: str

    def script(self) -> str:
        """Return the batch script; nothing is written."""
        from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

        command = f"{_python()} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"
        known = set(SlurmExecutor._valid_parameters())
        parameters = {k: v for k, v in self.parameters().items() if k in known}
        return _make_sbatch_string(command=command, folder=self.folder, **parameters)

    def submit(self) -> list[str]:
        """Put the job into the queue and return the job ids of its runs, in their order."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError
        from submitit.slurm.slurm import SlurmExecutor

        requeues = self.settings.max_requeues
        executor = SlurmExecutor(self.folder, max_num_timeout=requeues, python=_python())
        executor.update_parameters(**self.parameters())
        tasks = [Task(str(run.path)) for run in self.runs]
        try:
            # submitit prints what sbatch said, and raises it too.
            with outside_allocation(), contextlib.redirect_stderr(io.StringIO()):
                if len(tasks) == 1:
                    return [executor.submit(tasks[0]).job_id]
                return [job.job_id for job in executor.submit_array(tasks)]
        except (FailedJobError, FailedSubmissionError) as error:
            raise AtlasError(f"sbatch refused the job: {one_line(error)}") from error

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that submitit writes the batch script from."""
        s = self.settings
        further = s.further_parameters()
        parameters = {
            "job_name": self._name(),
            "nodes": self.nodes,
            "ntasks_per_node": self.ranks_per_node,
            "cpus_per_task": s.cpus_per_task,
            "mem": None if s.mem_gb is None else f"{int(s.mem_gb * 1024)}M",
            "time": s.timeout_min,
            "signal_delay_s": s.signal_delay_s,
            "array_parallelism": s.array_parallelism or len(self.runs),
            "setup": self._setup(),
            "stderr_to_stdout": True,
            "srun_args": self._srun_arguments(),
            # As further parameters: submitit would take the signal from a variable of the
            # environment, and does not know the others.
            "additional_parameters": {
                "signal": f"USR2@{s.signal_delay_s}",
                "requeue": True,
                **further,
            },
            **{"partition": s.partition, "account": s.account},
            **{"qos": s.qos, "constraint": s.constraint},
        }
        if self.device != "cpu" and not any(name in further for name in GPU_REQUESTS):
            parameters["gpus_per_node"] = self.ranks_per_node
        # Without wckey=None submitit would charge its own name to the cluster's project accounts.
        return {**{k: v for k, v in parameters.items() if v is not None}, "wckey": None}

    def _name(self) -> str:
        name = self.runs[0].path.parent.name
        return f"{name}-{self.runs[0].id}" if len(self.runs) == 1 else name

    def _setup(self) -> list[str]:
        root = shlex.quote(str(ROOT))
        return [
            *(self.settings.setup or ()),
            "export SUBMITIT_PREEMPT_SIGNAL=USR2",
            # This clone, not what happens to be in the working directory.
            f'export PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1',
            epilog.wrapper(sys.executable, self.folder),
        ]

    def _srun_arguments(self) -> list[str]:
        arguments = [
            "--open-mode=append",  # a requeued job continues the same log
            "--kill-on-bad-exit=1",  # otherwise the ranks would wait for one that has died
            "--wait=0",  # rank 0 ends after the others: it sends the last metrics
        ]
        if self.settings.cpus_per_task:
            # srun does not inherit it from sbatch (since Slurm 22.05).
            arguments.append(f"--cpus-per-task={self.settings.cpus_per_task}")
        return arguments


def _python() -> str:
    """Return the command that starts Python in a task, with SIGUSR2 ignored at first.

    The signal would end a process that has no handler yet, and the job would count as failed.
    submitit installs its handler as soon as it has been imported.
    """
    return f'sh -c \'trap "" USR2; exec "$0" "$@"\' {shlex.quote(sys.executable)}'
