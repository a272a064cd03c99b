"""The tracker: what is on the disk after each call, in the order that a kill relies on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atlas.config.schema import TrackingSettings
from atlas.errors import RunBusyError
from atlas.record import tracker as tracking
from atlas.record.tracker import NullTracker, RunTracker, Tracker
from atlas.run.directory import Run
from atlas.run.lock import Lock
from atlas.run.provenance import Provenance
from atlas.run.status import State


class FakeShipper:
    """Notes the calls; `finish` sees the files as a real shipper would."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.starts = 0
        self.problem: str | None = None
        self.waited: float | None = None
        self.seen: dict[str, Any] = {}

    def start(self) -> None:
        self.starts += 1

    def warning(self) -> str | None:
        return self.problem

    def finish(self, timeout_s: float | None = None) -> str | None:
        self.waited = timeout_s
        self.seen = json.loads(self.run.status_file.read_text())
        self.run.mlflow_file.write_text(json.dumps({"run_id": "abc"}))
        return "2 points are missing"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = configuration(tmp_path)
    run = Run.locate(config, 1)
    run.create(config, 1, Provenance.collect([]))
    return run


@pytest.fixture
def lock(run: Run) -> Any:
    lock = run.lock
    lock.acquire()
    yield lock
    lock.release()


@pytest.fixture
def shipper(run: Run, monkeypatch: pytest.MonkeyPatch) -> FakeShipper:
    fake = FakeShipper(run)
    monkeypatch.setattr(tracking, "open_shipper", lambda run, settings: fake)
    return fake


def configuration(outputs: Path) -> dict[str, Any]:
    return {
        "name": "demo",
        "outputs": str(outputs),
        "data": {"batch_size": 8},
        "trainer": {"steps": 100, "accumulate": 1},
        "tracking": {"kind": "mlflow", "log_best": False, "wait_s": 7},
    }


def opened(run: Run, lock: Lock, log_samples: bool = True) -> RunTracker:
    tracking = TrackingSettings.of(run.read_config())
    return RunTracker(run, lock, tracking, log_samples)


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in found]


def test_flush_puts_the_journal_and_the_samples_on_the_disk(run, lock, shipper):
    tracker = opened(run, lock)
    tracker.resume(0)
    tracker.log(0, {"train/loss": 0.5})
    tracker.log_samples(0, [3, 1, 4])
    assert run.journal_file.read_text() == "" and not run.samples_file.exists()
    tracker.flush()
    assert lines(run.journal_file) == [{"step": 0, "train/loss": 0.5}]
    assert lines(run.samples_file) == [{"step": 0, "ids": [3, 1, 4]}]
    tracker.flush()
    assert len(lines(run.samples_file)) == 1


def test_the_status_holds_the_last_value_of_every_metric(run, lock, shipper):
    tracker = opened(run, lock)
    tracker.log(0, {"train/loss": 0.5, "val/loss": 0.75})
    tracker.log(1, {"train/loss": 0.25})
    tracker.update_status(step=2, best=None)
    status = json.loads(run.status_file.read_text())
    assert status["last"] == {"train/loss": 0.25, "val/loss": 0.75} and status["step"] == 2
    assert len(lines(run.journal_file)) == 2  # never behind the status


def test_samples_are_recorded_on_request_only(run, lock, shipper):
    tracker = opened(run, lock, log_samples=False)
    tracker.log_samples(0, [1])
    tracker.flush()
    assert not run.samples_file.exists()


def test_a_resumed_run_records_each_step_once(run, lock, shipper):
    tracker = opened(run, lock)
    for step in range(6):
        tracker.log(step, {"train/loss": 1.0 / (step + 1)})
        tracker.log_samples(step, [step])
    tracker.flush()
    with open(run.samples_file, "a") as file:
        file.write('{"step": 6, "i')  # killed here
    again = opened(run, lock)
    again.resume(4)
    assert [line["step"] for line in lines(run.samples_file)] == [0, 1, 2, 3]
    for step in range(4, 8):
        again.log(step, {"train/loss": 1.0 / (step + 1)})
        again.log_samples(step, [step])
    again.flush()
    assert [line["step"] for line in lines(run.journal_file)] == list(range(8))
    assert [line["step"] for line in lines(run.samples_file)] == list(range(8))


def test_the_shipper_starts_with_the_first_line(run, lock, shipper):
    tracker = opened(run, lock)
    tracker.resume(0)
    assert shipper.starts == 0
    tracker.log(0, {"train/loss": 0.5})
    tracker.log(1, {"train/loss": 0.5})
    assert shipper.starts == 1


def test_a_problem_of_the_server_is_reported_once(run, lock, shipper):
    tracker = opened(run, lock)
    found = []
    for problem in (None, "down", "down", None, "down", "slow"):
        shipper.problem = problem
        found.append(tracker.warning())
    assert found == [None, "down", None, None, "down", "slow"]


@pytest.mark.parametrize(
    ("state", "wait_s"), [("finished", 7.0), ("failed", 7.0), ("preempted", 5.0)]
)
def test_close_records_the_end_before_it_waits_for_the_shipper(run, lock, shipper, state, wait_s):
    tracker = opened(run, lock)
    tracker.log(0, {"train/loss": 0.5})
    assert tracker.close(State(state), "because", step=1) == "2 points are missing"
    assert (shipper.seen["state"], shipper.seen["reason"]) == (state, "because")
    assert shipper.waited == wait_s
    status = json.loads(run.status_file.read_text())
    assert status["mlflow_run_id"] == "abc" and status["step"] == 1
    assert len(lines(run.journal_file)) == 1


@pytest.mark.parametrize("call", ["flush", "update_status"])
def test_a_run_that_was_taken_over_is_not_written(run, lock, shipper, call):
    tracker = opened(run, lock)
    tracker.log(0, {"train/loss": 0.5})
    before = run.status_file.read_text()
    record = json.loads(lock.path.read_text())
    lock.path.write_text(json.dumps({**record, "token": "another"}))
    with pytest.raises(RunBusyError):
        getattr(tracker, call)()
    assert run.journal_file.read_text() == "" and run.status_file.read_text() == before


def test_the_null_tracker_has_every_call_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker: Tracker = NullTracker()
    tracker.resume(0)
    tracker.log(0, {"train/loss": 0.5})
    tracker.log_samples(0, [1])
    tracker.update_status(step=1)
    tracker.flush()
    assert tracker.warning() is None and tracker.close(State.FINISHED, None) is None
    assert list(tmp_path.iterdir()) == []
