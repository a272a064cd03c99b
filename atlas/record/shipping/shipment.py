"""One run on its way to MLflow: its points, its artifacts and its state.

The journal is sent in order, in batches, with its own timestamps. What is uncertain is sent again:
a request that timed out may have been stored, and a process that was killed after a batch has not
noted it. That is safe because MLflow stores the same key, step, value and timestamp once. It is
necessary because nothing else can tell whether that batch arrived. So after any number of failures
MLflow has no hole and no double, and every line of the journal stays where it is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from atlas.config.schema import TrackingSettings
from atlas.config.secrets import without_credentials
from atlas.record import journal
from atlas.record.report import Report
from atlas.record.shipping.address import artifact_root, tracking_uri
from atlas.record.shipping.cursor import Cursor, Shipped
from atlas.record.shipping.log import reason, say
from atlas.record.shipping.mlflow_store import Store, metrics
from atlas.run.directory import Run
from atlas.run.status import State
from atlas.system.files import guarded

BATCH = 1000  # MLflow's limit of metrics in a request
SMALLEST_BATCH = 50
POLL_S = 1.0
LONGEST_PAUSE_S = 10.0
GIVE_UP_S = 10.0  # after the end of a run: how long a store that fails is tried,
TRIES = 3  # and at least how often


class Shipment:
    """Sends one run, a turn at a time; held by the process that has the run's sync lock.

    `is_expired` is asked between batches: when it returns True, what is left is for another sync.
    """

    def __init__(self, run: Run, again: bool, is_expired: Callable[[], bool]) -> None:
        self.run = run
        self.pause = POLL_S  # until the next turn, in seconds
        self._is_expired = is_expired
        self._config = run.read_config()
        self._tracking = TrackingSettings.of(self._config)
        self._uri = tracking_uri(run, self._tracking)
        self._cursor = Cursor.at(run, without_credentials(self._uri), again)
        self._store: Store | None = None
        self._report = Report(run)
        self._is_running = self._is_over = False
        self._sent = self._refused = 0
        self._size = BATCH
        self._progress = time.monotonic()  # when a request last succeeded
        self._failures = 0  # since then

    def turn(self, is_over: bool) -> Shipped | None:
        """Send what is new; return the result once the run is over and sent, or given up.

        `is_over` must be known before the turn: what was written before it was asked is then sent.
        """
        if not self._has_begun(is_over):
            return None
        self._look(is_over)
        is_done = self._try(self._send_points)
        if error := self._report.update(is_over):
            say(f"the report could not be drawn: {error}")
        is_done = is_done and self._try(self._complete)
        if is_over:
            self.pause = min(self.pause, POLL_S)
        return self.result() if is_over and (is_done or self._is_hopeless()) else None

    def result(self) -> Shipped:
        """Return what was done so far."""
        return Shipped.of(self.run, self._cursor, self._sent, self._refused)

    def _has_begun(self, is_over: bool) -> bool:
        """Return False for a run that waits for its place in a pool."""
        if is_over or self.run.judge_state() is not State.QUEUED:
            return True
        return journal.size(self.run.journal_file) > 0

    def _look(self, is_over: bool) -> None:
        if is_over and not self._is_over:
            self._progress = time.monotonic()  # the store gets its tries from now on
        self._is_over = is_over
        was_running, self._is_running = self._is_running, self.run.judge_state() is State.RUNNING
        if self._is_running and not was_running:
            self._store = None  # opened again, as that of a running run

    def _try(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as error:  # whatever a store does: the journal waits, the run continues
            self._note_failure(error)
            return False
        self._note_success()
        return True

    def _note_failure(self, error: Exception) -> None:
        text = reason(error)
        if text != self._cursor.error:
            say(f"MLflow at {self._cursor.uri} can't be used: {text}; trying again")
        self._cursor.error = text
        with contextlib.suppress(OSError):
            self._cursor.save(self.run)
        self._store = None  # looked up again: it may have been replaced by an empty one
        # A server that is too slow for a whole batch may manage a smaller one.
        self._size = max(SMALLEST_BATCH, self._size // 2)
        self.pause = min(LONGEST_PAUSE_S, self.pause * 2)
        self._failures += 1

    def _note_success(self) -> None:
        self._progress, self.pause, self._failures = time.monotonic(), POLL_S, 0
        if self._cursor.error:
            say(f"MLflow at {self._cursor.uri} works")
            self._cursor.error = None
            with contextlib.suppress(OSError):
                self._cursor.save(self.run)

    def _is_hopeless(self) -> bool:
        is_late = time.monotonic() - self._progress > GIVE_UP_S
        return is_late and self._failures >= TRIES

    def _opened(self) -> Store:
        if self._store is None:
            store = Store(self._uri, artifact_root(self._uri, self._tracking))
            store.open(self.run, self._config, self._cursor, self._is_running)
            self._cursor.save(self.run)
            self._store = store
        return self._store

    def _send_points(self) -> None:
        """Send every complete line; `Cursor.offset` advances after each batch."""
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
                if self._is_expired():
                    return
            batch += new
            end = line.end
        if end > self._cursor.offset:
            self._send(store, batch, end)

    def _send(self, store: Store, batch: list[Any], end: int) -> None:
        """Send `batch`, then note that the journal is sent up to `end`; in this order."""
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

    def _complete(self) -> None:
        """Upload artifacts; and write the state of the run, once nobody writes the run any more."""
        run, store, before = self.run, self._opened(), dict(self._cursor.uploaded)
        store.upload_config(run, self._cursor)
        for file in (run.report_file, run.evaluation_file, run.evaluation_picture):
            store.upload(file, self._cursor)
        if self._is_over:
            if self._tracking.log_best:
                store.upload(run.checkpoints / "best", self._cursor)
            store.close(run, self._config)
            note_run_id(run, self._cursor)
        if self._cursor.uploaded != before:
            self._cursor.save(run)


def note_run_id(run: Run, cursor: Cursor) -> None:
    """Put the id of the MLflow run into the status, which is ours to write if nobody else does."""
    if run.lock.live_holder() or run.read_status().mlflow_run_id == cursor.run_id:
        return
    with guarded(run.path.parent):  # nobody takes the lock between the question and the write
        if run.read_status().state and run.lock.live_holder() is None:
            run.update_status()
