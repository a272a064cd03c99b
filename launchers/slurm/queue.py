"""What Slurm says about its queue, its jobs and its limits, without submitit.

squeue is used and not sacct: many clusters have no accounting, and squeue still knows a job for
minutes after its end (MinJobAge).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from atlas.errors import AtlasError

# Slurm's states of a job that has ended. COMPLETING is not among them: a job that is being requeued
# has that state while its old processes end.
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
# Variables of an allocation that must not reach the jobs submitted from inside it.
INHERITED = ("SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMIX_", "SUBMITIT_", "TORCHELASTIC_")
INHERITED_NAMES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ATLAS_LAUNCHER"),
)
QUERY_S = 60.0  # how long a query to the controller may take


class QueuedJob(NamedTuple):
    """A job that Slurm knows: its state, such as PENDING, and the path of its batch script."""

    state: str
    script: str


def job_state(job_id: str) -> str | None:
    """Return Slurm's state of a job, such as PENDING, or None if it does not know the job.

    It forgets a job some minutes after its end. Raise `AtlasError` if Slurm does not answer.
    """
    found = queue(["-j", str(job_id)]).get(str(job_id))
    return found.state if found else None


def queue(selection: Sequence[str]) -> dict[str, QueuedJob]:
    """Return every job of `selection` (arguments of squeue) by its id."""
    try:
        done = subprocess.run(
            ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%o", *selection],
            capture_output=True,
            text=True,
            timeout=QUERY_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AtlasError(f"Slurm's queue cannot be read: {error}") from error
    if done.returncode and "Invalid job id" not in done.stderr:
        raise AtlasError(f"Slurm's queue cannot be read: {one_line(done.stderr)}")
    rows = (line.split("|", 2) for line in done.stdout.splitlines())
    return {job: QueuedJob(state, script) for job, state, script in rows}


def array_limit() -> int:
    """Return the largest number of tasks that a job array may have here (MaxArraySize)."""
    for line in output("scontrol", "show", "config").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "MaxArraySize":
            return max(1, int(value))
    return 1000


def output(*command: str) -> str:
    """Return what one of Slurm's commands prints, or "" if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def first_host(nodes: str) -> str:
    """Return the host that rank 0 runs on, from a list such as `n[1-3],m5`."""
    if not set("[,") & set(nodes):
        return nodes
    hosts = output("scontrol", "show", "hostnames", nodes).split()
    if not hosts:
        raise AtlasError(f"scontrol show hostnames {nodes} gave no host; rank 0 cannot be found")
    return hosts[0]


def is_preempted() -> bool:
    """Return whether Slurm is ending this job for another one.

    With a grace time the job gets SIGTERM then, as it does from scancel.
    """
    job = output("scontrol", "show", "job", "-o", os.environ["SLURM_JOB_ID"])
    fields = dict(part.partition("=")[::2] for part in job.split())
    return fields.get("PreemptTime", "None") != "None"


def seconds(left: str) -> float | None:
    """Return squeue's `[days-]hours:minutes:seconds` (or fewer parts) in seconds, or None."""
    days, _, clock = left.rpartition("-")
    try:
        total = 0.0
        for part in clock.split(":"):
            total = 60 * total + float(part)
        return 86400 * float(days or 0) + total
    except ValueError:
        return None


@contextlib.contextmanager
def outside_allocation() -> Iterator[None]:
    """Remove a job's variables from the environment: a new job would take them for its options.

    Outside a job nothing changes; SBATCH_* variables are the user's own defaults there.
    """
    before = dict(os.environ)
    if "SLURM_JOB_ID" in before:
        for name in {*before} - {"SLURM_CONF"}:
            if name in INHERITED_NAMES or name.startswith(INHERITED):
                del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def sbatch_verdict(script: str) -> str:
    """Return what sbatch says about `script` without queueing it, as a comment."""
    if not shutil.which("sbatch"):
        return "\n# sbatch --test-only: sbatch is not installed on this machine"
    with outside_allocation():
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=QUERY_S
        )
    return f"\n# sbatch --test-only: {one_line(done.stderr or done.stdout)}"


def one_line(error: object) -> str:
    """Return Slurm's messages as one line, without the name of the command."""
    lines = (
        line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).split("\n")
    )
    return "; ".join(line.strip() for line in lines if line.strip())
