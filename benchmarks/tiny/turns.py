"""A data set that lets the plain loop take turns with the training that reads it.

Atlas's loop asks for a batch at every step. After each `segment` of steps the clock of Atlas is
stopped here, the plain loop takes as many steps, and Atlas goes on. So both run in one process, in
turns, and nothing in Atlas knows of it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy.typing as npt
import plain
import tiny
import torch


class Turns(tiny.Vectors):
    """Writes the seconds of every segment to the file that BENCHMARK_TURNS names."""

    def __init__(self, segment: int, batch_size: int, steps: int, seed: int = 0) -> None:
        super().__init__(seed)
        self._segment = segment
        self._steps = steps
        with torch.random.fork_rng():
            self._plain = plain.train(batch_size, steps, seed)
            next(self._plain)
        self._asked = 0
        self._clock: tuple[float, float] | None = None
        self.times: dict[str, list[tuple[float, float]]] = {"atlas": [], "plain": []}

    def batch(self, ids: npt.NDArray[Any]) -> dict[str, torch.Tensor]:
        """The samples `ids`, after the plain loop's turn where it is due."""
        if self._asked % self._segment == 0:
            self._turn()
        self._asked += 1
        return super().batch(ids)

    def _turn(self) -> None:
        if self._clock:
            self.times["atlas"].append(since(self._clock))
        beside = children()
        for pid in beside:  # the shipper works for Atlas, in Atlas's time
            os.kill(pid, signal.SIGSTOP)
        self.times["plain"].append(self._plain_segment())
        for pid in beside:
            os.kill(pid, signal.SIGCONT)
        Path(os.environ["BENCHMARK_TURNS"]).write_text(json.dumps(self.times))
        self._clock = clock()

    def _plain_segment(self) -> tuple[float, float]:
        began = clock()
        for _ in range(self._segment):
            next(self._plain)
        return since(began)


def clock() -> tuple[float, float]:
    """Wall time, and the processor time of this thread."""
    return time.perf_counter(), time.thread_time()


def since(began: tuple[float, float]) -> tuple[float, float]:
    """Both times that have passed since `began`."""
    now = clock()
    return now[0] - began[0], now[1] - began[1]


def children() -> list[int]:
    """The processes that this one has started."""
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in text.split()]
