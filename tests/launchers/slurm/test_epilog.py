"""What a failed job makes of its run, whatever the moment at which the ranks have failed."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from commands import unnamed

from atlas.run.directory import Run
from launchers.slurm import epilog

JOB = "7"
CRASH = {"kind": "crash", "rank": 1, "host": "n1", "step": 9, "state": "failed"}
CRASH |= {"reason": "crash: OSError: torn", "message": "torn", "traceback": ""}
GONE = CRASH | {"rank": 0, "reason": "crash: RuntimeError: Connection closed by peer"}
NAN = CRASH | {"kind": "NaN", "rank": 0, "reason": "NaN: loss"}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job's environment and a `scontrol` that notes what it is told; gives what it noted."""
    shims, told = tmp_path / "shims", tmp_path / "told"
    shims.mkdir()
    (shims / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {told}\nexit ${{REFUSED:-0}}\n')
    (shims / "squeue").write_text(f'#!/bin/sh\n[ -z "$STATE" ] || echo "{JOB}|$STATE|x"\n')
    for program in shims.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(shims), prepend=":")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    return told


def failed_job(
    folder: Path, state: str, saved: int, failure: dict[str, Any] | None, attempt: int, log: str
) -> Run:
    """A run whose ranks have just ended, that had 4 updates saved before attempt `attempt`."""
    run = Run(folder / "run")
    run.logs.mkdir(parents=True)
    run.config_file.write_text("tracking: {kind: none, log_best: false, wait_s: 60}\n")
    run.update_status(state=state, job_id=JOB, restarts=1, step=saved, reason=None)
    (run.checkpoints / "00000004").mkdir(parents=True)
    epilog.note_attempt(run, run.path, JOB, attempt)
    (run.checkpoints / f"{saved:08d}").mkdir(exist_ok=True)
    if failure:
        run.failure_file.write_text(json.dumps(failure | {"time": 0}))
    (run.path / f"{JOB}_0_log.out").write_text(f"Starting with JobEnvironment\n{log}\n")
    return run


KILL, FAULT = "n1: task 1: Killed", "n1: task 0: Segmentation fault"  # srun's words
KILLED, SEGFAULT = f"srun: error: {KILL}", f"srun: error: {FAULT}"


@pytest.mark.parametrize(
    "state, saved, failure, attempt, log, left, named, requeued",
    [
        ("failed", 8, CRASH, 1, "", "queued", ["1", "n1", "crash: OSError: torn", "8"], True),
        ("running", 8, CRASH, 1, "", "queued", ["8"], True),
        ("failed", 4, CRASH, 1, "", "failed", ["1", "n1", "crash: OSError: torn"], False),
        ("failed", 8, NAN, 1, "", "failed", ["NaN: loss"], False),
        ("failed", 8, GONE, 1, SEGFAULT, "queued", ["crash", FAULT, "8"], True),
        ("failed", 8, GONE, 1, KILLED, "failed", ["out of memory", KILL], False),
        ("running", 8, None, 1, "", "queued", ["crash", "8"], True),
        # Rank 0 had not begun: nothing that was saved is of this attempt.
        ("queued", 8, None, 0, SEGFAULT, "failed", ["crash", FAULT], False),
        # The job is at work again, on another node.
        ("running", 8, CRASH, 2, "", "running", None, False),
        ("finished", 8, None, 1, SEGFAULT, "finished", None, False),
        ("killed", 8, None, 1, SEGFAULT, "killed", None, False),
        ("preempted", 8, None, 1, KILLED, "queued", ["preempted", "8"], True),
    ],
)
def test_what_becomes_of_the_run(
    tmp_path, slurm, monkeypatch, state, saved, failure, attempt, log, left, named, requeued
):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run = failed_job(tmp_path, state, saved, failure, attempt, log)
    epilog.main(run.path)
    assert run.read_status().state == left
    assert (run.read_status().reason is None) == (named is None)
    assert unnamed(run.read_status().reason or "", *(named or ())) == []
    assert slurm.exists() == requeued
    assert run.read_status().restarts == 1 + requeued
    assert run.failure_file.exists() == (left == "failed" or (not requeued and bool(failure)))


def test_a_requeue_that_is_refused(tmp_path, slurm, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("REFUSED", "1")
    run = failed_job(tmp_path, "failed", 8, CRASH, 1, "")
    epilog.main(run.path)
    assert run.read_status().state == "failed" and run.read_status().restarts == 1
    assert unnamed(run.read_status().reason, "scontrol requeue", CRASH["reason"]) == []
    assert slurm.read_text().split() == ["requeue", JOB]


def test_a_preempted_run_that_rank_0_has_requeued(tmp_path, slurm, monkeypatch):
    monkeypatch.setenv("STATE", "COMPLETING")
    run = failed_job(tmp_path, "preempted", 8, None, 0, KILLED)
    epilog.main(run.path)
    assert run.read_status().state == "preempted" and not slurm.exists()


def test_ranks_that_fail_before_the_submitter_has_told_of_them(
    tmp_path, slurm, monkeypatch, capsys
):
    run = failed_job(tmp_path, "queued", 4, CRASH, 0, "")
    note = run.path / f"{JOB}_attempt.json"
    late = note.rename(tmp_path / "late")
    monkeypatch.setattr(epilog, "NOTE_S", 0)
    epilog.main(run.path)
    assert run.read_status().state == "queued" and unnamed(capsys.readouterr().out, JOB) == []
    assert not slurm.exists()
    monkeypatch.setattr(epilog, "NOTE_S", 60)
    Timer(0.3, late.rename, [note]).start()
    epilog.main(run.path)
    assert run.read_status().state == "failed"


def test_a_run_that_was_sent_again_is_left_alone(tmp_path, slurm):
    run = failed_job(tmp_path, "failed", 8, CRASH, 0, "")
    run.update_status(state="queued", job_id="8")
    epilog.main(run.path)
    assert run.read_status().state == "queued" and not slurm.exists()
