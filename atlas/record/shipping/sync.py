"""`atlas sync`: the loop that sends runs to MLflow and draws their reports.

One process, one loop: a single run is a pool of one. A user runs it once over the runs; with
`follow`, as a launcher starts it, it runs until every run has ended and is sent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from atlas.config.schema import TrackingSettings
from atlas.errors import AtlasError
from atlas.record.report import Report
from atlas.record.shipping.cursor import Cursor, Shipped
from atlas.record.shipping.writer import (
    Parent,
    SyncLock,
    Writer,
    step_back,
    wait_for_first_line,
)
from atlas.run.directory import Run

if TYPE_CHECKING:
    from atlas.record.shipping.shipment import Shipment

POLL_S = 1.0
LOCK_POLL_S = 0.2
# MLflow waits up to minutes in one call by itself, in which a shipper would not see that its run
# ended. What the user has set is kept.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


@dataclass(frozen=True)
class Drawn:
    """What a sync of a run without tracking did."""

    run: Run
    error: str | None

    @property
    def is_complete(self) -> bool:
        """Whether the report is drawn."""
        return self.error is None

    def __str__(self) -> str:
        done = f"could not be drawn: {self.error}" if self.error else "drawn"
        return f"{self.run.report_file} {done}; tracking is off for this run, nothing is sent"


Result = Shipped | Drawn


def sync(runs: Sequence[Run], follow: bool = False, again: bool = False) -> Iterator[Result]:
    """Send what MLflow does not have of `runs` and draw their reports; yield each result.

    With `follow`, keep syncing until the runs end. With `again`, send the journals from their first
    line. A store that can't be used is described in the result. If another process sends one of the
    runs, the others are finished first and then `AtlasError` is raised.
    """
    parent = Parent(listen=follow)
    tasks = [
        _TrackedRun(run, Writer(run, parent) if follow else None, parent, again)
        if TrackingSettings.of(run.read_config()).is_on
        else _UntrackedRun(run, Writer(run, parent) if follow else None)
        for run in runs
    ]
    if parent.exists:
        step_back()
        wait_for_first_line(runs, parent)
    with _quiet():
        yield from _turns(tasks, parent)


def _turns(tasks: Sequence[_TrackedRun | _UntrackedRun], parent: Parent) -> Iterator[Result]:
    """Give every task its turns until all are done, or this process has to end."""
    unfinished, busy = list(tasks), None
    try:
        while unfinished and not parent.is_expired():
            for task in list(unfinished):
                try:
                    result = task.turn()
                except AtlasError as error:
                    result, busy = None, error
                    unfinished.remove(task)
                if result:
                    unfinished.remove(task)
                    yield result
            if unfinished:
                parent.wait(min(task.pause for task in unfinished))
        yield from (task.result() for task in unfinished)
    finally:
        for task in tasks:
            task.close()
    if busy:
        raise busy


class _TrackedRun:
    """A run in the loop: first its sync lock, then turns of sending."""

    def __init__(self, run: Run, writer: Writer | None, parent: Parent, again: bool) -> None:
        self.pause = LOCK_POLL_S
        self._run = run
        self._writer = writer
        self._parent = parent
        self._again = again
        self._lock = SyncLock(run, parent)
        self._shipment: Shipment | None = None

    def turn(self) -> Shipped | None:
        is_over = self._writer is None or self._writer.has_ended()
        if self._shipment is None:
            if not self._lock.acquire(is_over):
                return None
            self._shipment = _shipment(self._run, self._parent, self._again)
        shipped = self._shipment.turn(is_over)
        self.pause = self._shipment.pause
        if shipped:
            self.close()  # a later sync of this run need not wait for the others
        return shipped

    def result(self) -> Shipped:
        if self._shipment:
            return self._shipment.result()
        cursor = Cursor.load(self._run)
        cursor.error = self._lock.busy()
        return Shipped.of(self._run, cursor, sent=0, refused=0)

    def close(self) -> None:
        self._lock.release()


class _UntrackedRun:
    """A run in the loop of which only the report is drawn, at its end."""

    pause = POLL_S

    def __init__(self, run: Run, writer: Writer | None) -> None:
        self._run = run
        self._writer = writer

    def turn(self) -> Drawn | None:
        is_over = self._writer is None or self._writer.has_ended()
        return self.result() if is_over else None

    def result(self) -> Drawn:
        return Drawn(self._run, Report(self._run).update(is_over=True))

    def close(self) -> None:
        pass


def _shipment(run: Run, parent: Parent, again: bool) -> Shipment:
    """Import mlflow, which takes a second, and open the shipment of `run`."""
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from atlas.record.shipping.shipment import Shipment

    return Shipment(run, again, parent.is_expired)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the log of MLflow, alembic and urllib3 from the user: errors reach us as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
