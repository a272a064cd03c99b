"""Cheap ranks: processes forked from the test, without torch and without a model."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from atlas.run.directory import Run

FORK = multiprocessing.get_context("fork")


def fork(target: Callable[..., Any], *args: Any) -> BaseProcess:
    process = FORK.Process(target=target, args=args)
    process.start()
    return process


def leave(code: int, after_s: float = 0) -> None:
    """A rank that ends with `code`; below 0, by a signal."""
    time.sleep(after_s)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def obey(ready: Path, codes: dict[int, int]) -> None:
    """A rank that ends by the code that `codes` has for a signal, and hears no other."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        code = codes.get(number)
        signal.signal(
            number, signal.SIG_IGN if code is None else lambda *_, code=code: os._exit(code)
        )
    ready.touch()
    while True:
        time.sleep(1)


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def make_run(folder: Path) -> Run:
    run = Run(folder)
    run.logs.mkdir(parents=True)
    run.update_status(id=run.id, state="running", step=7, reason=None)
    return run
