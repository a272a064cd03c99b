"""Signals that ask a run to save and leave, turned into a flag that is read between steps."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from atlas.run.status import State

T = TypeVar("T")
LONGEST_S = 1e9  # of a timer of the operating system; 30 years

# What a stop means, by signal: the state that the run is left in, and the words for it.
STATES = {
    signal.SIGUSR2: (State.PREEMPTED, "preempted (SIGUSR2)"),
    signal.SIGTERM: (State.KILLED, "stopped by SIGTERM"),
    signal.SIGINT: (State.KILLED, "stopped by Ctrl-C"),
    signal.SIGHUP: (State.KILLED, "stopped by SIGHUP: the terminal was closed"),
}
ASKED = tuple(STATES)
# The order in which ranks that saw different signals agree; see `atlas.training.ranks.agreement`.
CODES = (None, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def heeded() -> list[signal.Signals]:
    """The signals to listen to: all of the above, but for a SIGHUP that `nohup` has had ignored."""
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in ASKED if not (nohup and number == signal.SIGHUP)]


class StopWaiting(BaseException):
    """A stop was asked for while data was waited for; no data set's own `except` catches it."""


class Stop:
    """A context in which the signals above only set `signal`; a second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._waiting = self._expired = False
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in heeded():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def code(self) -> int:
        """The request as a number that ranks can compare: 0 for none."""
        return CODES.index(self.signal)

    def wait_no_longer_than(self, seconds: float) -> None:
        """Have `wait` give up from so many seconds from now on."""
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._expire)
            signal.setitimer(signal.ITIMER_REAL, min(seconds, LONGEST_S))

    def wait(self, get: Callable[[], T]) -> T:
        """`get()`, given up with `StopWaiting` as soon as a stop is asked for."""
        self._waiting = True
        try:
            if self.signal or self._expired:
                raise StopWaiting
            return get()
        finally:
            self._waiting = False

    def _expire(self, _number: int, _: FrameType | None) -> None:
        self._expired = True
        if self._waiting:
            raise StopWaiting

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked data worker inherits the handler; the signal is not for it
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if number == signal.SIGINT and "ATLAS_SUPERVISED" not in os.environ:
            message = "\nstopping after this step and saving; Ctrl-C again leaves at once\n"
            with contextlib.suppress(OSError):  # a terminal that is closed
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
        if self._waiting:
            raise StopWaiting
