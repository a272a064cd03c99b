"""The verbs of a run's life: what each writes from each state, and what a snapshot makes of old files."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("before", [None, *State])
@pytest.mark.parametrize("verb", ["queue", "begin", "end_if_running"])
def test_what_a_verb_writes_from_each_state(run, monkeypatch, before, verb):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ATLAS_LAUNCHER", "torchrun")
    if before:
        given(run, state=before, reason="earlier", restarts=2, step=7)
    run.failure_file.write_text("{}")
    again = before not in (None, State.QUEUED)
    if verb == "queue":
        status.queue(run, "slurm", "12_3")
        expected = {"state": "queued", "reason": None, "job_id": "12_3", "launcher": "slurm"}
        assert not run.failure_file.exists()
    elif verb == "begin":
        status.begin(run, "12")
        expected = {"state": "running", "reason": None, "world_size": 4, "launcher": "torchrun"}
    else:
        status.end_if_running(run, State.FAILED, "crash")
        if before is not State.RUNNING:
            assert run.read_status().reason == ("earlier" if before else None)
            return
        expected, again = {"state": "failed", "reason": "crash"}, False
    found = stored(run)
    assert {key: found[key] for key in expected} == expected
    assert found.get("restarts", 0) == (2 if before else 0) + again
    assert found.get("step") == (7 if before else None)


def test_a_requeue_counts_and_its_refusal_does_not(run):
    given(run, state="running", restarts=1)
    status.requeue(run, "crash; back in the queue")
    assert (stored(run)["state"], stored(run)["restarts"]) == ("queued", 2)
    status.undo_requeue(run, "refused")
    assert (stored(run)["state"], stored(run)["restarts"]) == ("failed", 1)


def test_stop_and_end(run):
    status.stop(run, "time limit")
    assert run.read_status() == Status.parse({**stored(run), "state": "preempted"})
    status.end(run, State.FINISHED, None, step=12, best={"step": 8})
    assert (stored(run)["state"], stored(run)["step"], stored(run)["best"]) == (
        *("finished", 12),
        {"step": 8},
    )


def test_fields_of_another_version_survive(run):
    given(run, state="queued", paused_by="somebody")
    status.begin(run, None)
    assert stored(run)["paused_by"] == "somebody"
    assert run.read_status().state is State.RUNNING


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
