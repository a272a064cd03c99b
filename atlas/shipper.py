"""The process that sends a run's journal to MLflow, as the process that trains sees it.

Nothing here imports mlflow: training starts a shipper, looks at the small file that it leaves, and
at the end waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

from atlas.lock import replace
from atlas.run import ROOT, Run

PARENT = "ATLAS_SYNC_PARENT"  # in a shipper's environment: the process whose run it sends
FLEET = "ATLAS_FLEET"  # in a rank's environment: its pool sends the journal
NICENESS = 19  # training goes first, where both want the processor
WARN_EVERY_S = 1.0
REPORT_WAIT_S = 5.0
# Enough for a last batch and the final state before Slurm follows its SIGTERM with SIGKILL (30 s).
TERM_GRACE_S = 25.0
# Importing mlflow takes a second of CPU: a run's first step goes first, if it comes this soon.
HEAD_START_S = 5.0

END = signal.SIGURG  # to a shipper: the run ended. Nobody else sends this one
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_HANDLED = (*_IGNORED, signal.SIGTERM, END)


@dataclass
class Record:
    """`mlflow.json`: where a run's points go and how far they got. Written by the shipper alone."""

    uri: str = ""  # without credentials
    run_id: str | None = None
    experiment_id: str | None = None
    offset: int = 0  # bytes of metrics.jsonl that are in MLflow
    shipped: int = 0  # points in them
    refused: int = 0  # points among them that MLflow would not take
    refusal: str | None = None  # why, for the last of those
    error: str | None = None  # why nothing can be sent at the moment
    updated: float = 0.0  # when this was written, in seconds since 1970
    uploaded: dict[str, str] = field(default_factory=dict)  # artifact: the version that is there

    @classmethod
    def load(cls, run: Run) -> Record:
        """What is recorded; an empty record where there is none, or none that can be read."""
        try:
            stored = json.loads(run.mlflow_file.read_text())
            return cls(**{f.name: stored[f.name] for f in fields(cls) if f.name in stored})
        except (FileNotFoundError, ValueError, TypeError):
            return cls()

    def save(self, run: Run) -> None:
        """Replace `mlflow.json`, atomically."""
        self.updated = round(time.time(), 3)
        replace(run.mlflow_file, json.dumps(asdict(self), indent=1) + "\n")


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
        self._refused = Record.load(self.run).refused
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
        record = Record.load(self.run)
        if child and going_on and record.error:
            child.kill()  # safe at any moment: what was sent twice is stored once
            child.wait()
            going_on = False
        return self._missing(record, going_on)

    def _look(self) -> str | None:
        record = Record.load(self.run)
        if record.error and record.updated >= self._started:
            return f"MLflow at {record.uri} can't be used: {record.error}"
        if self._child and self._child.poll() is not None:
            return f"the process that sends metrics ended early, see {self.run.logs / 'sync.log'}"
        return None

    def _missing(self, record: Record, going_on: bool) -> str | None:
        left = points_left(self.run, record)
        if left and going_on:
            return (
                f"{left:,} points are still on their way to MLflow, in the background; "
                f"`atlas sync {self.run.path}` sends what is missing"
            )
        if left or record.error:
            why = record.error or self._problem or f"see {self.run.logs / 'sync.log'}"
            return (
                f"{left:,} points of this run are not in MLflow ({why}); "
                f"send them with `atlas sync {self.run.path}`"
            )
        if record.refused > self._refused:
            return (
                f"MLflow refused {record.refused - self._refused:,} points of this run for good "
                f"({record.refusal}); metrics.jsonl has them"
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
            left = sum(points_left(run, Record.load(run)) for run in tracked)
            return (left and f"{left:,} points are not in MLflow; see {self.log}") or None
        return f"points are still on their way to MLflow, in the background; see {self.log}"

    def _tracked(self) -> list[Run]:
        return [run for run in self._runs if run.config["tracking"]["kind"] != "none"]


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
        for signum in _IGNORED:  # Slurm sends them to every process of a step
            signal.signal(signum, signal.SIG_IGN)
        signal.signal(END, self._on_end)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)

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


def masked(text: str) -> str:
    """`text` with the credentials of every URI in it replaced by `***`."""
    return re.sub(r"(?<=://)[^/\s@'\"]+@", "***@", text)


def lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete lines from byte `offset` on, each with the offset behind it.

    A line that is no JSON object is yielded as an empty dictionary: it must not stop what follows.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            try:
                line = json.loads(raw)
            except ValueError:
                line = {}
            yield (line if isinstance(line, dict) else {}), offset


def points(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a journal's line is a metric: its numbers, less step and time."""
    return {
        key: float(value)
        for key, value in line.items()
        if key not in ("step", "time") and isinstance(value, int | float)
    }


def points_left(run: Run, record: Record) -> int:
    """How many points of the journal are not in MLflow."""
    return sum(len(points(line)) for line, _ in lines(run.journal_file, record.offset))


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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED if "--follow" in options else ())
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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
