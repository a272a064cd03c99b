"""Which job in Slurm's queue belongs to which run, and the folders of submissions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from atlas.errors import RunBusyError
from atlas.run import status
from atlas.run.directory import Run
from atlas.run.status import State
from atlas.system.files import guarded
from launchers.slurm import epilog
from launchers.slurm.queue import ENDED, QueuedJob, queue


@contextlib.contextmanager
def guard(runs: Sequence[Run]) -> Iterator[None]:
    """Keep the jobs of `runs` from taking the locks of their runs inside this context.

    A job can start before its number is recorded here. Its rank 0 takes the run's lock under the
    same guard, so it comes second.
    """
    with contextlib.ExitStack() as stack:
        for folder in sorted({run.path.parent for run in runs}):
            stack.enter_context(guarded(folder))
        yield


def refuse_queued(runs: Sequence[Run]) -> None:
    """Raise `RunBusyError` for runs that have a job in the queue."""
    ids = [job_id for run in runs if (job_id := _job_id(run))]
    if not ids:
        return
    jobs = queue(["-j", ",".join(ids)])
    busy = [(run, state) for run in runs if (state := queued_state(run, jobs))]
    if busy:
        raise RunBusyError(
            "\n".join(
                f"run {run.id} is job {_job_id(run)} on Slurm already ({state}); "
                f"scancel {_job_id(run)} stops it and keeps what it has saved"
                for run, state in busy
            )
        )


def queued_state(run: Run, jobs: Mapping[str, QueuedJob]) -> str | None:
    """Return Slurm's state of the job in `jobs` that has `run` queued or running, or None."""
    job = jobs.get(_job_id(run) or "")
    state = run.read_status().state
    if job is None or job.state in ENDED or state in (State.FINISHED, State.FAILED):
        return None
    if job.state == "COMPLETING" and state is State.KILLED:
        return None
    # A controller that is installed again counts job ids from the start, so the id can belong to
    # another run's job now.
    latest = run.path / "slurm" / str(_next_number(run.path / "slurm") - 1)
    return job.state if Path(job.script).parent.resolve() == latest.resolve() else None


def record(run: Run, folder: Path, job_id: str) -> None:
    """Record that `run` is queued as job `job_id`, which was submitted from `folder`."""
    status.queue(run, "slurm", job_id)
    epilog.note_attempt(run, folder, job_id, attempt=0)


def new_folder(runs: Sequence[Run]) -> Path:
    """Create the folder of one submission; each run of an array has a link to it.

    Every submission has its own, since submitit finds its files by job id alone, and a controller
    that is installed again uses ids a second time.
    """
    if len(runs) == 1:
        return _new_folder(runs[0].path / "slurm")
    folder = _new_folder(runs[0].path.parent / ".slurm")
    for run in runs:
        links = run.path / "slurm"
        links.mkdir(exist_ok=True)
        (links / str(_next_number(links))).symlink_to(os.path.relpath(folder, links))
    return folder


def next_folder(run: Run) -> Path:
    """Return the folder that the next submission of `run` will have, without creating it."""
    return run.path / "slurm" / str(_next_number(run.path / "slurm"))


def _new_folder(parent: Path) -> Path:
    folder = parent / str(_next_number(parent))
    folder.mkdir(parents=True)
    return folder


def _next_number(parent: Path) -> int:
    used = [int(path.name) for path in parent.glob("*") if path.name.isdigit()]
    return max(used, default=0) + 1


def _job_id(run: Run) -> str | None:
    """Return the id of the last job of `run`, or None if Slurm has not had it last."""
    last = run.read_status()
    return last.job_id if last.launcher == "slurm" and last.job_id else None
