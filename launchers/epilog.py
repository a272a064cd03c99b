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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atlas.lock import guarded, job_id, replace
from atlas.reasons import CRASH, MEMORY, may_retry, summary
from atlas.run import Run
from launchers.squeue import QUERY_S, sentence

# How gloo and NCCL say that another rank is gone.
PEER_GONE = ("closed by peer", "reset by peer", "Broken pipe", "remote process", "watchdog")
SYNC_S = 300.0  # to tell MLflow the reason


def note_attempt(run: Run, folder: Path) -> None:
    """Rank 0's first act: which run this job trains, and how far it was saved before."""
    replace(_attempt_file(folder), json.dumps({"run": str(run.path), "saved": run.saved}))


def trap(python: str, folder: Path) -> str:
    """The line of a batch script that has this module run where the ranks have failed.

    Not where they have finished (0) or were stopped (75): rank 0 has seen to that.
    """
    command = shlex.join([python, "-m", "launchers.epilog", str(folder)])
    # A function, since a path in quotes cannot stand within a trap's.
    return f"atlas_epilog() {{ case $1 in 0|75) ;; *) {command} ;; esac; exit $1; }}; trap 'atlas_epilog $?' EXIT"


def main(folder: Path) -> None:
    """Record why the ranks of this job have failed, and requeue the job where that may help."""
    try:
        attempt = json.loads(_attempt_file(folder).read_text())
    except FileNotFoundError:
        return  # no rank got as far as Atlas; Slurm's own words are in the log
    run = Run(attempt["run"])
    with guarded(run.path.parent):
        if run.status.get("job_id") != job_id():
            return  # sent again in the meantime: it is another job's
        failure = first_failure(run, folder / f"{job_id()}_0_log.out")
        print(summary(failure), flush=True)
        again = may_retry(failure["kind"], run.saved > attempt["saved"])
        settle(run, failure, again)
    if not again:
        tell_mlflow(run)


def first_failure(run: Run, log: Path) -> dict[str, Any]:
    """The record of the first rank to fail, which it wrote itself if it could.

    A rank that is killed cannot. The others only see that it is gone; srun says which, and how.
    """
    told = run.failure
    if told and not any(word in told["reason"] for word in PEER_GONE):
        return told
    words = _srun_says(log)
    if words is None:
        return told or _record(run, CRASH, "no rank has said why", None)
    killed = re.search(r"Killed|Out Of Memory", words) is not None
    reason = words + ("; the machine is likely to be out of memory" if killed else "")
    return _record(run, MEMORY if killed else CRASH, reason, told)


def settle(run: Run, failure: Mapping[str, Any], again: bool) -> None:
    """Leave the reason in the run's records, and requeue this job if it is to go on."""
    replace(run.failure_file, json.dumps(failure))
    where = f"rank {failure['rank']} on {failure['host']}: " if failure["rank"] else ""
    reason = f"{where}{failure['reason']}"
    if not again:
        run.update_status(state="failed", reason=reason)
        return
    restarts = int(run.status.get("restarts", 0)) + 1
    told = f"{reason}; {run.saved} updates are saved, so the job is back in the queue"
    run.update_status(state="queued", reason=told, restarts=restarts)
    print(told, flush=True)
    if refused := _requeue():
        told = f"{reason}; scontrol requeue failed ({refused}), the same command goes on"
        run.update_status(state="failed", reason=told, restarts=restarts - 1)
        print(told, flush=True)


def tell_mlflow(run: Run) -> None:
    """Send the reason after the metrics: rank 0 has sent these with what it saw itself, if at all."""
    if run.config["tracking"]["kind"] == "none":
        return
    command = [sys.executable, "-m", "atlas.cli", "sync", str(run.path)]
    try:
        subprocess.run(command, timeout=SYNC_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        print(f"MLflow could not be reached; later: atlas sync {run.path}", flush=True)


def _srun_says(log: Path) -> str | None:
    """srun's word on the first task that ended badly in this attempt, as `n1: task 1: Killed`."""
    attempt = log.read_text(errors="replace").rpartition("Starting with JobEnvironment")[2]
    found = re.search(r"^srun: error: (\S+: tasks? .*)$", attempt, re.MULTILINE)
    return found and found[1]


def _record(run: Run, kind: str, words: str, told: Mapping[str, Any] | None) -> dict[str, Any]:
    """A record in the place of one that only tells of a peer, or of none."""
    found = re.match(r"(\S+): tasks? (\d+)", words)
    return {
        "kind": kind,
        "rank": int(found[2]) if found else None,
        "host": found[1] if found else "unknown",
        "step": told["step"] if told else run.status.get("step"),
        "state": "failed",
        "reason": f"{kind}: {words}",
        "message": words,
        "traceback": "",
        "time": told["time"] if told else run.status.get("updated"),
    }


def _requeue() -> str | None:
    """Put this job back into the queue, which ends it here; what was refused, if it was."""
    command = ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return sentence(done.stderr) or f"exit code {done.returncode}" if done.returncode else None


def _attempt_file(folder: Path) -> Path:
    return folder / f"{job_id()}_attempt.json"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
