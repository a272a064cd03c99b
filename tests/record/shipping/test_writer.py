"""What a shipper knows of the processes around it: when a run has ended, and who sends it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from atlas.errors import AtlasError
from atlas.record.shipping import writer
from atlas.record.shipping.writer import END, PARENT, Parent, SyncLock, Writer, wait_for_first_line
from atlas.run.directory import Run
from atlas.run.lock import Holder
from atlas.run.provenance import Provenance


def make_run(outputs: Path, seed: int = 1) -> Run:
    config = {
        "name": "demo",
        "outputs": str(outputs),
        "seed": seed,
        "data": {"batch_size": 8},
        "trainer": {"steps": 100, "accumulate": 1},
    }
    run = Run.locate(config, 1)
    run.create(config, 1, Provenance.collect([]))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path)


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Parent:
    """A parent that is alive, without a handler of its signals in the process of the tests."""
    monkeypatch.setattr(Parent, "_listen", lambda self: None)
    monkeypatch.setenv(PARENT, str(os.getppid()))
    return Parent(listen=True)


NOBODY = Parent(listen=False)


def hold(run: Run, token: str = "first") -> None:
    """Write a lock whose holder is alive: this process."""
    run.lock.path.write_text(json.dumps(asdict(replace(Holder.me(), token=token))))


def let_go(run: Run) -> None:
    run.lock.path.unlink()


def kill(run: Run) -> None:
    """Write a lock whose holder is dead: a process of this number that started at another time."""
    run.lock.path.write_text(json.dumps(asdict(replace(Holder.me(), started=1))))


def say(state: str) -> Callable[[Run], None]:
    def write(run: Run) -> None:
        time.sleep(0.002)  # the time in the status has milliseconds
        run.update_status(state=state)

    return write


def take_over(run: Run) -> None:
    hold(run, "second")


def nothing(run: Run) -> None:
    pass


# What has happened when the shipper starts, what happens then, and whether the run has ended.
WRITERS = {
    "waits for its place": ((nothing,), (nothing,), False),
    "waits, after an earlier attempt": ((say("failed"),), (nothing,), False),
    "runs": ((hold, say("running")), (nothing,), False),
    "begins later": ((nothing,), (hold, say("running")), False),
    "begins again later": ((say("failed"),), (hold, say("running")), False),
    "released the lock": ((hold, say("running")), (say("finished"), let_go), True),
    "recorded its end, and still has the lock": ((hold,), (say("finished"),), False),
    "was killed": ((hold, say("running")), (kill,), True),
    "was taken over by a requeued job": ((hold, say("running")), (take_over,), True),
    "was too short to be seen with its lock": ((nothing,), (say("finished"),), True),
    "failed again before it had the lock": ((say("failed"),), (say("failed"),), True),
    "ended a moment before": ((say("finished"),), (nothing,), False),  # the parent sends END
}


@pytest.mark.parametrize("case", WRITERS)
def test_when_the_run_of_a_parent_has_ended(run: Run, parent: Parent, case: str) -> None:
    before, then, has_ended = WRITERS[case]
    for act in before:
        act(run)
    watched = Writer(run, parent)
    assert not watched.has_ended()
    for act in then:
        act(run)
        ended = watched.has_ended()
    assert ended is has_ended


@pytest.mark.parametrize(
    ("before", "then", "has_ended"),
    [(nothing, nothing, True), (hold, nothing, False), (hold, let_go, True), (kill, nothing, True)],
)
def test_a_user_follows_a_run_as_long_as_it_is_written(
    run: Run,
    before: Callable[[Run], None],
    then: Callable[[Run], None],
    has_ended: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(PARENT, raising=False)
    before(run)
    watched = Writer(run, Parent(listen=True))
    then(run)
    assert watched.has_ended() is has_ended


def test_every_run_has_ended_after_END_or_with_the_parent(
    run: Run, parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(run)
    watched = Writer(run, parent)
    assert not watched.has_ended()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getppid", lambda: 1)  # adopted: the parent is gone
        assert watched.has_ended()
    assert not watched.has_ended()
    parent._on_end(END, None)
    assert watched.has_ended()


def test_END_wakes_a_shipper(parent: Parent) -> None:
    timer = threading.Timer(0.05, parent._on_end, (END, None))
    timer.start()
    parent.wait(60)
    timer.join()
    began = time.monotonic()
    parent.wait(0.05)  # once awake it sleeps between its tries
    assert time.monotonic() - began >= 0.05


def test_a_shipper_that_is_terminated_has_a_while(
    parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not parent.is_expired()
    monkeypatch.setattr(writer, "TERM_GRACE_S", 0.05)
    parent._on_term(signal.SIGTERM, None)
    assert not parent.is_expired()
    monkeypatch.setattr(writer, "TERM_GRACE_S", 1e6)
    parent._on_term(signal.SIGTERM, None)  # a second one gives no more time
    time.sleep(0.06)
    assert parent.is_expired()


def test_only_a_follower_has_a_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENT, str(os.getppid()))
    once = Parent(listen=False)
    assert not once.exists and not once.has_ended()
    assert signal.getsignal(END) is signal.SIG_DFL


def test_the_first_step_goes_first(
    tmp_path: Path, parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run(tmp_path, seed) for seed in (1, 2)]
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            runs[1].journal_file.write_text('{"step": 0}\n')

    monkeypatch.setattr(parent, "wait", wait)
    wait_for_first_line(runs, parent)
    assert len(waits) == 3
    wait_for_first_line(runs, parent)
    assert len(waits) == 3
    runs[1].journal_file.unlink()
    monkeypatch.setattr(writer, "HEAD_START_S", 0.01)
    monkeypatch.setattr(parent, "wait", time.sleep)
    wait_for_first_line(runs, parent)


# Whether a parent's shipper asks, is its run over, is the run written, is a minute over: and what.
LOCKS = {
    "the previous shipper still sends": (True, False, True, False, "wait"),
    "for longer than a minute": (True, False, True, True, "wait"),
    "and the run is over": (True, True, False, False, "wait"),
    "and the run is over for a minute": (True, True, False, True, "refuse"),
    "a user, while another sync runs": (False, True, False, False, "wait"),
    "a user, while another sync runs for a minute": (False, True, False, True, "refuse"),
    "a user, while a shipper follows": (False, True, True, False, "refuse"),
}


@pytest.mark.parametrize("case", LOCKS)
def test_one_process_sends_a_run(
    run: Run, parent: Parent, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    has_parent, is_over, is_written, is_late, expected = LOCKS[case]
    if is_written:
        hold(run)
    first = SyncLock(run, NOBODY)
    assert first.acquire(is_over=True)
    monkeypatch.setattr(writer, "BUSY_WAIT_S", -1.0 if is_late else 60.0)
    second = SyncLock(run, parent if has_parent else NOBODY)
    if expected == "refuse":
        with pytest.raises(AtlasError) as refused:
            second.acquire(is_over)
        assert run.id in str(refused.value) and f"process {os.getpid()};" in str(refused.value)
    else:
        assert not second.acquire(is_over)
    first.release()
    assert second.acquire(is_over)
    second.release()
