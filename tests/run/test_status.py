"""The verbs of a run's life: what each writes from each state, and what a snapshot makes of old files."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from atlas.errors import AtlasError
from atlas.run import status
from atlas.run.directory import Run
from atlas.run.status import State, Status


@pytest.fixture
def run(tmp_path) -> Run:
    (tmp_path / "logs").mkdir()
    return Run(tmp_path)


def stored(run: Run) -> dict[str, Any]:
    return json.loads(run.status_file.read_text())


def given(run: Run, **fields: Any) -> None:
    run.status_file.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("state", "over", "stopped"),
    [
        ("queued", False, False),
        ("running", False, False),
        ("preempted", True, True),
        ("finished", True, False),
        ("failed", True, False),
        ("killed", True, True),
    ],
)
def test_claims(state, over, stopped):
    assert (State(state).is_over, State(state).is_stopped) == (over, stopped)
    assert f"{State(state)}" == str(State(state)) == json.loads(json.dumps(State(state))) == state


# (the verb, what it writes, whether the failure record of an earlier attempt goes)
VERBS: dict[str, tuple[Callable[[Run], None], dict[str, Any], bool]] = {
    "queue": (
        lambda run: status.queue(run, "slurm", "12_3"),
        {"state": "queued", "reason": None, "job_id": "12_3", "launcher": "slurm", "pid": None},
        True,
    ),
    "begin": (
        lambda run: status.begin(run, "12"),
        {
            **{"state": "running", "reason": None, "world_size": 4, "launcher": "torchrun"},
            **{"job_id": "12", "pid": os.getpid(), "host": socket.gethostname()},
        },
        False,
    ),
    "end": (
        lambda run: status.end(run, State.FINISHED, None, best={"step": 7}),
        {"state": "finished", "reason": None, "best": {"step": 7}},
        False,
    ),
    "stop": (
        lambda run: status.stop(run, "time limit"),
        {"state": "preempted", "reason": "time limit"},
        False,
    ),
    "requeue": (
        lambda run: status.requeue(run, "crash"),
        {"state": "queued", "reason": "crash"},
        True,
    ),
    "undo_requeue": (
        lambda run: status.undo_requeue(run, "refused"),
        {"state": "failed", "reason": "refused"},
        False,
    ),
    "end_if_running": (
        lambda run: status.end_if_running(run, State.FAILED, "crash"),
        {"state": "failed", "reason": "crash"},
        False,
    ),
}


def restarted(verb: str, before: State | None) -> int:
    """By how much `verb` changes the number of restarts of a run in state `before`."""
    if verb in ("queue", "begin"):  # the job that was queued is the attempt that begins
        return int(before not in (None, State.QUEUED))
    return {"requeue": 1, "undo_requeue": -1}.get(verb, 0)


@pytest.mark.parametrize("before", [None, *State])
@pytest.mark.parametrize("verb", VERBS)
def test_what_a_verb_writes_from_each_state(run, monkeypatch, before, verb):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ATLAS_LAUNCHER", "torchrun")
    earlier = {"state": before, "reason": "earlier", "restarts": 2, "step": 7, "job_id": "9"}
    if before:
        given(run, **earlier)
    run.failure_file.write_text("{}")
    act, written, is_record_removed = VERBS[verb]
    act(run)
    assert run.failure_file.exists() != is_record_removed
    if verb == "end_if_running" and before is not State.RUNNING:
        assert run.status_file.exists() == bool(before)
        assert not before or stored(run) == earlier
        return
    found = stored(run)
    assert found.pop("updated") > 0
    kept = {**earlier, "restarts": 2} if before else {}
    assert found.pop("restarts", 0) == kept.pop("restarts", 0) + restarted(verb, before)
    assert found == {**kept, **written}


def test_an_attempt_counts_once(run):
    given(run, state="running", restarts=1)
    status.requeue(run, "crash; back in the queue")
    status.begin(run, "12")
    assert stored(run)["restarts"] == 2
    status.requeue(run, "crash; back in the queue")
    status.undo_requeue(run, "refused")
    assert (stored(run)["state"], stored(run)["restarts"]) == ("failed", 2)
    status.queue(run, "slurm", "13")
    status.begin(run, "13")
    assert stored(run)["restarts"] == 3


def test_fields_of_another_version_survive(run):
    given(run, state="queued", paused_by="somebody")
    status.begin(run, None)
    assert stored(run)["paused_by"] == "somebody"
    assert run.read_status().state is State.RUNNING


def test_fields_that_an_older_version_did_not_write_have_defaults(run):
    given(run, id="0123456789", state="finished", step=24, best=None, last=None, restarts=None)
    found = run.read_status()
    assert found == Status(id="0123456789", state=State.FINISHED, step=24)
    assert (found.last, found.restarts, found.mlflow_run_id) == ({}, 0, None)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_an_emptied_file_is_as_none(run, text):
    run.status_file.write_text(text)
    assert run.read_status() == Status() and run.judge_state() is None


def test_a_state_of_a_newer_version(run):
    given(run, state="paused")
    with pytest.raises(AtlasError, match="paused"):
        run.read_status()


def test_running_without_a_holder_was_killed(run):
    given(run, state="running")
    assert run.judge_state() is State.KILLED
    run.lock.acquire()
    assert run.judge_state() is State.RUNNING
    run.lock.release()
    assert stored(run)["state"] == "running"
