"""What a job on Slurm does once its ranks have failed: say why, and try again what may be tried.

Run by the job's batch script as `python -m launchers.epilog FOLDER`, since no rank can be relied on:
whichever fails, srun ends the others, and a rank that waits for a GPU does not even hear of it.
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

from atlas.errors import AtlasError
from atlas.run.directory import Run
from atlas.run.failures import CRASH, MEMORY, PREEMPTED, describe_failure, may_retry
from atlas.run.lock import job_id
from atlas.run.status import State, end, requeue, undo_requeue
from atlas.system.files import guarded, write_json
from launchers.slurm.queue import QUERY_S, job_state, sentence

# How long the submitter may take for the notes on all runs of an array.
NOTE_S = 60.0
# How gloo and NCCL say that another rank is gone.
PEER_GONE = ("closed by peer", "reset by peer", "Broken pipe", "remote process", "watchdog")


def note_attempt(run: Run, folder: Path, job: str, attempt: int) -> None:
    """Which run a job trains, and how far that was saved before this attempt of it (from 0)."""
    note = {"run": str(run.path), "attempt": attempt, "saved": run.newest_step()}
    write_json(_note_file(folder, job), note)


def attempt() -> int:
    """How often Slurm has requeued this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def wrapper(python: str, folder: Path) -> str:
    """The line of a batch script that has this module run where srun tells of a failure.

    Not where the ranks have finished (0) or were stopped (75): rank 0 has seen to that. A function by
    srun's name, since a shell has one trap for its end, and that is the person's own.
    """
    command = shlex.join([python, "-m", "launchers.epilog", str(folder)])
    return (
        'srun() { command srun "$@"; local code=$?; '
        f"case $code in 0|75) ;; *) {command} ;; esac; return $code; }}"
    )


def main(folder: Path) -> None:
    """Record why the ranks of this job have failed, and requeue the job where that may help."""
    job = str(job_id())
    note = _read_note(_note_file(folder, job))
    if note is None:
        print(f"no run is known for job {job}; the same command goes on", flush=True)
        return
    run = Run(note["run"])
    with guarded(run.path.parent):
        if run.read_status().job_id != job or note["attempt"] > attempt():
            return  # sent again, or requeued from a node that was lost: no longer ours to judge
        failure = judge(run, folder / f"{job}_0_log.out")
        if failure is None:
            return
        # Where rank 0 has not noted this attempt, none has got as far as a checkpoint.
        advanced = note["attempt"] == attempt() and run.newest_step() > note["saved"]
        if may_retry(failure["kind"], advanced):
            go_on(run, failure)
            return
        write_json(run.failure_file, failure)
        end(run, State(failure["state"]), in_words(failure))
    tell_mlflow(run)
    print(describe_failure(failure), flush=True)


def judge(run: Run, log: Path) -> dict[str, Any] | None:
    """Why the ranks have failed; None where the run has come to a good end, or was stopped, before."""
    state = run.read_status().state
    if state is State.PREEMPTED:  # and saved; it was for rank 0 to requeue the job
        words = "rank 0 ended before it had requeued the job"
        return None if _is_requeued() else _record(run, PREEMPTED, words, None)
    return None if state in (State.FINISHED, State.KILLED) else first_failure(run, log)


def first_failure(run: Run, log: Path) -> dict[str, Any]:
    """The record of the first rank to fail, which it wrote itself if it could.

    A rank that is killed cannot. The others only see that it is gone; srun says which, and how.
    """
    told = run.read_failure()
    if told and not any(word in told["reason"] for word in PEER_GONE):
        return told
    words = _srun_says(log)
    if words is None:
        return told or _record(run, CRASH, "no rank has said why", None)
    killed = re.search(r"Killed|Out Of Memory", words) is not None
    reason = words + ("; the machine is likely to be out of memory" if killed else "")
    return _record(run, MEMORY if killed else CRASH, reason, told)


def in_words(failure: Mapping[str, Any]) -> str:
    """The reason, with the rank if it was another than the one that a person reads first."""
    where = f"rank {failure['rank']} on {failure['host']}: " if failure["rank"] else ""
    return f"{where}{failure['reason']}"


def go_on(run: Run, failure: Mapping[str, Any]) -> None:
    """Requeue this job, which ends it here."""
    told = f"{in_words(failure)}; {run.newest_step()} updates are saved, so the job is back in the queue"
    requeue(run, told)
    print(told, flush=True)
    if refused := _requeue():
        told = f"{in_words(failure)}; scontrol requeue failed ({refused}), the same command goes on"
        undo_requeue(run, told)
        print(told, flush=True)


def tell_mlflow(run: Run) -> None:
    """Send the reason after the metrics: rank 0 has sent these with what it saw itself, if at all."""
    tracking = run.read_config()["tracking"]
    if tracking["kind"] == "none":
        return
    command = [sys.executable, "-m", "atlas.cli", "sync", str(run.path)]
    try:
        subprocess.run(command, timeout=float(tracking["wait_s"]), stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        print(f"MLflow could not be reached; later: atlas sync {run.path}", flush=True)


def _srun_says(log: Path) -> str | None:
    """srun's word on the first task that ended badly in this attempt, as `n1: task 1: Killed`."""
    latest = log.read_text(errors="replace").rpartition("Starting with JobEnvironment")[2]
    found = re.search(r"^srun: error: (\S+: tasks? .*)$", latest, re.MULTILINE)
    return found and found[1]


def _record(run: Run, kind: str, words: str, told: Mapping[str, Any] | None) -> dict[str, Any]:
    """A record in the place of one that only tells of a peer, or of none."""
    found = re.match(r"(\S+): tasks? (\d+)", words)
    return {
        "kind": kind,
        "rank": int(found[2]) if found else None,
        "host": found[1] if found else "unknown",
        "step": told["step"] if told else run.read_status().step,
        "state": State.FAILED,
        "reason": f"{kind}: {words}",
        "message": words,
        "traceback": "",
        "time": told["time"] if told else run.read_status().updated,
    }


def _requeue() -> str | None:
    """Put this job back into the queue, which ends it here; what was refused, if it was."""
    command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode <= 0 or _is_requeued():  # below 0: ended with this job
        return None
    return sentence(done.stderr) or f"exit code {done.returncode}"


def _is_requeued() -> bool:
    """Whether Slurm has put this job back by itself, as it does for a lost node."""
    try:
        return job_state(str(job_id())) in ("PENDING", "COMPLETING", "REQUEUED")
    except AtlasError:
        return False


def _read_note(file: Path) -> Any:
    """What `note_attempt` wrote, None where nobody has: the ranks can fail before the submitter has."""
    deadline = time.monotonic() + NOTE_S
    while not file.exists():
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)
    return json.loads(file.read_text())


def _note_file(folder: Path, job: str) -> Path:
    return folder / f"{job}_attempt.json"
