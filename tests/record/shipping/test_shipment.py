"""The loop of shipping against a store in memory: what arrives after every kind of failure."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from atlas.errors import AtlasError
from atlas.record.shipping import shipment as shipping
from atlas.record.shipping import sync as syncing
from atlas.record.shipping.cursor import Cursor, Shipped
from atlas.record.shipping.shipment import Shipment
from atlas.record.shipping.sync import Drawn, sync
from atlas.record.shipping.writer import END, PARENT, Parent, SyncLock
from atlas.run.directory import Run
from atlas.run.lock import Lock
from atlas.run.provenance import Provenance

Point = tuple[str, int, int, float]
FEW = 25


class Killed(BaseException):
    """Ends a shipper at this place, as SIGKILL would: nothing catches it."""


class Memory:
    """A store as MLflow is one: a point is stored once, however often it is sent."""

    def __init__(self) -> None:
        self.points: dict[Point, None] = {}
        self.batches: list[int] = []
        self.states: list[str] = []
        self.fault: Callable[[], str] = lambda: ""

    def open_store(self, uri: str, artifacts: str | None) -> Memory:
        return self

    def open(self, run: Run, config: Any, cursor: Cursor, is_running: bool) -> None:
        self.states.append("opened running" if is_running else "opened")
        cursor.run_id = "abc"

    def log(self, batch: list[Any]) -> list[tuple[Any, str]]:
        fault = self.fault()
        if fault == "down":
            raise ConnectionError("[Errno 111] Connection refused")
        refused = [each for each in batch if each.key == "bad"]
        for each in batch:
            if each not in refused:
                self.points[each.key, each.step, each.timestamp, each.value] = None
        self.batches.append(len(batch))
        if fault == "answer lost":
            raise TimeoutError("Read timed out")
        if fault == "killed":
            raise Killed
        return [(each, "no") for each in refused]

    def upload_config(self, run: Run, cursor: Cursor) -> None:
        pass

    def upload(self, path: Path, cursor: Cursor) -> None:
        pass

    def close(self, run: Run, config: Any) -> None:
        self.states.append(str(run.judge_state()))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()
    monkeypatch.setattr(shipping, "Store", memory.open_store)
    monkeypatch.setattr("atlas.record.report.draw", lambda run: run.report_file)
    return memory


def make_run(outputs: Path, seed: int = 1, kind: str = "mlflow") -> Run:
    config = {
        "name": "demo",
        "outputs": str(outputs),
        "seed": seed,
        "data": {"batch_size": 8},
        "trainer": {"steps": 100, "accumulate": 1},
        "tracking": {"kind": kind, "log_best": False, "wait_s": 60},
    }
    run = Run.locate(config, 1)
    run.create(config, 1, Provenance.collect([]))
    return run


def write(run: Run, steps: range, key: str = "a") -> None:
    with open(run.journal_file, "a") as file:
        for step in steps:
            line = {"step": step, "time": 1.5 + step, key: step / 7, "b": 0.5}
            file.write(json.dumps(line) + "\n")


def in_journal(run: Run) -> list[Point]:
    lines = [json.loads(text) for text in run.journal_file.read_text().splitlines()]
    return [
        (key, line["step"], int(line["time"] * 1000), value)
        for line in lines
        for key, value in line.items()
        if key not in ("step", "time")
    ]


def opened(run: Run, again: bool = False) -> Shipment:
    return Shipment(run, again, is_expired=lambda: False)


def test_points_arrive_in_order_and_in_batches(tmp_path: Path, store: Memory) -> None:
    run = make_run(tmp_path)
    write(run, range(1700))
    result = opened(run).turn(is_over=True)
    assert result and (result.sent, result.left, result.error) == (3400, 0, None)
    assert list(store.points) == in_journal(run)
    assert store.batches == [1000, 1000, 1000, 400]
    assert Cursor.load(run).offset == run.journal_file.stat().st_size


@pytest.mark.parametrize("seed", range(8))
def test_whatever_fails_there_is_no_hole_and_no_double(
    tmp_path: Path, store: Memory, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A store that is down, an answer that is lost, a kill between the batch and the note of it."""
    monkeypatch.setattr(shipping, "BATCH", 10)
    monkeypatch.setattr(shipping, "SMALLEST_BATCH", 3)
    chance = random.Random(seed)
    store.fault = lambda: chance.choice(["", "", "", "down", "answer lost", "killed"])
    run = make_run(tmp_path)
    shipment = opened(run)
    for step in range(0, 300, 5):
        write(run, range(step, step + 5))
        try:
            shipment.turn(is_over=False)
        except Killed:
            shipment = opened(run)
        sent = len(store.points)
        assert list(store.points) == in_journal(run)[:sent]
        assert Cursor.load(run).shipped <= sent
    store.fault = lambda: ""
    assert opened(run).turn(is_over=True)
    assert list(store.points) == in_journal(run)


def test_a_store_that_fails_is_tried_a_while_after_the_end(
    tmp_path: Path, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "GIVE_UP_S", -1.0)
    run = make_run(tmp_path)
    write(run, range(FEW))
    store.fault = lambda: "down"
    shipment = opened(run)
    results = [shipment.turn(is_over=True) for _ in range(shipping.TRIES)]
    assert results[:-1] == [None] * (shipping.TRIES - 1)
    result = results[-1]
    assert result and result.left == 2 * FEW and result.error == "Connection refused"
    assert Cursor.load(run).error == "Connection refused"
    monkeypatch.setattr(shipping, "GIVE_UP_S", 1e6)
    assert [opened(run).turn(is_over=True) for _ in range(9)] == [None] * 9  # not so soon


def test_a_store_that_fails_is_asked_less_often_and_for_less(tmp_path: Path, store: Memory) -> None:
    run = make_run(tmp_path)
    write(run, range(2000))
    store.fault = lambda: "answer lost"
    shipment = opened(run)
    pauses = []
    for _ in range(6):
        assert shipment.turn(is_over=False) is None
        pauses.append(shipment.pause)
    assert pauses == [2.0, 4.0, 8.0, 10.0, 10.0, 10.0]
    assert store.batches == [1000, 500, 250, 124, 62, 50]
    store.fault = lambda: ""
    shipment.turn(is_over=False)
    assert shipment.pause == 1.0 and Cursor.load(run).error is None
    assert list(store.points) == in_journal(run)
    assert max(store.batches[6:]) == 1000


def test_a_damaged_line_and_a_refused_point_hold_up_nothing(
    tmp_path: Path, store: Memory, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    write(run, range(3))
    write(run, range(3, 5), key="bad")
    with open(run.journal_file, "a") as file:
        file.write("damaged\n")
    shipment = opened(run)
    shipment.turn(is_over=False)
    shipment.turn(is_over=False)
    assert capsys.readouterr().err.count("damaged line") == 1
    write(run, range(5, 7))
    result = shipment.turn(is_over=True)
    assert result and (result.sent, result.refused, result.left) == (12, 2, 0)
    assert Cursor.load(run).refusal == "no"


def test_what_is_left_at_the_end_of_its_time_is_for_the_next_sync(
    tmp_path: Path, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "BATCH", 10)
    run = make_run(tmp_path)
    write(run, range(FEW))
    Shipment(run, again=False, is_expired=lambda: True).turn(is_over=False)
    assert store.batches == [10] and Cursor.load(run).shipped == 10
    [result] = sync([run])
    assert isinstance(result, Shipped) and result.sent == 2 * FEW - 10
    assert list(store.points) == in_journal(run)


# --- the loop


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[Any]]:
    """The loop of a shipper; instead of waiting for its next turn it takes the next of `acts`."""
    monkeypatch.setenv(PARENT, str(os.getppid()))
    monkeypatch.setattr(Parent, "_listen", lambda self: None)
    monkeypatch.setattr(syncing, "step_back", lambda: None)
    monkeypatch.setattr(syncing, "wait_for_first_line", lambda runs, parent: None)

    def start(runs: list[Run], *acts: Callable[[Parent], None]) -> Iterator[Any]:
        left = list(acts)
        monkeypatch.setattr(Parent, "wait", lambda self, seconds: left.pop(0)(self))
        yield from sync(runs, follow=True)
        assert not left

    return start


def begin(run: Run) -> Lock:
    lock = run.lock
    lock.acquire()
    run.update_status(state="running")
    return lock


def end(run: Run, lock: Lock, state: str = "finished") -> None:
    run.update_status(state=state)
    lock.release()


def send_end(parent: Parent) -> None:
    parent._on_end(END, None)


def test_a_run_is_followed_until_its_lock_is_released(
    tmp_path: Path, store: Memory, follow: Callable[..., Iterator[Any]]
) -> None:
    run = make_run(tmp_path)
    lock = begin(run)

    def grow(parent: Parent) -> None:
        assert not store.points
        write(run, range(FEW))

    def last(parent: Parent) -> None:
        assert len(store.points) == 2 * FEW
        write(run, range(FEW, 2 * FEW))
        end(run, lock)

    [result] = follow([run], grow, last)
    assert (result.sent, result.left) == (4 * FEW, 0)
    assert store.states == ["opened running", "finished"]


def test_the_runs_of_a_pool_end_one_after_the_other(
    tmp_path: Path, store: Memory, follow: Callable[..., Iterator[Any]]
) -> None:
    """A run that waits for its place is not opened; END closes what never began."""
    first, second, third = (make_run(tmp_path, seed) for seed in (1, 2, 3))
    locks: dict[str, Lock] = {}

    def start_first(parent: Parent) -> None:
        assert store.states == []
        locks["first"] = begin(first)
        write(first, range(FEW))

    def start_second(parent: Parent) -> None:
        end(first, locks["first"])
        locks["second"] = begin(second)
        write(second, range(FEW), key="c")

    def end_second(parent: Parent) -> None:
        assert store.states == ["opened running", "finished", "opened running"]
        end(second, locks["second"], "failed")

    found = list(follow([first, second, third], start_first, start_second, end_second, send_end))
    assert [result.run for result in found] == [first.id, second.id, third.id]
    assert [result.sent for result in found] == [2 * FEW, 2 * FEW, 0]
    assert store.states[3:] == ["failed", "opened", "queued"]


def test_a_run_that_failed_before_is_followed_when_a_pool_repeats_it(
    tmp_path: Path, store: Memory, follow: Callable[..., Iterator[Any]]
) -> None:
    run, other = make_run(tmp_path), make_run(tmp_path, 2)
    write(run, range(FEW))
    run.update_status(state="failed")
    locks: dict[str, Lock] = {}

    def repeat(parent: Parent) -> None:
        locks["run"] = begin(run)

    def last(parent: Parent) -> None:
        write(run, range(FEW, 2 * FEW))
        end(run, locks["run"])

    results = list(follow([run, other], repeat, last, send_end))
    assert results[0].sent == 4 * FEW and list(store.points) == in_journal(run)
    assert store.states[:3] == ["opened", "opened running", "finished"]


def test_a_shipper_that_is_terminated_reports_what_is_left(
    tmp_path: Path, store: Memory, follow: Callable[..., Iterator[Any]]
) -> None:
    runs = [make_run(tmp_path, seed) for seed in (1, 2)]
    locks = [begin(run) for run in runs]

    def terminate(parent: Parent) -> None:
        write(runs[0], range(FEW))
        parent._expires = 0.0

    found = list(follow(runs, terminate))
    assert [(result.run, result.left) for result in found] == [
        (runs[0].id, 2 * FEW),
        (runs[1].id, 0),
    ]
    for lock in locks:
        lock.release()


def test_without_tracking_the_report_is_drawn_at_the_end(
    tmp_path: Path, store: Memory, follow: Callable[..., Iterator[Any]]
) -> None:
    tracked, untracked = make_run(tmp_path), make_run(tmp_path, 2, kind="none")
    locks = [begin(tracked), begin(untracked)]

    def end_untracked(parent: Parent) -> None:
        end(untracked, locks[1])

    def end_tracked(parent: Parent) -> None:
        end(tracked, locks[0])

    first, second = follow([tracked, untracked], end_untracked, end_tracked)
    assert isinstance(first, Drawn) and first.run is untracked and first.is_complete
    assert isinstance(second, Shipped) and second.run == tracked.id
    assert not untracked.mlflow_file.exists()


def test_a_run_that_another_process_sends_holds_up_no_other(
    tmp_path: Path, store: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:

    busy, free = make_run(tmp_path), make_run(tmp_path, 2)
    write(free, range(FEW))
    held = SyncLock(busy, Parent(listen=False))
    assert held.acquire(is_over=True)
    lock = begin(busy)
    results: list[Any] = []
    with pytest.raises(AtlasError) as refused:
        results.extend(sync([busy, free]))
    assert busy.id in str(refused.value) and store.batches == [2 * FEW]
    lock.release()
    held.release()
