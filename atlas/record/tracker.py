"""What rank 0 records while it trains: the journal first, then status, then the shipper."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from atlas.record import journal
from atlas.record.shipping.shipper import open_shipper
from atlas.run.directory import Run
from atlas.run.lock import Lock
from atlas.system.files import write_text

STATUS_S = 5.0
PREEMPTED_WAIT_S = 5.0  # the queue is waiting for the machine


class Tracker:
    """Records metrics, sample ids and state of one run; held by rank 0 alone."""

    def __init__(self, run: Run, lock: Lock, config: Mapping[str, Any]) -> None:
        self._run = run
        self._lock = lock
        self._journal = journal.Journal(run.journal_file, before_write=lock.check)
        self._samples: list[str] = []
        self._samples_on = bool(config["trainer"]["log_samples"])
        self._shipper = open_shipper(run, config["tracking"])
        self._shipping = False
        self._wait_s = float(config["tracking"]["wait_s"])
        self._last: dict[str, float] = {}
        self._status_at = time.monotonic()
        self._warned: str | None = None

    def resume(self, step: int) -> None:
        """Get ready to go on at `step`: what stands past it is compared, sample ids are cut."""
        self._journal.replay_from(step)
        if self._samples_on:
            _cut_samples(self._run, step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` of `step`."""
        self._journal.append(step, metrics)
        self._last.update(metrics)
        if not self._shipping:
            # Not before the first step: the shipper's start would compete with it.
            self._shipper.start()
            self._shipping = True
        if time.monotonic() - self._status_at > STATUS_S:
            self.status(step=step + 1)

    def samples(self, step: int, ids: Sequence[int]) -> None:
        """Record the sample ids of update `step`, where `trainer.log_samples` asks for it."""
        if self._samples_on:
            self._samples.append(json.dumps({"step": step, "ids": list(ids)}) + "\n")

    def status(self, **changes: Any) -> None:
        """Write `status.json`, with the last value of every metric."""
        self._lock.check()
        self._journal.flush()
        self._run.update_status(last=self._last, **changes)
        self._status_at = time.monotonic()

    def sync(self) -> None:
        """All that was recorded on disk: what a checkpoint rests on must be there before it."""
        self._lock.check()
        self._journal.flush(sync=True)
        if self._samples:
            with open(self._run.samples_file, "a") as file:
                file.writelines(self._samples)
                file.flush()
                os.fsync(file.fileno())
            self._samples.clear()

    def warning(self) -> str | None:
        """What is wrong with the tracking server, once for as long as it is."""
        warning = self._shipper.warning()
        new, self._warned = warning != self._warned, warning
        return warning if new else None

    def close(self, state: str, reason: str | None, **changes: Any) -> str | None:
        """The last record of this process; returns what could not be shipped, in a sentence."""
        try:
            self.sync()
            self.status(state=state, reason=reason, **changes)
        finally:
            self._journal.close()
        left = self._shipper.finish(self._wait_s if state != "preempted" else PREEMPTED_WAIT_S)
        self._run.update_status()
        return left


def _cut_samples(run: Run, step: int) -> None:
    """Drop the ids of updates that will be taken again."""
    if not run.samples_file.exists():
        return
    journal.cut_torn_line(run.samples_file)
    kept = [
        json.dumps(line) + "\n" for line in journal.read(run.samples_file) if line["step"] < step
    ]
    write_text(run.samples_file, "".join(kept))
