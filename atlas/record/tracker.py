"""What a rank records while it trains: the interface, and what implements it.

Rank 0 records everything: the journal first, then `status.json`, and from the journal a shipper
sends the metrics to MLflow. The other ranks record nothing, with the same calls.
"""

from __future__ import annotations

import abc
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from atlas.config.schema import TrackingSettings
from atlas.record import journal
from atlas.record.shipping.shipper import open_shipper
from atlas.run.directory import Run
from atlas.run.lock import Lock
from atlas.run.status import State, end
from atlas.system.files import sync_file, write_text

STATUS_S = 5.0
PREEMPTED_WAIT_S = 5.0  # the queue is waiting for the machine


class Tracker(abc.ABC):
    """What training records with, in the order of a run: `resume`, many `log`, and `close`.

    tracker = RunTracker(run, lock, settings.tracking, log_samples=True) if lock else NullTracker()
    tracker.resume(step)
    tracker.log(step, {"train/loss": 0.5})
    tracker.log_samples(step, [3, 1, 4])
    tracker.flush()                            # before a checkpoint of `step`
    tracker.update_status(step=step, best=best)
    print(tracker.warning())
    print(tracker.close(State.FINISHED, None))
    """

    @abc.abstractmethod
    def resume(self, step: int) -> None:
        """Prepare to record from `step` on, of a run that may have recorded later steps already."""

    @abc.abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` of `step`."""

    @abc.abstractmethod
    def log_samples(self, step: int, ids: Sequence[int]) -> None:
        """Record the sample ids of update `step`, if `trainer.log_samples` is on."""

    @abc.abstractmethod
    def update_status(self, **changes: Any) -> None:
        """Write `changes` and the last value of every metric to `status.json`."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Write everything recorded so far to the disk, before a checkpoint that rests on it."""

    @abc.abstractmethod
    def warning(self) -> str | None:
        """Return what is wrong with the tracking server, once for every new problem."""

    @abc.abstractmethod
    def close(self, state: State, reason: str | None, **changes: Any) -> str | None:
        """Record how the run ended, as the last call; return what could not be sent, or None."""


class NullTracker(Tracker):
    """Records nothing, as every rank but the first does."""

    def resume(self, step: int) -> None:
        """Do nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def log_samples(self, step: int, ids: Sequence[int]) -> None:
        """Do nothing."""

    def update_status(self, **changes: Any) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def warning(self) -> str | None:
        """Return None."""
        return None

    def close(self, state: State, reason: str | None, **changes: Any) -> str | None:
        """Return None."""
        return None


class RunTracker(Tracker):
    """Records metrics, sample ids and the state of a run in its directory, on rank 0."""

    def __init__(self, run: Run, lock: Lock, tracking: TrackingSettings, log_samples: bool) -> None:
        self._run = run
        self._lock = lock
        self._journal = journal.Journal(run.journal_file, before_write=lock.require_mine)
        self._samples: list[str] = []
        self._samples_on = log_samples
        self._shipper = open_shipper(run, tracking)
        self._is_shipping = False
        self._wait_s = tracking.wait_s
        self._last: dict[str, float] = {}
        self._status_at = time.monotonic()
        self._warned: str | None = None

    def resume(self, step: int) -> None:
        """Compare what was recorded after `step` with what comes; remove its sample ids."""
        self._journal.replay_from(step)
        if self._samples_on:
            _cut_samples(self._run, step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` of `step`; the first call starts the shipper."""
        self._journal.append(step, metrics)
        self._last.update(metrics)
        if not self._is_shipping:
            # Not before the first step: the start of the shipper would compete with it.
            self._shipper.start()
            self._is_shipping = True
        if time.monotonic() - self._status_at > STATUS_S:
            self.update_status(step=step + 1)

    def log_samples(self, step: int, ids: Sequence[int]) -> None:
        """Record the sample ids of update `step`, if `trainer.log_samples` is on."""
        if self._samples_on:
            self._samples.append(json.dumps({"step": step, "ids": list(ids)}) + "\n")

    def update_status(self, **changes: Any) -> None:
        """Write the journal, then `status.json` with `changes` and the last metrics."""
        self._lock.require_mine()
        self._journal.flush()
        self._run.update_status(last=self._last, **changes)
        self._status_at = time.monotonic()

    def flush(self) -> None:
        """Write the journal and the sample ids to the disk.

        A run that resumes from a checkpoint records only what follows it. So what came before has
        to be on the disk before the checkpoint is.
        """
        self._lock.require_mine()
        self._journal.flush(sync=True)
        if self._samples:
            with open(self._run.samples_file, "a") as file:
                file.writelines(self._samples)
                sync_file(file)
            self._samples.clear()

    def warning(self) -> str | None:
        """Return what is wrong with the tracking server, once for every new problem."""
        warning = self._shipper.warning()
        is_new, self._warned = warning != self._warned, warning
        return warning if is_new else None

    def close(self, state: State, reason: str | None, **changes: Any) -> str | None:
        """Record how the run ended and wait for the shipper; return what it could not send.

        The state is on the disk before the shipper is asked to finish, which sends what it finds.
        """
        try:
            self.flush()
            self._lock.require_mine()  # again: to flush can take long
            end(self._run, state, reason, last=self._last, **changes)
        finally:
            self._journal.close()
        missing = self._shipper.finish(
            self._wait_s if state is not State.PREEMPTED else PREEMPTED_WAIT_S
        )
        self._run.update_status()  # with the id of the MLflow run, which the shipper has noted
        return missing


def _cut_samples(run: Run, step: int) -> None:
    """Remove the ids of updates that will be taken again."""
    if not run.samples_file.exists():
        return
    journal.cut_torn_line(run.samples_file)
    kept = [
        json.dumps(line) + "\n" for line in journal.read(run.samples_file) if line["step"] < step
    ]
    write_text(run.samples_file, "".join(kept))
