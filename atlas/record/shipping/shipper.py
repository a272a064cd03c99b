"""The process that sends a run's journal to MLflow, as the process that trains sees it.

Nothing here imports mlflow: training starts a shipper, looks at the small file that it leaves, and
at the end waits for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atlas.record.shipping.cursor import Cursor, points_left
from atlas.record.shipping.writer import END, HANDLED, PARENT
from atlas.run.directory import Run
from atlas.version import ROOT

FLEET = "ATLAS_FLEET"  # in a rank's environment: its pool sends the journal
WARN_EVERY_S = 1.0
REPORT_WAIT_S = 5.0


class Shipper:
    """Sends the journal of `run` while it grows; training neither waits for it nor fails with it.

    `start` belongs after the lock is taken, `finish` after the journal is closed and the status
    holds the run's final state.
    """

    def __init__(self, run: Run, wait_s: float = 60.0) -> None:
        self.run = run
        self._wait_s = wait_s
        self._child: subprocess.Popen[bytes] | None = None
        self._problem: str | None = None
        self._started = self._asked = 0.0
        self._refused = 0

    def start(self) -> None:
        """Start the process. That it can't be started is a warning, not an error."""
        self._started = time.time()
        self._refused = Cursor.load(self.run).refused
        try:
            self._child = _spawn(self.run, "--follow")
        except OSError as error:
            self._problem = f"the process that sends metrics could not be started: {error}"

    def warning(self) -> str | None:
        """What the person should know now, or None; looks at most once a second, costs a read."""
        now = time.monotonic()
        if now - self._asked > WARN_EVERY_S:
            self._asked = now
            self._problem = self._look() if self._child else self._problem
        return (
            self._problem and f"{self._problem}; training goes on, metrics.jsonl keeps the points"
        )

    def finish(self, timeout_s: float | None = None) -> str | None:
        """Say that the run ended, wait until all is sent, at most `timeout_s` (default: wait_s).

        Returns a sentence for the person where something is missing in MLflow. A shipper that still
        gets on when the time is over is left to it; one that does not is ended.
        """
        child, self._child = self._child, None
        going_on = child is not None and not _finished(
            child, self._wait_s if timeout_s is None else timeout_s
        )
        cursor = Cursor.load(self.run)
        if child and going_on and cursor.error:
            child.kill()  # safe at any moment: what was sent twice is stored once
            child.wait()
            going_on = False
        return self._missing(cursor, going_on)

    def _look(self) -> str | None:
        cursor = Cursor.load(self.run)
        if cursor.error and cursor.updated >= self._started:
            return f"MLflow at {cursor.uri} can't be used: {cursor.error}"
        if self._child and self._child.poll() is not None:
            return f"the process that sends metrics ended early, see {self.run.logs / 'sync.log'}"
        return None

    def _missing(self, cursor: Cursor, going_on: bool) -> str | None:
        left = points_left(self.run, cursor)
        if left and going_on:
            return (
                f"{left:,} points are still on their way to MLflow, in the background; "
                f"`atlas sync {self.run.path}` sends what is missing"
            )
        if left or cursor.error:
            why = cursor.error or self._problem or f"see {self.run.logs / 'sync.log'}"
            return (
                f"{left:,} points of this run are not in MLflow ({why}); "
                f"send them with `atlas sync {self.run.path}`"
            )
        if cursor.refused > self._refused:
            return (
                f"MLflow refused {cursor.refused - self._refused:,} points of this run for good "
                f"({cursor.refusal}); metrics.jsonl has them"
            )
        return None


class NullShipper:
    """Sends nothing (tracking=none); the report is drawn at the end all the same.

    With `elsewhere` that too is left to another: a pool has one shipper for all of its runs.
    """

    def __init__(self, run: Run, elsewhere: bool = False) -> None:
        self.run = run
        self._elsewhere = elsewhere

    def start(self) -> None:
        """Nothing to start."""

    def warning(self) -> str | None:
        """Nothing can be wrong."""
        return None

    def finish(self, timeout_s: float | None = None) -> str | None:
        """Draw the report in a process of its own, waited for at most 5 s."""
        if self._elsewhere:
            return None
        with contextlib.suppress(OSError):
            child = _spawn(self.run)
            wait_s = REPORT_WAIT_S if timeout_s is None else min(timeout_s, REPORT_WAIT_S)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(wait_s)
        return None


def open_shipper(run: Run, tracking: Mapping[str, Any]) -> Shipper | NullShipper:
    """The shipper that `config["tracking"]` asks for; not started yet."""
    if FLEET in os.environ:
        return NullShipper(run, elsewhere=True)
    if tracking["kind"] == "none":
        return NullShipper(run)
    return Shipper(run, float(tracking["wait_s"]))


class Fleet:
    """One shipper for all runs of a pool: mlflow is imported once, and one process writes to it."""

    def __init__(self, runs: Sequence[Run], wait_s: float) -> None:
        self._runs = runs
        self._wait_s = wait_s
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; runs that start from now on leave their shipping to it."""
        self._child = _spawn_for(self._runs, self.log, "--follow")

    @property
    def log(self) -> Path:
        """What the shipper has to say."""
        return self._runs[0].path.parent / "sync.log"

    def finish(self) -> str | None:
        """Wait until all is sent; a sentence for the person where something is missing."""
        tracked = self._tracked()
        # Reports alone are not waited for: they are drawn in the background.
        wait_s = self._wait_s if tracked else 0.0
        if self._child is None or _finished(self._child, wait_s) or not tracked:
            left = sum(points_left(run, Cursor.load(run)) for run in tracked)
            return (left and f"{left:,} points are not in MLflow; see {self.log}") or None
        return f"points are still on their way to MLflow, in the background; see {self.log}"

    def _tracked(self) -> list[Run]:
        return [run for run in self._runs if run.read_config()["tracking"]["kind"] != "none"]


def _finished(child: subprocess.Popen[bytes], timeout_s: float) -> bool:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(END)
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _spawn(run: Run, *options: str) -> subprocess.Popen[bytes]:
    run.logs.mkdir(exist_ok=True)
    return _spawn_for([run], run.logs / "sync.log", *options)


def _spawn_for(runs: Sequence[Run], file: Path, *options: str) -> subprocess.Popen[bytes]:
    # Blocked until a follower has its handlers: a signal to all of a job's processes must not end
    # it before that, and an END that comes at once must not be lost.
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
        "PYTHONSAFEPATH": "1",  # a person's yaml.py in the working directory is not ours
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
    }
