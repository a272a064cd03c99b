"""What the batch script of a Slurm job does after its ranks have failed: record why, maybe requeue.

The batch script calls `python -m launchers.epilog FOLDER` when srun returns another exit code than 0
or 75. It is the only process of the job that outlives its ranks. No rank could do the same: the one
that fails may be killed by the kernel, or be on a node that is lost; srun then kills the others, and a
rank that waits in a collective on its GPU never runs the Python code that would notice.

It decides, under the guard of the run's folder:

1. Is the run still this job's? It is not if it was submitted again, or if Slurm has requeued the job
   from a lost node and a later attempt runs already. Then nothing is changed.
2. Why did the ranks fail? The first rank that fails records it, if it can. The others only see that a
   peer is gone, and a rank that was killed records nothing; then srun's own message says which task
   ended and how.
3. Is another attempt worth it? A crash is tried again only if a checkpoint was saved since this
   attempt began: such a run advances, however often it crashes, and one that crashes at the same step
   twice ends. NaN and out of memory would happen again. So the job needs no limit of attempts. A
   preemption after which rank 0 was ended before it could requeue the job is always tried again.

Which run a job trains, which attempt this is and what was saved before it is in a note,
`<job>_attempt.json`. The submitter writes it for attempt 0 and rank 0 for every attempt that it begins.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas.config.schema import TrackingSettings
from atlas.errors import AtlasError
from atlas.run.directory import Run
from atlas.run.failures import CRASH, MEMORY, PREEMPTED, describe_failure, may_retry
from atlas.run.lock import job_id
from atlas.run.status import State, end, requeue, undo_requeue
from atlas.system.files import guarded, write_json
from launchers.slurm.queue import QUERY_S, job_state, one_line

# How long the submitter may take to write the notes for all runs of an array.
NOTE_S = 60.0
RESUME = "run the same command to resume"
# What gloo and NCCL say when another rank is gone.
PEER_GONE = ("closed by peer", "reset by peer", "Broken pipe", "remote process", "watchdog")


def note_attempt(run: Run, folder: Path, job: str, attempt: int) -> None:
    """Record that `job` trains `run` for the `attempt`-th time (from 0), and what is saved of it."""
    note = {"run": str(run.path), "attempt": attempt, "saved": run.newest_step()}
    write_json(_note_file(folder, job), note)


def attempt() -> int:
    """Return how often Slurm has requeued this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def wrapper(python: str, folder: Path) -> str:
    """Return the line of a batch script that calls this module when srun reports a failure.

    After exit code 0 (finished) or 75 (stopped) rank 0 has done what was to do. The line defines a
    function named srun and no trap: a shell has only one trap for its exit, which `cluster.setup` may
    want for itself.
    """
    command = shlex.join([python, "-m", "launchers.epilog", str(folder)])
    return (
        'srun() { command srun "$@"; local code=$?; '
        f"case $code in 0|75) ;; *) {command} ;; esac; return $code; }}"
    )


def main(folder: Path) -> None:
    """Record why the ranks of this job failed, and requeue the job if that may help."""
    job = str(job_id())
    note = _read_note(_note_file(folder, job))
    if note is None:
        print(f"no run is known for job {job}; {RESUME}", flush=True)
        return
    run = Run(note["run"])
    with guarded(run.path.parent):
        if run.read_status().job_id != job or note["attempt"] > attempt():
            return  # submitted again, or requeued from a lost node
        failure = find_failure(run, folder / f"{job}_0_log.out")
        if failure is None:
            return
        # If rank 0 has not noted this attempt, no rank has got as far as a checkpoint.
        advanced = note["attempt"] == attempt() and run.newest_step() > note["saved"]
        if may_retry(failure["kind"], advanced):
            retry(run, failure)
            return
        write_json(run.failure_file, failure)
        end(run, State(failure["state"]), reason_of(failure))
    sync(run)
    print(describe_failure(failure), flush=True)


def find_failure(run: Run, log: Path) -> dict[str, Any] | None:
    """Return the record of the failure, or None if the run had finished or was stopped before."""
    state = run.read_status().state
    if state is State.PREEMPTED:  # saved, and then rank 0 should have requeued the job
        message = "rank 0 ended before it had requeued the job"
        return None if _is_requeued() else _new_record(run, PREEMPTED, message, None)
    return None if state in (State.FINISHED, State.KILLED) else first_failure(run, log)


def first_failure(run: Run, log: Path) -> dict[str, Any]:
    """Return the record that the first failed rank wrote, or one made from srun's message.

    A rank that was killed wrote none. The others only recorded that it was gone.
    """
    recorded = run.read_failure()
    if recorded and not any(text in recorded["reason"] for text in PEER_GONE):
        return recorded
    message = _srun_message(log)
    if message is None:
        return recorded or _new_record(run, CRASH, "no rank has recorded a reason", None)
    if re.search(r"Killed|Out Of Memory", message):
        message += "; the machine is likely to be out of memory"
        return _new_record(run, MEMORY, message, recorded)
    return _new_record(run, CRASH, message, recorded)


def reason_of(failure: Mapping[str, Any]) -> str:
    """Return the reason for `status.json`, with the rank unless it is 0, whose log is read first."""
    where = f"rank {failure['rank']} on {failure['host']}: " if failure["rank"] else ""
    return f"{where}{failure['reason']}"


def retry(run: Run, failure: Mapping[str, Any]) -> None:
    """Requeue this job, which also ends it, so this process too; hence it is recorded first."""
    reason = reason_of(failure)
    outcome = f"{reason}; {run.newest_step()} updates are saved, so the job is back in the queue"
    requeue(run, outcome)
    print(outcome, flush=True)
    if refusal := _requeue_job():
        outcome = f"{reason}; scontrol requeue failed ({refusal}), {RESUME}"
        undo_requeue(run, outcome)
        print(outcome, flush=True)


def sync(run: Run) -> None:
    """Send the reason to MLflow; if rank 0 has sent one, it was what it saw itself."""
    tracking = TrackingSettings.of(run.read_config())
    if not tracking.is_on:
        return
    command = [sys.executable, "-m", "atlas.cli", "sync", str(run.path)]
    try:
        subprocess.run(command, timeout=tracking.wait_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        print(f"MLflow could not be reached; later: atlas sync {run.path}", flush=True)


def _srun_message(log: Path) -> str | None:
    """Return srun's message on the first task that failed in this attempt: `n1: task 1: Killed`."""
    latest = log.read_text(errors="replace").rpartition("Starting with JobEnvironment")[2]
    found = re.search(r"^srun: error: (\S+: tasks? .*)$", latest, re.MULTILINE)
    return found and found[1]


def _new_record(
    run: Run, kind: str, message: str, recorded: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return a record that replaces the `recorded` one, which only says that a peer is gone."""
    found = re.match(r"(\S+): tasks? (\d+)", message)
    return {
        "kind": kind,
        "rank": int(found[2]) if found else None,
        "host": found[1] if found else "unknown",
        "step": recorded["step"] if recorded else run.read_status().step,
        "state": State.FAILED,
        "reason": f"{kind}: {message}",
        "message": message,
        "traceback": "",
        "time": recorded["time"] if recorded else run.read_status().updated,
    }


def _requeue_job() -> str | None:
    """Put this job back into the queue, which ends it here; return why that was refused, if it was."""
    command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode <= 0 or _is_requeued():  # below 0: scontrol was ended together with this job
        return None
    return one_line(done.stderr) or f"exit code {done.returncode}"


def _is_requeued() -> bool:
    """Return whether Slurm has requeued this job by itself, as it does after losing a node."""
    try:
        return job_state(str(job_id())) in ("PENDING", "COMPLETING", "REQUEUED")
    except AtlasError:
        return False


def _read_note(file: Path) -> Any:
    """Return what `note_attempt` wrote, or None; ranks can fail before the submitter has written it."""
    deadline = time.monotonic() + NOTE_S
    while not file.exists():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)
    return json.loads(file.read_text())


def _note_file(folder: Path, job: str) -> Path:
    return folder / f"{job}_attempt.json"
