"""The data of the next update, in hand on every rank before any of them begins it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from atlas.run.signals import Stop, StopWaiting
from atlas.training.feeding.stream import Batch, TrainStream
from atlas.training.feeding.workers import following


class ReadAhead:
    """Reads the `accumulate` micro-batches of an update while the one before is being finished.

    A rank that waits for data gives up as soon as a stop is asked for, and says so in the agreement
    that follows. Nobody has begun the update by then, so no rank is left alone in its sums.
    """

    def __init__(self, stream: TrainStream, stop: Stop, accumulate: int) -> None:
        self._stream = stream
        self._stop = stop
        self._accumulate = accumulate
        self._held: list[Batch] = []
        self._error: Exception | None = None
        self.replaced = 0  # bad samples of this rank in the update that was read

    def read(self, step: int, batches: Iterator[Any]) -> float:
        """Read update `step`, from an iterator of its (ids, batch) pairs; the seconds that it took.

        What cannot be read is raised by `take`, so that the update before is finished first.
        """
        self._held, self.replaced = [], 0
        began = time.perf_counter()
        try:
            for micro in range(self._accumulate):
                ids, batch = self._stop.wait(lambda: following(batches))
                if self._stream.skips:
                    self.replaced += self._stream.replaced(step, micro, ids)
                self._held.append(batch)
        except StopWaiting:
            pass  # the agreement ends the run before this update
        except Exception as error:
            self._error = error
        return time.perf_counter() - began

    def first(self) -> Batch:
        """The first micro-batch, which stays to be taken."""
        if self._error:
            raise self._error
        return self._held[0]

    def take(self) -> list[Batch]:
        """The micro-batches that were read."""
        if self._error:
            raise self._error
        held, self._held = self._held, []
        return held
