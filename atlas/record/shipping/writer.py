"""The processes that a shipper watches: the one that started it, and those that write its runs.

A shipper is a process of its own, so that training neither waits for MLflow nor loses points with
it: a rank that is killed cannot send what it has recorded, and its shipper still can. So a shipper
has to learn in three ways that a run has ended:

- END, a signal from the process that started it. That process then waits for it, a while.
- That process is gone (another parent now): killed, together with the chance to send END.
- The lock of the run has no live holder, or another one: the run was killed, or a requeued job has
  taken it over. In a pool this is also how each of the runs ends, long before the pool does.

The shipper then sends what the journal still has, and the state of the run, and ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType

from atlas.errors import AtlasError
from atlas.record import journal
from atlas.run.directory import Run
from atlas.system.files import try_lock

PARENT = "ATLAS_SYNC_PARENT"  # in a shipper's environment: the process whose runs it sends
NICENESS = 19  # training goes first where both want the processor
# Enough for a last batch and the final state before Slurm follows its SIGTERM with SIGKILL (30 s).
TERM_GRACE_S = 25.0
# Importing mlflow takes a second of CPU: the first step of a run goes first, if it comes this soon.
HEAD_START_S = 5.0
BUSY_WAIT_S = 60.0

END = signal.SIGURG  # to a shipper: its runs have ended. Nothing else sends this one
IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
HANDLED = (*IGNORED, signal.SIGTERM, END)


class Parent:
    """The process that started this one to send its runs; a user's shell is not one.

    With `listen` its signals are handled: END, and SIGTERM, after which a shipper has a while to
    finish. What asks the processes of a job to stop (Ctrl-C, Slurm) is for training and is ignored:
    the shipper ends with its runs, after it has sent their last points.
    """

    def __init__(self, listen: bool) -> None:
        self._pid = int(os.environ.get(PARENT, 0)) if listen else 0
        self._ended = threading.Event()
        self._expires = float("inf")
        if self._pid:
            self._listen()

    @property
    def exists(self) -> bool:
        """Whether a process started this one to follow its runs."""
        return bool(self._pid)

    def has_ended(self) -> bool:
        """Return whether the parent has sent END or is gone."""
        return self.exists and (self._ended.is_set() or os.getppid() != self._pid)

    def is_expired(self) -> bool:
        """Return whether this process was asked to terminate and has used its time."""
        return time.monotonic() > self._expires

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until END arrives."""
        if self._ended.is_set():
            time.sleep(seconds)
        else:
            self._ended.wait(seconds)

    def _listen(self) -> None:
        for signum in IGNORED:  # Slurm sends them to every process of a step
            signal.signal(signum, signal.SIG_IGN)
        signal.signal(END, self._on_end)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def _on_end(self, signum: int, frame: FrameType | None) -> None:
        self._ended.set()
        with contextlib.suppress(OSError, AttributeError):  # if allowed: the parent waits now
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

    def _on_term(self, signum: int, frame: FrameType | None) -> None:
        self._expires = min(self._expires, time.monotonic() + TERM_GRACE_S)


class Writer:
    """The process that writes a run: whoever holds its lock, now or as the first from now on."""

    def __init__(self, run: Run, parent: Parent) -> None:
        self._run = run
        self._parent = parent
        self._holder = run.lock.live_holder()
        self._updated = run.read_status().updated

    def has_ended(self) -> bool:
        """Return whether this process will write nothing more, so that what is there is all.

        A run of a pool waits for its place without a holder, and may have a final state from an
        earlier attempt. One that was too short to be seen with its lock has ended when its status
        was written again and names a final state.
        """
        if self._parent.has_ended():
            return True
        holder = self._run.lock.live_holder()
        self._holder = self._holder or holder
        if self._holder:
            return holder != self._holder
        return not self._parent.exists or self._has_new_end()

    def _has_new_end(self) -> bool:
        state = self._run.judge_state()
        is_new = self._run.read_status().updated != self._updated
        return is_new and state is not None and state.is_over


class SyncLock:
    """Held by the process that sends a run: `.sync.lock` in its directory."""

    def __init__(self, run: Run, parent: Parent) -> None:
        self._run = run
        self._waits_for_run = parent.exists
        self._deadline = time.monotonic() + BUSY_WAIT_S
        self._file = open(run.path / ".sync.lock", "a+")  # noqa: SIM115 (open until release)

    def acquire(self, is_over: bool) -> bool:
        """Take the lock and return True, or return False: then try again later.

        A shipper waits for the previous one as long as its own run lives (`is_over` is False), and
        everybody for a minute more. A user's sync does not wait for one that follows a living run:
        that raises `AtlasError`.
        """
        if try_lock(self._file):
            self._file.truncate(0)
            self._file.write(f"{os.getpid()}\n")
            self._file.flush()
            return True
        if self._waits_for_run and not is_over:
            self._deadline = time.monotonic() + BUSY_WAIT_S
        elif time.monotonic() > self._deadline or self._is_followed():
            raise AtlasError(self.busy())
        return False

    def release(self) -> None:
        """Give the lock back."""
        self._file.close()

    def busy(self) -> str:
        """Return that another process sends the run, and which."""
        self._file.seek(0)
        return (
            f"run {self._run.id} is being sent to MLflow already, by process "
            f"{self._file.read().strip() or '?'}; see {self._run.logs / 'sync.log'}"
        )

    def _is_followed(self) -> bool:
        return not self._waits_for_run and self._run.lock.live_holder() is not None


def step_back() -> None:
    """Run behind training, and out of reach of what is meant for its process group.

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


def wait_for_first_line(runs: Sequence[Run], parent: Parent) -> None:
    """Leave the processor to the first step of the first run, for a few seconds."""
    deadline = time.monotonic() + HEAD_START_S
    while time.monotonic() < deadline and not parent.has_ended():
        if any(journal.size(run.journal_file) for run in runs):
            return
        parent.wait(0.1)
