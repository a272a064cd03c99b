"""Slurm: runs are put into the queue with submitit and look after themselves from there."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atlas.config.keys import Key
from atlas.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    AtlasError,
    ConfigError,
    RunBusyError,
    nearest,
)
from atlas.run import status
from atlas.run.directory import Run
from atlas.run.status import State
from atlas.run.summary import summary
from atlas.system.files import guarded
from atlas.version import ROOT
from launchers.base import Handle, Launcher
from launchers.slurm import epilog
from launchers.slurm.queue import (
    ENDED,
    QUERY_S,
    array_limit,
    job_state,
    outside_allocation,
    queue,
    sentence,
    tested,
)
from launchers.slurm.task import Task

COUNT = Key(int, minimum=1)
OPTIONAL_COUNT = Key(int, minimum=1, null=True)
KEYS = {
    "cpus_per_task": OPTIONAL_COUNT,
    "mem_gb": Key(float, above=0, null=True),
    "timeout_min": COUNT,
    "partition": Key(str, null=True),
    "account": Key(str, null=True),
    "qos": Key(str, null=True),
    "constraint": Key(str, null=True),
    "array_parallelism": OPTIONAL_COUNT,
    "signal_delay_s": COUNT,
    "max_requeues": Key(int, minimum=0),
    "setup": Key(list, null=True),
    "sbatch": Key(dict, null=True),
    "preflight": Key(str, choices=("full", "light")),
    "wait": Key(bool),
}
# sbatch parameters that Atlas sets itself, and the key that sets them; None: nobody else may.
OWN = {
    "nodes": "nodes",
    "ntasks": "nproc_per_node",
    "ntasks-per-node": "nproc_per_node",
    "cpus-per-task": "cpus_per_task",
    "mem": "mem_gb",
    "time": "timeout_min",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "signal": "signal_delay_s",
    "array": None,
    "output": None,
    "error": None,
    "open-mode": None,
    "requeue": None,
    "no-requeue": None,
    "job-name": None,
}
# Any of these among the further parameters replaces the request for one GPU a rank.
GPU_REQUESTS = (
    "gres",
    "gpus",
    "gpus-per-node",
    "gpus-per-task",
    "gpus-per-socket",
    "tres-per-task",
)
CODES: dict[State | None, int] = {
    State.FINISHED: EXIT_DONE,
    State.PREEMPTED: EXIT_STOPPED,
    State.KILLED: EXIT_STOPPED,
}
POLL_S = 2.0


class SlurmLauncher(Launcher):
    """Queues every run as a job, several at once as a job array; keys as in conf/cluster/slurm.yaml."""

    name = "slurm"
    elsewhere = True

    def __init__(
        self,
        nodes: int,
        nproc_per_node: int | str,
        device: str,
        sharding: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(nodes, nproc_per_node, device, sharding)
        self._settings = {**dict.fromkeys(KEYS), **settings}
        self._settings["setup"] = list(settings.get("setup") or ())
        self._settings["sbatch"] = {
            str(k).replace("_", "-"): v for k, v in (settings.get("sbatch") or {}).items()
        }
        self.detached = not settings.get("wait")
        self._queue: dict[str, tuple[str, str]] | None = None

    def check(self) -> None:
        problems = [
            f"cluster.{key} is not a key of cluster=slurm{nearest(key, KEYS)}"
            for key in self._settings
            if key not in KEYS
        ]
        for key, spec in KEYS.items():
            if problem := spec.problem(self._settings[key]):
                problems.append(f"cluster.{key}={self._settings[key]!r} {problem}")
        if not problems:
            problems = [*self._relations()]
        if problems:
            raise ConfigError(problems)

    def preflight(self, configs: Sequence[Mapping[str, Any]]) -> None:
        if not shutil.which("sbatch"):
            raise ConfigError(
                "cluster=slurm needs sbatch and there is none on this machine; give the command "
                "on a login node of the cluster, or use cluster=local"
            )
        self._refuse_queued([self._run_of(config) for config in configs])
        if self._settings["preflight"] == "full":
            from launchers.preflight import preflight

            for note in preflight(configs, self.world_size):
                print(f"not checked: {note}", flush=True)

    def is_at_work(self, run: Run) -> bool:
        if self._queue is None:
            # One question for all runs of a sweep.
            self._queue = queue(["--me"])
        return super().is_at_work(run) or _job_of(run, self._queue) is not None

    def script(self, run: Run, config: Mapping[str, Any]) -> str:
        from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

        folder = run.path / "slurm" / str(_next_number(run.path / "slurm"))
        command = f"{_python()} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        known = set(SlurmExecutor._valid_parameters())
        parameters = {k: v for k, v in self._parameters([run], folder).items() if k in known}
        text = _make_sbatch_string(command=command, folder=folder, **parameters)
        return text + tested(text)

    def submit(self, runs: Sequence[Run]) -> list[Handle]:
        handles: list[Handle] = []
        size = array_limit() if len(runs) > 1 else 1
        for first in range(0, len(runs), size):
            handles += self._submit(runs[first : first + size])
        return handles

    def _submit(self, runs: Sequence[Run]) -> list[Handle]:
        """One job, or one array with a task a run."""
        folders = sorted({run.path.parent for run in runs})
        with contextlib.ExitStack() as stack:
            # A job can start before its number is written down here: its rank 0 takes the run's
            # lock under the same guard, so it comes second.
            for folder in folders:
                stack.enter_context(guarded(folder))
            self._refuse_queued(runs)
            folder = _submission_folder(runs)
            jobs = self._sbatch(runs, folder)
            for run, job in zip(runs, jobs, strict=True):
                status.queue(run, "slurm", job)
                epilog.note_attempt(run, folder, job, attempt=0)
        return [SlurmHandle(run, job, folder, jobs) for run, job in zip(runs, jobs, strict=True)]

    def _sbatch(self, runs: Sequence[Run], folder: Path) -> list[str]:
        """The job ids of `runs`, in their order."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError
        from submitit.slurm.slurm import SlurmExecutor

        executor = SlurmExecutor(
            folder, max_num_timeout=int(self._settings["max_requeues"]), python=_python()
        )
        executor.update_parameters(**self._parameters(runs, folder))
        try:
            # submitit prints sbatch's words, and raises them too.
            with outside_allocation(), contextlib.redirect_stderr(io.StringIO()):
                if len(runs) == 1:
                    return [executor.submit(Task(str(runs[0].path))).job_id]
                jobs = executor.submit_array([Task(str(run.path)) for run in runs])
        except (FailedJobError, FailedSubmissionError) as error:
            raise AtlasError(f"sbatch refused the job: {sentence(error)}") from error
        return [job.job_id for job in jobs]

    def _parameters(self, runs: Sequence[Run], folder: Path) -> dict[str, Any]:
        """What submitit makes the sbatch script of; everything that is null is left out."""
        s = self._settings
        name = runs[0].path.parent.name
        further = {k: v for k, v in s["sbatch"].items() if v is not None and v is not False}
        parameters = {
            "job_name": f"{name}-{runs[0].id}" if len(runs) == 1 else name,
            "nodes": self.nodes,
            "ntasks_per_node": self.nproc_per_node,
            "cpus_per_task": s["cpus_per_task"],
            "mem": None if s["mem_gb"] is None else f"{int(s['mem_gb'] * 1024)}M",
            "time": int(s["timeout_min"]),
            "signal_delay_s": int(s["signal_delay_s"]),
            "array_parallelism": s["array_parallelism"] or len(runs),
            "setup": self._setup(folder),
            "stderr_to_stdout": True,
            "srun_args": self._srun_arguments(),
            # As further parameters, since submitit would take the signal from a variable of the
            # environment, and knows nothing of the others.
            "additional_parameters": {
                "signal": f"USR2@{int(s['signal_delay_s'])}",
                "requeue": True,
                **further,
            },
            **{key: s[key] for key in ("partition", "account", "qos", "constraint")},
        }
        if self.device != "cpu" and not any(key in further for key in GPU_REQUESTS):
            parameters["gpus_per_node"] = self.nproc_per_node
        # submitit would charge its own name to a cluster's accounts of projects.
        return {**{k: v for k, v in parameters.items() if v is not None}, "wckey": None}

    def _setup(self, folder: Path) -> list[str]:
        root = shlex.quote(str(ROOT))
        return [
            *self._settings["setup"],
            "export SUBMITIT_PREEMPT_SIGNAL=USR2",
            # This clone, and not what happens to lie in the working directory.
            f'export PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1',
            epilog.wrapper(sys.executable, folder),
        ]

    def _srun_arguments(self) -> list[str]:
        arguments = [
            "--open-mode=append",  # a requeued job goes on in the same log
            "--kill-on-bad-exit=1",  # or the ranks would wait for one that has died
            "--wait=0",  # rank 0 stays longer than the others: the last metrics are sent
        ]
        if self._settings["cpus_per_task"]:
            # srun does not take it over from sbatch (since Slurm 22.05).
            arguments.append(f"--cpus-per-task={self._settings['cpus_per_task']}")
        return arguments

    def _relations(self) -> Iterator[str]:
        s = self._settings
        if s["signal_delay_s"] >= 60 * s["timeout_min"]:
            yield (
                f"cluster.signal_delay_s={s['signal_delay_s']} must be below the time limit, "
                f"cluster.timeout_min={s['timeout_min']} ({60 * s['timeout_min']} s)"
            )
        for line in s["setup"]:
            if not isinstance(line, str):
                yield f"cluster.setup holds {line!r}; every entry must be a line of shell"
        for key in s["sbatch"]:
            if key in OWN:
                instead = f"use cluster.{OWN[key]}" if OWN[key] else "Atlas sets it itself"
                yield f"cluster.sbatch.{key}: {instead}"

    def _run_of(self, config: Mapping[str, Any]) -> Run:
        if config.get("resume"):
            return Run.find(str(config["resume"]), config["outputs"])
        return Run.plan(config, self.world_size)

    def _refuse_queued(self, runs: Sequence[Run]) -> None:
        """Raise `RunBusyError` for runs that have a job in the queue."""
        ids = [str(run.read_status().job_id) for run in runs if _is_slurms(run)]
        if not ids:
            return
        jobs = queue(["-j", ",".join(ids)])
        busy = [(run, job) for run in runs if (job := _job_of(run, jobs))]
        if busy:
            raise RunBusyError(
                "\n".join(
                    f"run {run.id} is job {run.read_status().job_id} on Slurm already ({state}); "
                    f"scancel {run.read_status().job_id} stops it and keeps what it has reached"
                    for run, state in busy
                )
            )

    def _ranks_per_node(self, wanted: int | str) -> int:
        if wanted == "auto":
            raise ConfigError(
                "cluster.nproc_per_node=auto counts this machine's GPUs, and the job runs on "
                "others; give the number of GPUs of a node, for example cluster.nproc_per_node=8"
            )
        return int(wanted)


class SlurmHandle(Handle):
    """A run in Slurm's queue; `jobs` are the ids of all that were submitted with it."""

    def __init__(self, run: Run, job_id: str, folder: Path, jobs: Sequence[str]) -> None:
        super().__init__(run)
        self.job_id = job_id
        self.folder = folder
        self._jobs = jobs
        self._sightings = 0

    @property
    def log(self) -> Path:
        """What rank 0 prints, and Slurm about the job; the other ranks' logs lie beside it."""
        return self.folder / f"{self.job_id}_0_log.out"

    def wait(self) -> int:
        try:
            while (code := self._code()) is None:
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            stop = f"scancel {self.job_id} stops it"
            print(f"\nno longer waiting; job {self.job_id} goes on ({stop})")
            raise SystemExit(EXIT_INTERRUPTED) from None
        if len(self._jobs) == 1:
            self._tell(code)
        return code

    def cancel(self) -> None:
        subprocess.run(["scancel", self.job_id], check=False, timeout=QUERY_S)

    def describe(self) -> str:
        """The same text for every run of an array."""
        if len(self._jobs) > 1:
            main = self.job_id.partition("_")[0]
            return (
                f"job array {main} of {len(self._jobs)} runs is in Slurm's queue\n"
                f"  state  squeue -r -j {main}\n"
                f"  logs   {self.folder}/{main}_<run>_0_log.out\n"
                f"  stop   scancel {main}   (each run saves first; the same command goes on)"
            )
        return (
            f"job {self.job_id} is in Slurm's queue\n"
            f"  state  squeue -j {self.job_id}\n"
            f"  log    tail -F {self.log}\n"
            f"  stop   scancel {self.job_id}   (it saves first; the same command goes on)"
        )

    def _code(self) -> int | None:
        """The exit code, None while the job can still do something."""
        try:
            now = job_state(self.job_id)
        except AtlasError:  # a controller that is away for a while
            return None
        state = self.run.read_status().state  # read last: it can have ended in between
        over = now is None or now in ENDED
        if state in (State.FINISHED, State.FAILED) and (over or now == "COMPLETING"):
            return CODES.get(state, EXIT_FAILED)
        # Seen twice: a job that its node has lost is over for a moment before it is requeued.
        self._sightings = self._sightings + 1 if over else 0
        return CODES.get(state, EXIT_FAILED) if self._sightings > 1 else None

    def _tell(self, code: int) -> None:
        print(summary(self.run))
        if code != EXIT_DONE:
            print(f"  log {self.log}", flush=True)


def _is_slurms(run: Run) -> bool:
    status = run.read_status()
    return status.launcher == "slurm" and bool(status.job_id)


def _job_of(run: Run, jobs: Mapping[str, tuple[str, str]]) -> str | None:
    """The state of the job that has `run` queued or running, None where there is none."""
    if not _is_slurms(run):
        return None
    status = run.read_status()
    state, script = jobs.get(str(status.job_id), ("", ""))
    if not state or state in ENDED or status.state in (State.FINISHED, State.FAILED):
        return None
    if state == "COMPLETING" and status.state is State.KILLED:
        return None
    # Job ids start again when a controller is set up anew: another job can have this one now.
    latest = run.path / "slurm" / str(_next_number(run.path / "slurm") - 1)
    return state if Path(script).parent.resolve() == latest.resolve() else None


def _submission_folder(runs: Sequence[Run]) -> Path:
    """A new folder for one submission; an array's is linked to from each of its runs.

    submitit finds its files by job id alone, and ids can start again.
    """
    if len(runs) == 1:
        return _new_folder(runs[0].path / "slurm")
    folder = _new_folder(runs[0].path.parent / ".slurm")
    for run in runs:
        own = run.path / "slurm"
        own.mkdir(exist_ok=True)
        (own / str(_next_number(own))).symlink_to(os.path.relpath(folder, own))
    return folder


def _new_folder(parent: Path) -> Path:
    folder = parent / str(_next_number(parent))
    folder.mkdir(parents=True)
    return folder


def _next_number(parent: Path) -> int:
    taken = [int(path.name) for path in parent.glob("*") if path.name.isdigit()]
    return max(taken, default=0) + 1


def _python() -> str:
    """The command that starts Python in a task, deaf to SIGUSR2 until submitit listens to it.

    The signal ends a process that has no handler yet, and the job would count as failed.
    """
    return f'sh -c \'trap "" USR2; exec "$0" "$@"\' {shlex.quote(sys.executable)}'
