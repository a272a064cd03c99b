"""The process that writes a run, as the process that sends its journal sees it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from atlas.run.directory import Run

PARENT = "ATLAS_SYNC_PARENT"  # in a shipper's environment: the process whose run it sends
NICENESS = 19  # training goes first, where both want the processor
# Enough for a last batch and the final state before Slurm follows its SIGTERM with SIGKILL (30 s).
TERM_GRACE_S = 25.0
# Importing mlflow takes a second of CPU: a run's first step goes first, if it comes this soon.
HEAD_START_S = 5.0

END = signal.SIGURG  # to a shipper: the run ended. Nobody else sends this one
IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
HANDLED = (*IGNORED, signal.SIGTERM, END)


class Writer:
    """The process that writes the run, seen from its shipper: is it still there, and the wait.

    That is who holds the run's lock now; under a `Shipper` it is the parent process, whose END is
    heard too.
    """

    def __init__(self, run: Run | None) -> None:
        self._run = run
        self._parent = int(os.environ.get(PARENT, 0))
        self._holder = run.lock.live_holder() if run else None
        self._ended = threading.Event()
        self._expires = float("inf")
        if self._parent:
            self._listen()

    @property
    def is_parent(self) -> bool:
        """Whether this process was started for one run's sake alone."""
        return bool(self._parent)

    def gone(self) -> bool:
        """Whether nothing more will be written by the process that is followed."""
        if self._parent and (self._ended.is_set() or os.getppid() != self._parent):
            return True
        if self._run is None or (self._parent and self._holder is None):
            return False  # a pool, or a run that was started without the lock
        holder = self._run.lock.live_holder()
        return holder is None or holder != self._holder

    def expired(self) -> bool:
        """Whether this process was asked to end and has had its time."""
        return time.monotonic() > self._expires

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond the news that the run ended."""
        if self._ended.is_set():
            time.sleep(seconds)
        else:
            self._ended.wait(seconds)

    def wait_for_first_line(self) -> None:
        """Leave the processor to a run's first step, for a few seconds."""
        until = time.monotonic() + HEAD_START_S
        assert self._run is not None
        while time.monotonic() < until and not self.gone() and not _size(self._run.journal_file):
            self.wait(0.1)

    def _listen(self) -> None:
        for signum in IGNORED:  # Slurm sends them to every process of a step
            signal.signal(signum, signal.SIG_IGN)
        signal.signal(END, self._on_end)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def _on_end(self, signum: int, frame: FrameType | None) -> None:
        self._ended.set()
        with contextlib.suppress(OSError, AttributeError):  # where it is allowed: no more waiting
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

    def _on_term(self, signum: int, frame: FrameType | None) -> None:
        self._expires = min(self._expires, time.monotonic() + TERM_GRACE_S)


def step_back() -> None:
    """Run behind training, and out of the reach of what is meant for its process group.

    Not in a session of its own: Linux gives every session an equal share of the processor
    (autogroup), and niceness counts only inside one.
    """
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
        if hasattr(os, "SCHED_IDLE"):
            # Niceness alone still takes a fifth of a step's time on a machine without a free core.
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
