"""Signals that ask a run to save and stop, turned into a flag that is read between steps.

A signal handler runs between any two bytecodes: in the middle of an update, of a collective or of a
checkpoint. Nothing can be saved there, so the handler only sets a flag. The trainer reads it once an
update, agrees with the other ranks (`atlas.training.ranks.agreement`), saves and leaves with exit code
75. The one exception is a wait for data, which can take minutes: `Stop.wait` is left at once by
`StopWaiting`, since nothing of the next update has begun then.

Four signals are heard:

- SIGUSR2: preemption, or the time limit of a Slurm job. Saved, then requeued.
- SIGTERM: scancel, `timeout`, a node that shuts down. Saved, not requeued.
- SIGINT: Ctrl-C. The first one saves; the second one aborts, and the last checkpoint remains valid.
- SIGHUP: the terminal was closed. Saved. Under `nohup` it is ignored, as the user asked for.

SIGUSR1 is left at its default, which ends the process: Slurm's and other tools' use of it differs from
place to place, and nothing in Atlas sends it.

Terminals, Slurm and `timeout` signal every process of a group, so data workers too. They are forked
from the rank and inherit its handler, which therefore does nothing in a process with another pid; then
they ignore these signals (`atlas.training.feeding.workers`), since the rank needs them to finish its
step. Ranks that a launcher started get Ctrl-C from the launcher, once, since they are in process groups
of their own.

Python lets only the main thread install handlers. In another thread `Stop` never asks to stop.
"""

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
LONGEST_S = 1e9  # 30 years; the operating system refuses a timer that is much longer

# What a stop means, by signal: the state that the run is left in, and the reason in words.
STATES = {
    signal.SIGUSR2: (State.PREEMPTED, "preempted (SIGUSR2)"),
    signal.SIGTERM: (State.KILLED, "stopped by SIGTERM"),
    signal.SIGINT: (State.KILLED, "stopped by Ctrl-C"),
    signal.SIGHUP: (State.KILLED, "stopped by SIGHUP: the terminal was closed"),
}
STOP_SIGNALS = tuple(STATES)
# Ranks that saw different signals agree on the last of them in this order.
CODES = (None, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def signals_to_handle() -> list[signal.Signals]:
    """Return the stop signals, without a SIGHUP that `nohup` has set to be ignored."""
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (nohup and number == signal.SIGHUP)]


class StopWaiting(BaseException):
    """A stop was asked for during a wait for data; no `except Exception` of a data set catches it."""


class Stop:
    """A context in which a stop signal only sets `signal`; a second Ctrl-C aborts."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._waiting = self._expired = False
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in signals_to_handle():
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

    def limit_waiting(self, seconds: float) -> None:
        """Make `wait` give up once `seconds` from now have passed."""
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._expire)
            signal.setitimer(signal.ITIMER_REAL, min(seconds, LONGEST_S))

    def wait(self, get: Callable[[], T]) -> T:
        """Return `get()`; raise `StopWaiting` as soon as a stop is asked for."""
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
            return  # a data worker, see above
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if number == signal.SIGINT and "ATLAS_SUPERVISED" not in os.environ:
            message = "\nstopping after this step and saving; Ctrl-C again aborts\n"
            with contextlib.suppress(OSError):  # a terminal that is closed
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
        if self._waiting:
            raise StopWaiting
