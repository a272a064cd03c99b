"""Runs on the test cluster as a person starts them, and what Slurm says of them."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import lines, only_run, points, quick, same, status, train, unnamed, weights

TIMEOUT_S = 120.0


def slurm(*command: str, code: int | None = 0) -> str:
    """The output of one of Slurm's commands."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert code is None or done.returncode == code, (command, done.stdout, done.stderr)
    return done.stdout.strip()


def arguments(outputs: Path, *more: str, ranks: int = 2) -> list[str]:
    """The quick run as a job of CPU processes."""
    cluster = ("cluster=slurm", "cluster.device=cpu", "cluster.preflight=light")
    return quick(outputs, *cluster, f"cluster.nproc_per_node={ranks}", *more)


def submit(outputs: Path, *more: str, ranks: int = 2, **environment: str) -> tuple[Path, str]:
    """The run's directory and the id of its job."""
    done = train(*arguments(outputs, *more, ranks=ranks), **environment)
    run = only_run(outputs)
    return run, job_of(run, done.stdout)


def job_of(run: Path, printed: str) -> str:
    """The id of the job just submitted, which must be told with the commands that follow it."""
    job = str(status(run)["job_id"])
    assert unnamed(printed, f"squeue -j {job}", f"scancel {job}") == [], printed
    return job


def field(job: str, name: str) -> str:
    """One field of `scontrol show job`."""
    found = re.search(rf"\b{name}=(\S*)", slurm("scontrol", "show", "job", job))
    assert found, name
    return found[1]


def until(question: Callable[[], Any], what: str, timeout: float = 60.0) -> Any:
    """Ask until the answer counts as true, and return it."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if answer := question():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"{what}: not after {timeout:.0f} s\n{slurm('squeue')}")


def ended(job: str, timeout: float = TIMEOUT_S) -> tuple[str, str]:
    """Wait for the end of a job: its state and its exit code, such as `COMPLETED` and `0:0`.

    A job that is being requeued looks like one that has ended for a moment: asked twice.
    """
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    seen: list[str] = [""]

    def twice() -> bool:
        seen.append(field(job, "JobState"))
        time.sleep(0.5)
        return seen[-1] in over and seen[-1] == seen[-2]

    until(twice, f"the end of job {job}", timeout)
    return seen[-1], field(job, "ExitCode")


def log(run: Path, job: str, rank: int = 0, submission: int = 1) -> str:
    """What a rank has printed."""
    return (run / "slurm" / str(submission) / f"{job}_{rank}_log.out").read_text()


def finished(run: Path, job: str, timeout: float = TIMEOUT_S) -> None:
    """Wait for the job, which has to end well."""
    state = ended(job, timeout)
    assert state == ("COMPLETED", "0:0"), (state, log(run, job))
    assert status(run)["state"] == "finished"


def assert_twins(one: Path, other: Path) -> None:
    assert points(one) == points(other)
    assert lines(one / "samples.jsonl") == lines(other / "samples.jsonl")
    assert same(weights(one), weights(other))


def process_of(job: str, rank: int, started: bool = True) -> int | None:
    """The process of one rank, found by the variables that Slurm gave it, once it is Python's."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            given = set((folder / "environ").read_bytes().split(b"\0"))
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        task = wanted <= given and b"submitit.core._submit" in words and b"srun" not in words
        if task and (b"sh" not in words or not started):
            return int(folder.name)
    return None
