"""Many runs on one machine: as many at once as there are slots, each on devices of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import FrameType

from atlas.errors import EXIT_STOPPED
from atlas.run.directory import Run
from atlas.run.signals import signals_to_handle
from launchers.local.ranks import Ranks

POLL_S = 0.1  # the longest that a signal waits to be forwarded
ABORT_S = 3.0  # how long ranks may take to end after a second Ctrl-C, before they are killed

Slot = Sequence[str] | None  # the GPUs of one run by name, or None on the CPU


@dataclass(frozen=True)
class Active:
    """A run that is being trained."""

    index: int
    run: Run
    slot: Slot
    ranks: Ranks


class Pool:
    """Runs started with `start(run, slot)`, as many at the same time as there are `slots`.

    The first stop signal asks every run to save and stop, and no other run is started. A second
    Ctrl-C aborts: ranks that have not ended `ABORT_S` later are killed.
    """

    def __init__(self, start: Callable[[Run, Slot], Ranks], slots: Sequence[Slot]) -> None:
        self._start = start
        self._free = list(slots)
        self._active: list[Active] = []
        self._is_stopping = False
        self._interrupts = 0
        self._kill_at = float("inf")

    def run(self, runs: Sequence[Run], on_end: Callable[[Run, int], None]) -> list[int]:
        """Run all of `runs` and return their exit codes in order; call `on_end` after each.

        A run that was not started, because of a stop signal, has the code of one that was stopped.
        """
        codes = [EXIT_STOPPED] * len(runs)
        waiting = list(enumerate(runs))
        with recorded_signals() as signals:
            while self._active or (waiting and not self._is_stopping):
                while waiting and self._free and not self._is_stopping:
                    self._start_in_slot(*waiting.pop(0))
                wait([s for active in self._active for s in active.ranks.sentinels], POLL_S)
                self._forward(signals)
                for active, code in self._ended():
                    codes[active.index] = code
                    on_end(active.run, code)
        return codes

    def _start_in_slot(self, index: int, run: Run) -> None:
        slot = self._free.pop(0)
        self._active.append(Active(index, run, slot, self._start(run, slot)))

    def _forward(self, signals: list[int]) -> None:
        """Send every rank the recorded `signals`, and kill those that an abort did not end."""
        while signals:
            number = signals.pop(0)
            self._is_stopping = True
            self._interrupts += number == signal.SIGINT
            if self._interrupts == 2:
                self._kill_at = time.monotonic() + ABORT_S
            self._signal_all(number)
        if time.monotonic() > self._kill_at:
            self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        for active in self._active:
            active.ranks.signal(number)

    def _ended(self) -> Iterator[tuple[Active, int]]:
        """Yield the runs that have ended with their exit codes, and free their slots."""
        for active in list(self._active):
            code = active.ranks.poll()
            if code is not None:
                self._active.remove(active)
                self._free.append(active.slot)
                yield active, code


@contextlib.contextmanager
def recorded_signals() -> Iterator[list[int]]:
    """Record the signals that stop a run in a list, instead of obeying them.

    Ranks must get each signal exactly once: a second Ctrl-C means abort. A terminal sends Ctrl-C to
    every process of its foreground group, and Slurm and `timeout` signal whole process groups, so
    ranks would get it from there and again from the launcher. Therefore every rank is in a process
    group of its own (`ranks.enter`), and only the launcher hears what comes from outside and
    forwards it. It forwards in `Pool.run` and not in the handler, which can run in the middle of
    starting a rank: that rank would be missed.
    """
    signals: list[int] = []
    pid = os.getpid()

    def record(number: int, _: FrameType | None) -> None:
        if os.getpid() != pid:
            return  # a child that was just forked and still has this handler
        signals.append(number)
        if number == signal.SIGINT:
            print("\nstopping and saving; Ctrl-C again aborts", file=sys.stderr)

    before = {number: signal.signal(number, record) for number in signals_to_handle()}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
