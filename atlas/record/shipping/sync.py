"""Sending a run's journal to MLflow.

The journal is sent in order, in batches, with its own timestamps. MLflow stores the same key,
step, value and timestamp once, so whatever is uncertain (a reply that never came, a process killed
between the batch and the note of it) is simply sent again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from atlas.config.secrets import without_credentials
from atlas.errors import AtlasError
from atlas.record import journal
from atlas.record.shipping.cursor import Cursor, points_left
from atlas.record.shipping.mlflow_store import (
    Store,
    artifact_root,
    metrics,
    reason,
    say,
    tracking_uri,
)
from atlas.record.shipping.writer import Writer
from atlas.run.directory import Run
from atlas.run.status import State
from atlas.system.files import guarded, try_lock

BATCH = 1000  # MLflow's limit of metrics in a request
SMALLEST_BATCH = 50
POLL_S = 1.0
LONGEST_PAUSE_S = 10.0
GIVE_UP_S = 10.0  # after the end of a run: how long a store that fails is tried,
TRIES = 3  # and at least how often
REDRAW_S = 30.0
BUSY_WAIT_S = 60.0
# MLflow's own way of waiting, up to minutes in one call, would keep us from noticing that the run
# ended. A person's own setting stands.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Shipped:
    """What a sync did: points sent by it, points of the journal that MLflow lacks, and why."""

    sent: int
    left: int
    refused: int
    error: str | None
    run_id: str | None
    uri: str

    def __str__(self) -> str:
        text = f"{self.sent:,} points sent to MLflow run {self.run_id} at {self.uri}"
        if self.refused:
            text += f"; {self.refused:,} were refused for good"
        if self.left or self.error:
            text += f"; {self.left:,} are not there: {self.error}"
        return text


def sync(
    run: Run, follow: bool = False, *, writer: Writer | None = None, again: bool = False
) -> Shipped:
    """Send what MLflow lacks of `run`, its artifacts and its state; draw the report.

    With `follow`, go on until the process that writes the run (`writer`, by default who holds the
    lock now) is gone. With `again`, send the journal from its first line. A store that can't be
    used is not raised but told in the result; another sync of the run is an `AtlasError`.
    """
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if follow and writer is None:
        writer = Writer(run)
    with _alone(run, writer if follow else None), _quiet():
        return Shipping(run, again).go(writer if follow else None)


def sync_all(runs: Sequence[Run], writer: Writer) -> list[Shipped]:
    """Follow all `runs` of a pool, in turns, until each has ended and is sent.

    A run ends when its state says so; all of them end when the pool (`writer`) does.
    """
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    done: list[Shipped] = []
    with contextlib.ExitStack() as stack, _quiet():
        waiting = []
        for run in runs:
            stack.enter_context(_alone(run, writer))
            waiting.append(Shipping(run))
        while waiting and not writer.expired():
            closing = writer.gone()
            for shipping in list(waiting):
                if (shipped := shipping.look(closing, writer)) is not None:
                    waiting.remove(shipping)
                    done.append(shipped)
            if not closing:
                writer.wait(POLL_S)
    return done


class Shipping:
    """One pass over a run's journal, or one life of a shipper that follows it."""

    def __init__(self, run: Run, again: bool = False) -> None:
        self.run = run
        self._config = run.read_config()
        self._uri = tracking_uri(run, self._config)
        self._cursor = _cursor(run, self._uri, again)
        self._store: Store | None = None
        self._live = False  # whether the run is being written
        self._sent = self._refused = 0
        self._size = BATCH
        self._pause = POLL_S
        self._progress = time.monotonic()  # when something last worked
        self._failures = 0  # since then
        self._drawn: tuple[int, bool] | None = None  # the journal's size then, whether it was over
        self._redraw = time.monotonic() + REDRAW_S

    def go(self, writer: Writer | None) -> Shipped:
        """Send until the writer is gone and all is sent, or the store has failed for too long."""
        ended = False
        while True:
            # Asked before sending: what was written before the answer is then sent.
            over = writer is None or writer.gone()
            if over and not ended:
                ended, self._progress = True, time.monotonic()
            self._live = not over or self.run.judge_state() is State.RUNNING
            done = self._turn(over, writer)
            if over and (done or self._hopeless()):
                break
            if writer and writer.expired():
                break
            self._wait(writer, over)
        return self._shipped()

    def look(self, closing: bool, writer: Writer) -> Shipped | None:
        """One turn of many, among other runs; what was done once the run has ended and is sent."""
        state = self.run.judge_state()
        over = closing or state is None or state.is_over
        self._live = state is State.RUNNING
        if state is State.QUEUED and not closing:
            return None
        done = self._turn(over, writer)
        if over and (done or self._hopeless()):
            return self._shipped()
        return None

    def _shipped(self) -> Shipped:
        left = points_left(self.run, self._cursor)
        return Shipped(
            sent=self._sent,
            left=left,
            refused=self._refused,
            error=self._cursor.error,
            run_id=self._cursor.run_id,
            uri=self._cursor.uri,
        )

    def _turn(self, over: bool, writer: Writer | None) -> bool:
        """One try at everything there is to do now; whether it worked."""
        shipped = self._try(lambda: self._ship(writer))
        self._draw(over)
        return shipped and self._try(lambda: self._complete(over))

    def _try(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as error:  # whatever a store does: the journal waits, the run goes on
            self._failed(error)
            return False
        self._worked()
        return True

    def _failed(self, error: Exception) -> None:
        text = reason(error)
        if text != self._cursor.error:
            say(f"MLflow at {self._cursor.uri} can't be used: {text}; trying again")
        self._cursor.error = text
        with contextlib.suppress(OSError):
            self._cursor.save(self.run)
        self._store = None  # looked up anew: it may have been replaced by an empty one
        # A server that is too slow for a whole batch may manage a smaller one.
        self._size = max(SMALLEST_BATCH, self._size // 2)
        self._pause = min(LONGEST_PAUSE_S, self._pause * 2)
        self._failures += 1

    def _hopeless(self) -> bool:
        late = time.monotonic() - self._progress > GIVE_UP_S
        return late and self._failures >= TRIES

    def _worked(self) -> None:
        self._progress, self._pause, self._failures = time.monotonic(), POLL_S, 0
        if self._cursor.error:
            say(f"MLflow at {self._cursor.uri} works")
            self._cursor.error = None
            with contextlib.suppress(OSError):
                self._cursor.save(self.run)

    def _wait(self, writer: Writer | None, over: bool) -> None:
        seconds = min(self._pause, POLL_S) if over else self._pause
        if writer:
            writer.wait(seconds)
        else:
            time.sleep(seconds)

    def _opened(self) -> Store:
        if self._store is None:
            store = Store(self._uri, artifact_root(self.run, self._uri, self._config))
            store.open(self.run, self._config, self._cursor, self._live)
            self._cursor.save(self.run)
            self._store = store
        return self._store

    def _ship(self, writer: Writer | None) -> None:
        """Send every complete line; `Cursor.offset` moves on after each batch."""
        store = self._opened()
        batch: list[Any] = []  # MLflow's points
        end = self._cursor.offset
        for line in journal.read_lines(self.run.journal_file, end):
            if line.entry is None:
                say(f"skipped a damaged line of {self.run.journal_file}, up to byte {line.end}")
            new = metrics(line.entry or {})
            if batch and len(batch) + len(new) > self._size:
                self._send(store, batch, end)
                batch = []
                if writer and writer.expired():
                    return
            batch += new
            end = line.end
        if end > self._cursor.offset:
            self._send(store, batch, end)

    def _send(self, store: Store, batch: list[Any], end: int) -> None:
        refused: list[tuple[Any, str]] = []
        for at in range(0, len(batch), self._size):
            refused += store.log(batch[at : at + self._size])
        for metric, why in refused:
            say(f"MLflow refused {metric.key}={metric.value} at step {metric.step}: {why}")
            self._cursor.refusal = why
        self._cursor.offset = end
        self._cursor.shipped += len(batch)
        self._cursor.refused += len(refused)
        self._cursor.save(self.run)
        self._sent += len(batch) - len(refused)
        self._refused += len(refused)
        self._size = min(BATCH, self._size * 2)
        self._progress, self._failures = time.monotonic(), 0

    def _draw(self, over: bool) -> None:
        """Redraw the report where there are new lines, now and then and at the end."""
        file = self.run.journal_file
        size = file.stat().st_size if file.exists() else 0
        if (size, over) == self._drawn or (not over and time.monotonic() < self._redraw):
            return
        from atlas.record.report import draw

        try:
            draw(self.run)
        except Exception as error:  # a picture must not keep the points from being sent
            say(f"the report could not be drawn: {reason(error)}")
        self._drawn = (size, over)
        self._redraw = time.monotonic() + REDRAW_S

    def _complete(self, over: bool) -> None:
        """Artifacts; and the run's state, once nobody writes it any more."""
        store, before = self._opened(), dict(self._cursor.uploaded)
        store.upload_config(self.run, self._cursor)
        for file in (self.run.report_file, self.run.evaluation_file, self.run.evaluation_picture):
            store.upload(file, self._cursor)
        if over and self._config["tracking"].get("log_best"):
            store.upload(self.run.checkpoints / "best", self._cursor)
        if over:
            store.close(self.run, self._config)
            note_run_id(self.run, self._cursor)
        if self._cursor.uploaded != before:
            self._cursor.save(self.run)


def note_run_id(run: Run, cursor: Cursor) -> None:
    """Put the MLflow run's id into the status, which is ours to write once nobody else does."""
    if run.lock.live_holder() or run.read_status().mlflow_run_id == cursor.run_id:
        return
    with guarded(run.path.parent):  # nobody takes the lock between the question and the writing
        if run.read_status().state and run.lock.live_holder() is None:
            run.update_status()


def _cursor(run: Run, uri: str, again: bool) -> Cursor:
    """What mlflow.json says, as far as it is about this store and this journal."""
    cursor = Cursor.load(run)
    shown = without_credentials(uri)
    if cursor.uri != shown:
        cursor = Cursor(uri=shown)
    size = run.journal_file.stat().st_size if run.journal_file.exists() else 0
    if again or cursor.offset > size:
        cursor.offset = cursor.shipped = cursor.refused = 0
    cursor.error = None
    return cursor


@contextlib.contextmanager
def _alone(run: Run, writer: Writer | None) -> Iterator[None]:
    """Hold the run's sync lock: one process sends it.

    A shipper waits for its predecessor for as long as its own run lives, and everybody for a
    minute more; a person's sync does not wait for one that follows a living run.
    """
    with open(run.path / ".sync.lock", "a+") as lock:
        ours = writer is not None and writer.is_parent
        until = time.monotonic() + BUSY_WAIT_S
        while not try_lock(lock):
            if writer and ours and not writer.gone():
                until = time.monotonic() + BUSY_WAIT_S
            elif time.monotonic() > until or (not ours and run.lock.live_holder()):
                lock.seek(0)
                raise AtlasError(
                    f"run {run.id} is being sent to MLflow already, by process "
                    f"{lock.read().strip() or '?'}; see {run.logs / 'sync.log'}"
                )
            time.sleep(0.2)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the news of MLflow, alembic and urllib3 from the person: errors reach us as such."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
