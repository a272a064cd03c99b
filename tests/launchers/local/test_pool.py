"""Slots, order and signals of a pool, with cheap processes as ranks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cheap_ranks import fork, leave, make_run, obey, wait_for

from atlas.run.directory import Run
from launchers.local import pool
from launchers.local.pool import Pool, Slot, recorded_signals
from launchers.local.ranks import Ranks


def runs_in(folder: Path, count: int) -> list[Run]:
    return [make_run(folder / f"run{number}") for number in range(count)]


def ignore(run: Run, code: int) -> None:
    pass


@pytest.mark.parametrize(
    ("slots", "codes"),
    [
        ([None], [0, 0, 0]),
        ([None, None], [0, 1, 75, 0]),
        ([["0"], ["1"]], [0, 0, 0, 0]),
        ([["0", "1"], ["2", "3"], ["4", "5"]], [1, 0]),
        ([None], []),
    ],
)
def test_every_run_ends_in_a_slot_of_its_own(tmp_path, slots, codes):
    used: list[Slot] = []
    free = list(slots)
    runs = runs_in(tmp_path, len(codes))
    ended: list[tuple[str, int]] = []

    def start(run: Run, slot: Slot) -> Ranks:
        free.remove(slot)  # fails if another run has it
        used.append(slot)
        return Ranks(run, [fork(leave, codes[runs.index(run)], 0.05)])

    def on_end(run: Run, code: int) -> None:
        free.append(used[runs.index(run)])
        ended.append((run.id, code))

    assert Pool(start, slots).run(runs, on_end) == codes
    assert sorted(ended) == [(run.id, code) for run, code in zip(runs, codes, strict=True)]


def test_as_many_runs_at_once_as_slots(tmp_path):
    started: list[str] = []
    runs = runs_in(tmp_path, 4)
    blocked = {run: tmp_path / f"{run.id}.ready" for run in runs}

    def start(run: Run, slot: Slot) -> Ranks:
        started.append(run.id)
        return Ranks(run, [fork(obey, blocked[run], {signal.SIGTERM: 75})])

    def stop() -> None:
        wait_for(blocked[runs[0]], blocked[runs[1]])
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    # A stop ends the two that run, and the others are not started.
    assert Pool(start, [None, None]).run(runs, ignore) == [75] * 4
    assert started == ["run0", "run1"]


def interrupt(ready: Path, number: int, times: int) -> Callable[[], None]:
    def send() -> None:
        wait_for(ready)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.4)  # two of one kind at once count as one

    return send


@pytest.mark.parametrize(
    ("number", "times", "codes", "code", "killed"),
    [
        (signal.SIGINT, 1, {signal.SIGINT: 75}, 75, False),
        (signal.SIGTERM, 1, {signal.SIGTERM: 75}, 75, False),
        (signal.SIGUSR2, 1, {signal.SIGUSR2: 75}, 75, False),
        (signal.SIGHUP, 1, {signal.SIGHUP: 75}, 75, False),
        # A rank that no signal moves is killed after a second Ctrl-C, and only then.
        (signal.SIGINT, 2, {}, 1, True),
    ],
)
def test_signals_are_forwarded(tmp_path, monkeypatch, number, times, codes, code, killed):
    monkeypatch.setattr(pool, "ABORT_S", 0.2)
    ready, (run,) = tmp_path / "ready", runs_in(tmp_path, 1)
    before = signal.getsignal(number)
    processes = []

    def start(run: Run, slot: Slot) -> Ranks:
        processes.append(fork(obey, ready, codes))
        return Ranks(run, processes)

    threading.Thread(target=interrupt(ready, number, times)).start()
    assert Pool(start, [None]).run([run], ignore) == [code]
    assert (processes[0].exitcode == -signal.SIGKILL) == killed
    assert signal.getsignal(number) == before


def test_signals_of_a_forked_child_are_its_own():
    with recorded_signals() as signals:
        child = fork(lambda: (os.kill(os.getpid(), signal.SIGTERM), os._exit(len(signals))))
        child.join()
        assert child.exitcode == 0  # its handler is inherited, and records nothing
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals == [signal.SIGTERM]


def test_a_sighup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with recorded_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals == []
    finally:
        signal.signal(signal.SIGHUP, before)
