"""Requests to stop by signal: what is noted, what is interrupted, and in which process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from atlas.run.signals import (
    CODES,
    STATES,
    STOP_SIGNALS,
    Stop,
    StopWaiting,
    signals_to_handle,
)
from atlas.run.status import State

SIGNALS = [pytest.param(number, id=number.name) for number in STOP_SIGNALS]


@pytest.fixture(autouse=True)
def handlers(monkeypatch) -> Iterator[None]:
    """Every signal has its default at first, and the test process survives what a test forgets."""
    monkeypatch.delenv("ATLAS_SUPERVISED", raising=False)
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGALRM)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_are_restored(number):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert (stop.signal, stop.code) == (None, 0)
        send(number)
        assert stop.signal is number and CODES[stop.code] is number
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before


def test_every_signal_has_a_state_and_a_place_in_the_order():
    assert set(CODES) == {None, *STATES} and CODES[0] is None
    preempted = [number for number, (state, _) in STATES.items() if state is State.PREEMPTED]
    assert preempted == [signal.SIGUSR2]
    assert {state for state, _ in STATES.values()} == {State.PREEMPTED, State.KILLED}


@pytest.mark.parametrize(
    ("numbers", "aborts"),
    [
        ([signal.SIGINT], False),
        ([signal.SIGINT, signal.SIGINT], True),
        ([signal.SIGTERM, signal.SIGTERM], False),
        ([signal.SIGTERM, signal.SIGINT], False),
        ([signal.SIGINT, signal.SIGTERM], False),
        ([signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGINT], True),
    ],
)
def test_only_a_second_ctrl_c_aborts(numbers, aborts):
    with Stop() as stop:
        *first, last = numbers
        for number in first:
            send(number)
        if aborts:
            with pytest.raises(KeyboardInterrupt):
                send(last)
        else:
            send(last)
            assert stop.signal is last


@pytest.mark.parametrize(("supervised", "lines"), [(False, 1), (True, 0)])
def test_ctrl_c_is_answered_on_the_terminal_once(monkeypatch, capfd, supervised, lines):
    if supervised:  # the launcher answers for all of its ranks
        monkeypatch.setenv("ATLAS_SUPERVISED", "1")
    with Stop():
        send(signal.SIGINT)
    assert capfd.readouterr().err.count("Ctrl-C") == lines


def test_nohup_keeps_its_sighup():
    assert signal.SIGHUP in signals_to_handle()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert set(STOP_SIGNALS) - set(signals_to_handle()) == {signal.SIGHUP}
    with Stop() as stop:
        send(signal.SIGHUP)
        assert stop.signal is None


@pytest.mark.parametrize("number", SIGNALS)
def test_a_wait_for_data_is_interrupted(number):
    def blocked() -> None:
        try:
            send(number)
            time.sleep(10)
        except Exception:
            pytest.fail("a data set's own `except` has caught the request")

    with Stop() as stop:
        with pytest.raises(StopWaiting):
            stop.wait(blocked)
        with pytest.raises(StopWaiting):  # and the next one does not begin
            stop.wait(lambda: pytest.fail("not to be called"))


def test_a_wait_returns_and_raises_what_it_waits_for():
    def fails() -> None:
        raise OSError("torn")

    with Stop() as stop:
        assert stop.wait(lambda: 7) == 7
        with pytest.raises(OSError, match="torn"):
            stop.wait(fails)
        send(signal.SIGTERM)  # no wait is left to interrupt
        assert stop.signal is signal.SIGTERM


def test_a_deadline_interrupts_waits_and_nothing_else():
    with Stop() as stop:
        stop.limit_waiting(0.05)
        with pytest.raises(StopWaiting):
            stop.wait(lambda: time.sleep(10))
        assert stop.signal is None
        with pytest.raises(StopWaiting):
            stop.wait(lambda: pytest.fail("not to be called"))
    with Stop() as stop:
        stop.limit_waiting(0.05)
        time.sleep(0.1)


def test_a_deadline_ends_with_the_context_and_may_be_far_away():
    with Stop() as stop:
        stop.limit_waiting(1e12)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 1e8
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_forked_process_takes_no_notice():
    with Stop() as stop:
        child = os.fork()
        if child == 0:
            for number in (signal.SIGINT, *STOP_SIGNALS):
                send(number)
            os._exit(0 if stop.signal is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_another_thread_installs_nothing():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    seen: list[object] = []

    def enter() -> None:
        with Stop() as stop:
            stop.limit_waiting(1)
            seen.extend(signal.getsignal(number) for number in STOP_SIGNALS)
            seen.append(stop.wait(lambda: 7))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [*before, 7]
