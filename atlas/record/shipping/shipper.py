"""The handle on the process that sends runs to MLflow, for the process that trains or launches.

Nothing here imports mlflow: a shipper is started, the small file that it writes is read, and at the
end it is waited for. How it learns that its runs have ended is described in `writer.py`.
"""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from atlas.config.schema import TrackingSettings
from atlas.record.shipping.cursor import Cursor
from atlas.record.shipping.writer import END, HANDLED, PARENT
from atlas.run.directory import Run
from atlas.version import ROOT

SHIPPED_BY_POOL = "ATLAS_FLEET"  # in a rank's environment: its pool has one shipper for all runs
WARN_EVERY_S = 1.0
REPORT_WAIT_S = 5.0
NAMED_RUNS = 3  # in a message


class Shipper(abc.ABC):
    """Sends runs to MLflow while they grow; training neither waits for it nor fails with it.

    shipper = open_shipper(run, settings.tracking)
    shipper.start()            # with the lock of the run held
    print(shipper.warning())   # at any time
    print(shipper.finish(60))  # the journal is closed and the status holds the final state
    """

    @abc.abstractmethod
    def start(self) -> None:
        """Start sending. A problem is a warning, never an error."""

    @abc.abstractmethod
    def warning(self) -> str | None:
        """Return what the user should know now, or None; cheap enough to be called every step."""

    @abc.abstractmethod
    def finish(self, timeout_s: float | None = None) -> str | None:
        """Report the end and wait until all is sent, at most `timeout_s` (None: `tracking.wait_s`).

        Return a sentence for the user if something is missing in MLflow.
        """


class NullShipper(Shipper):
    """Sends nothing: a pool has one shipper for all of its runs."""

    def start(self) -> None:
        """Do nothing."""

    def warning(self) -> str | None:
        """Return None."""
        return None

    def finish(self, timeout_s: float | None = None) -> str | None:
        """Return None."""
        return None


class ReportShipper(NullShipper):
    """Sends nothing (tracking=none), and draws the report at the end."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def finish(self, timeout_s: float | None = None) -> str | None:
        """Draw the report in a process of its own; wait for it for at most 5 s."""
        with contextlib.suppress(OSError):
            child = _spawn([self._run])
            wait_s = REPORT_WAIT_S if timeout_s is None else min(timeout_s, REPORT_WAIT_S)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(wait_s)
        return None


class ProcessShipper(Shipper):
    """Sends one run or all runs of a pool by one process: mlflow is imported once.

    `runs` are those that the process looks after, `tracked` those of them that go to MLflow; of the
    others it draws the report. Reports alone are not waited for.
    """

    def __init__(
        self, runs: Sequence[Run], wait_s: float = 60.0, tracked: Sequence[Run] | None = None
    ) -> None:
        self._runs = runs
        self._tracked = runs if tracked is None else tracked
        self._wait_s = wait_s if self._tracked else 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._problem: str | None = None
        self._started = self._asked = 0.0
        self._refused = 0

    @property
    def log(self) -> Path:
        """The file with what the process reports."""
        return _log(self._runs)

    def start(self) -> None:
        """Start the process. If that fails, it is a warning."""
        self._started = time.time()
        self._refused = sum(cursor.refused for cursor in self._cursors())
        try:
            self._child = _spawn(self._runs, "--follow")
        except OSError as error:
            self._problem = f"the process that sends metrics could not be started: {error}"

    def warning(self) -> str | None:
        """Return what the user should know now, or None; at most one look at the files a second."""
        now = time.monotonic()
        if now - self._asked > WARN_EVERY_S:
            self._asked = now
            self._problem = self._look() if self._child else self._problem
        return self._problem and (
            f"{self._problem}; training continues, metrics.jsonl keeps the points"
        )

    def finish(self, timeout_s: float | None = None) -> str | None:
        """Send END and wait until all is sent, at most `timeout_s`.

        If the process still makes progress at the timeout, it is left running. One that can't is
        ended, which is safe at any moment: what was sent twice is stored once.
        """
        child, self._child = self._child, None
        wait_s = self._wait_s if timeout_s is None else timeout_s
        is_sending = child is not None and not _has_finished(child, wait_s)
        cursors = {run: Cursor.load(run) for run in self._tracked}
        left = {run: cursor.points_left(run) for run, cursor in cursors.items()}
        if child and is_sending and _is_stuck(cursors, left):
            child.kill()
            child.wait()
            is_sending = False
        return self._missing(cursors, left, is_sending)

    def _cursors(self) -> list[Cursor]:
        return [Cursor.load(run) for run in self._tracked]

    def _look(self) -> str | None:
        for cursor in self._cursors():
            if cursor.error and cursor.updated >= self._started:
                return f"MLflow at {cursor.uri} can't be used: {cursor.error}"
        if self._child and self._child.poll() is not None:
            return f"the process that sends metrics ended early, see {self.log}"
        return None

    def _missing(
        self, cursors: Mapping[Run, Cursor], left: Mapping[Run, int], is_sending: bool
    ) -> str | None:
        """Return what MLflow does not have, why, and the command that sends it."""
        behind = [run for run, cursor in cursors.items() if left[run] or cursor.error]
        of = "this run" if len(self._runs) == 1 else "these runs"
        total = sum(left.values())
        if total and is_sending:
            return (
                f"{total:,} points of {of} are still being sent to MLflow, in the background; "
                f"`{_command(behind)}` sends what is missing"
            )
        if behind:
            errors = (cursor.error for cursor in cursors.values() if cursor.error)
            why = next(errors, self._problem or f"see {self.log}")
            return (
                f"{total:,} points of {of} are not in MLflow ({why}); "
                f"send them with `{_command(behind)}`"
            )
        refused = sum(cursor.refused for cursor in cursors.values()) - self._refused
        if refused > 0:
            reasons = (cursor.refusal for cursor in cursors.values() if cursor.refusal)
            return (
                f"MLflow refused {refused:,} points of {of} for good ({next(reasons, '?')}); "
                "metrics.jsonl has them"
            )
        return None


def open_shipper(run: Run, tracking: TrackingSettings) -> Shipper:
    """Return the shipper that `tracking` asks for; it is not started."""
    if SHIPPED_BY_POOL in os.environ:
        return NullShipper()
    return ProcessShipper([run], tracking.wait_s) if tracking.is_on else ReportShipper(run)


def open_pool_shipper(runs: Sequence[Run]) -> ProcessShipper:
    """Return the one shipper of a pool; runs that start after it leave their shipping to it."""
    settings = {run: TrackingSettings.of(run.read_config()) for run in runs}
    tracked = [run for run, tracking in settings.items() if tracking.is_on]
    return ProcessShipper(runs, max(each.wait_s for each in settings.values()), tracked)


def _is_stuck(cursors: Mapping[Run, Cursor], left: Mapping[Run, int]) -> bool:
    """Return whether the store fails for every run of which something is missing."""
    failing = {run for run, cursor in cursors.items() if cursor.error}
    return bool(failing) and failing >= {run for run, points in left.items() if points}


def _command(runs: Sequence[Run]) -> str:
    """Return the command that sends `runs`, of which it names the first few."""
    paths = [str(run.path) for run in runs[:NAMED_RUNS]]
    return " ".join(["atlas sync", *paths, *(["…"] if len(runs) > NAMED_RUNS else [])])


def _has_finished(child: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Send END to the shipper and return whether it ended in time."""
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(END)
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _log(runs: Sequence[Run]) -> Path:
    folder = runs[0].logs if len(runs) == 1 else runs[0].path.parent
    return folder / "sync.log"


def _spawn(runs: Sequence[Run], *options: str) -> subprocess.Popen[bytes]:
    """Start `atlas sync` on `runs`.

    What a follower handles is blocked until it has its handlers: a signal to all processes of a job
    must not end it before that, and an END that comes at once must not be lost.
    """
    file = _log(runs)
    file.parent.mkdir(exist_ok=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED if "--follow" in options else ())
    try:
        with open(file, "ab") as log:
            paths = [str(run.path) for run in runs]
            return subprocess.Popen(
                [sys.executable, "-m", "atlas.cli", "sync", *options, *paths],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                close_fds=True,
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment() -> dict[str, str]:
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        PARENT: str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONSAFEPATH": "1",  # a user's yaml.py in the working directory must not be imported
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }
