"""The lock of a run's directory, with real processes that hold it, die and race."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from commands import unnamed

from atlas.errors import RunBusyError
from atlas.run import lock as module
from atlas.run.lock import STALE_S, Holder, Lock
from atlas.system.files import write_json

ROOT = Path(__file__).resolve().parents[2]
# Takes the lock, says so, and then does what its input says, a line at a time.
HOLD = """
import sys, time
from pathlib import Path
from atlas.errors import RunBusyError
from atlas.run.lock import Lock
lock = Lock(Path(sys.argv[1]))
while len(sys.argv) > 2 and not Path(sys.argv[2]).exists():
    time.sleep(0.001)
def report(act):
    try:
        act()
    except RunBusyError as error:
        print(error, flush=True)
    else:
        print("ok", flush=True)
report(lock.acquire)
for line in sys.stdin:
    report(getattr(lock, line.strip()))
"""
Holding = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "name" / "0123456789"
    folder.mkdir(parents=True)
    return folder / "lock.json"


@pytest.fixture
def process(path: Path) -> Iterator[Holding]:
    """Starts a process that takes the lock; `said` reads what came of it."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path), *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def said(child: subprocess.Popen[str], command: str = "") -> str:
    """What `child` answers to `command`, or what came of its `acquire`."""
    assert child.stdin and child.stdout
    if command:
        child.stdin.write(command + "\n")
        child.stdin.flush()
    return child.stdout.readline().strip()


def write_holder(path: Path, age: float = 0.0, **changes: object) -> None:
    """A lock file of somebody else, whose last heartbeat is `age` seconds ago."""
    write_json(path, {**asdict(Holder.me()), "token": "theirs", **changes})
    os.utime(path, (time.time() - age, time.time() - age))


def test_second_process_is_refused_by_host_and_pid(path, process):
    first = process()
    assert said(first) == "ok"
    holder = (first.pid, socket.gethostname(), path.parent)
    assert unnamed(said(process()), *holder) == []
    assert said(first, "require_mine") == "ok"
    with pytest.raises(RunBusyError) as refused:
        Lock(path).acquire()
    assert unnamed(str(refused.value), *holder) == []


def test_released_lock_can_be_taken(path, process):
    first = process()
    assert said(first) == "ok" and said(first, "release") == "ok"
    assert not path.exists()
    assert said(process()) == "ok"


def test_killed_holder_is_taken_over(path, process):
    first = process()
    assert said(first) == "ok"
    first.kill()
    first.wait()
    assert path.exists()  # it had no time to clean up
    assert Lock(path).live_holder() is None
    assert said(process()) == "ok"


def test_killed_holder_that_nobody_has_waited_for_is_taken_over(path, process):
    first = process()
    assert said(first) == "ok"
    first.kill()
    deadline = time.monotonic() + 5
    while Lock(path).live_holder() and time.monotonic() < deadline:
        time.sleep(0.01)  # a zombie from now on
    Lock(path).acquire()


def test_reused_pid_is_not_the_holder(path):
    write_holder(path, started=Holder.me().started - 1)  # this pid, as it was before
    lock = Lock(path)
    lock.acquire()
    assert lock.is_mine()
    lock.release()


def test_own_process_does_not_get_it_twice(path):
    first, second = Lock(path), Lock(path)
    first.acquire()
    with pytest.raises(RunBusyError):
        second.acquire()
    second.release()  # never held: nothing happens
    first.require_mine()
    first.release()


@pytest.mark.parametrize(
    ("age", "taken"), [(0, False), (STALE_S - 10, False), (STALE_S + 1, True), (86400, True)]
)
def test_other_host_is_judged_by_its_heartbeat(path, age, taken):
    write_holder(path, age, host="node-17", pid=4242)
    lock = Lock(path)
    if not taken:
        with pytest.raises(RunBusyError) as refused:
            lock.acquire()
        assert unnamed(str(refused.value), 4242, "node-17", path.parent) == []
        assert json.loads(path.read_text())["token"] == "theirs"
    else:
        lock.acquire()
        lock.require_mine()
        lock.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "x"}', "null"])
def test_what_no_atlas_wrote_is_no_holder(path, text):
    path.write_text(text)
    lock = Lock(path)
    lock.acquire()
    assert lock.is_mine()
    lock.release()


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}, False),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        (
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"},
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
            False,
        ),
        (
            {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"},
            {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "1"},
            False,
        ),
        ({}, {"SLURM_RESTART_COUNT": "1"}, False),
    ],
)
def test_a_requeued_job_takes_over_from_its_previous_attempt(path, process, first, second, taken):
    old = process(**first)
    assert said(old) == "ok"
    new = process(**second)
    answer = said(new)
    if not taken:
        assert unnamed(answer, old.pid, path.parent) == []
        assert said(old, "require_mine") == "ok"
        return
    assert answer == "ok"
    assert unnamed(said(old, "require_mine"), new.pid, path.parent) == []  # its next save raises
    assert said(old, "release") == "ok"  # and leaves alone what is not its own
    assert said(new, "require_mine") == "ok"


def test_a_lock_that_is_gone_is_noticed(path):
    lock = Lock(path)
    lock.acquire()
    path.unlink()
    with pytest.raises(RunBusyError) as lost:
        lock.require_mine()
    assert unnamed(str(lost.value), path.parent) == [] and not path.exists()
    assert unnamed(str(lost.value), os.getpid()) != []  # nobody has it, not even its first holder


@pytest.mark.parametrize("before", ["nobody", "a dead process"])
def test_of_eight_that_race_exactly_one_wins(path, process, before):
    if before == "a dead process":
        write_holder(path, started=1)
    go = path.with_name("go")
    racers = [process(str(go)) for _ in range(8)]
    time.sleep(0.5)  # most of them wait by now; the rest come late, which must not matter
    go.touch()
    answers = [said(racer) for racer in racers]
    assert answers.count("ok") == 1
    winner = racers[answers.index("ok")]
    assert sum(unnamed(answer, winner.pid, path.parent) == [] for answer in answers) == 7
    assert said(winner, "require_mine") == "ok"


def test_heart_beats_until_the_lock_is_given_back_or_lost(path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.01)

    def beats() -> bool:
        os.utime(path, (0, 0))
        time.sleep(0.2)
        return path.stat().st_mtime > 0

    lock = Lock(path)
    lock.acquire()
    assert beats() and lock.age() < 5
    write_holder(path, pid=1, host="node-17")
    assert not beats()  # it is not its own any more
    lock.release()
    assert path.exists()
