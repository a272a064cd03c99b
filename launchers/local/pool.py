"""Many runs on one machine: as many at once as fit, each on devices of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

from atlas.errors import EXIT_STOPPED
from atlas.run.directory import Run
from atlas.run.signals import signals_to_handle
from launchers.local.ranks import Ranks, warm_context

POLL_S = 0.1  # how long a signal waits to be handed on
LAST_WORDS_S = 3.0


class Pool:
    """Leases places to runs: `gpus` by name, or `places` on the CPU, `size` ranks a run."""

    def __init__(self, size: int, gpus: Sequence[str], places: int, threads: int) -> None:
        self._size = size
        self._free_gpus = list(gpus)
        self._on_gpus = bool(gpus)
        self._places = len(gpus) // size if gpus else places
        self._threads = threads
        self._context = warm_context()
        self._noted: list[int] = []
        self._stopping = False
        self._interrupts = 0
        self._end_at = float("inf")

    def run(self, runs: Sequence[Run], ended: Callable[[Run, int], None]) -> list[int]:
        """Run all of `runs`; `ended` is told of each as it ends. The exit codes, in order.

        The first Ctrl-C (or SIGTERM, or SIGUSR2) asks every run to save and stop and starts no
        more; the second Ctrl-C ends them at once.
        """
        codes = dict.fromkeys(range(len(runs)), EXIT_STOPPED)
        waiting = list(range(len(runs)))
        active: dict[int, tuple[Ranks, list[str]]] = {}
        with Forwarding(self._noted):
            while active or (waiting and not self._stopping):
                while waiting and len(active) < self._places and not self._stopping:
                    index = waiting.pop(0)
                    active[index] = self._start(runs[index], alone=len(runs) == 1)
                wait([s for ranks, _ in active.values() for s in ranks.sentinels], POLL_S)
                self._hand_on(active)
                for index in list(active):
                    code = active[index][0].poll()
                    if code is not None:
                        codes[index] = code
                        self._free_gpus += active.pop(index)[1]
                        ended(runs[index], code)
        return list(codes.values())

    def _start(self, run: Run, alone: bool) -> tuple[Ranks, list[str]]:
        gpus = [self._free_gpus.pop(0) for _ in range(self._size)] if self._on_gpus else []
        devices = gpus if self._on_gpus else None
        ranks = Ranks(self._context, run, self._size, devices, alone, self._threads)
        return ranks, gpus

    def _hand_on(self, active: dict[int, tuple[Ranks, list[str]]]) -> None:
        """Give every rank the signals that came; ranks that a second Ctrl-C cannot move are ended."""
        while self._noted:
            number = self._noted.pop(0)
            self._stopping = True
            self._interrupts += number == signal.SIGINT
            if self._interrupts == 2:
                self._end_at = time.monotonic() + LAST_WORDS_S
            for ranks, _ in active.values():
                ranks.signal(number)
        if time.monotonic() > self._end_at:
            for ranks, _ in active.values():
                ranks.signal(signal.SIGKILL)


class Forwarding:
    """A context in which the signals that stop a run are noted instead of obeyed."""

    def __init__(self, noted: list[int]) -> None:
        self._noted = noted
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in signals_to_handle():
            self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self._noted.append(number)
            if number == signal.SIGINT:
                print("\nstopping and saving; Ctrl-C again leaves at once", file=sys.stderr)
