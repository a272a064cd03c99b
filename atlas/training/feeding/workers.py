"""Data workers: processes that read ahead of the training, started, known to work, and ended."""

from __future__ import annotations

import contextlib
import functools
import logging
import mmap
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from atlas.errors import AtlasError
from atlas.run.signals import STOP_SIGNALS
from atlas.system.processes import die_with_parent

log = logging.getLogger(__name__)

T = TypeVar("T")
START_S = 20.0  # a forked process needs thousandths of a second
ATTEMPTS = 5
DIE_S = 0.5  # between what a process that ends leaves torn, and its end


def answers(
    source: Any, requests: Callable[[], Iterable[Any]], workers: int, device: torch.device
) -> Any:
    """What `source` has for each of the requests, in order, read ahead by `workers` processes.

    Workers that do not start are replaced. Before Python 3.12 a child can wait for ever for a lock
    of the interpreter that some thread held while it was forked, and gloo's threads take that lock
    for an instant after every reduction (`_PyThreadState_DeleteExcept` in `PyOS_AfterFork_Child`).
    """
    for _ in range(ATTEMPTS):
        started = mmap.mmap(-1, workers)  # shared with what is forked
        batches = iter(_loader(source, requests(), workers, device, started))
        if _have_started(batches, started):
            return batches
        log.warning("a data worker did not start within %.0f s; all are started anew", START_S)
        end(batches)
    raise AtlasError(f"data.workers={workers}: they did not start in {ATTEMPTS} attempts")


def following(batches: Iterator[T]) -> T:
    """The next of `batches`; where a data worker was killed, that is the error.

    Without this it would often be one of the connection over which the worker had sent a batch.
    """
    try:
        return next(batches)
    except (OSError, EOFError, RuntimeError) as error:
        if pid := _killed(getattr(batches, "_workers", ())):
            raise RuntimeError(
                f"DataLoader worker (pid {pid}) is killed by signal: Killed"
            ) from error
        raise


@contextlib.contextmanager
def ending(batches: Iterator[T]) -> Iterator[Iterator[T]]:
    """A context at whose end the data workers are gone."""
    try:
        yield batches
    finally:
        end(batches)


def end(batches: Any) -> None:
    """End the workers of `batches`, if it has any.

    They ignore SIGTERM, which is how Python would end them at its exit: while a traceback holds the
    iterator, the process would wait for them for ever.
    """
    if getattr(batches, "_worker_pids_set", False):
        torch._C._remove_worker_pids(id(batches))  # or torch calls their end an error
        batches._worker_pids_set = False
        for worker in batches._workers:
            worker.kill()
        batches._shutdown_workers()


def _killed(workers: Iterable[Any]) -> int | None:
    """The pid of a worker that SIGKILL has ended; one that is about to end is waited for."""
    deadline = time.monotonic() + DIE_S
    while workers and time.monotonic() < deadline:
        for worker in workers:
            if worker.exitcode is not None:
                return worker.pid if worker.exitcode == -signal.SIGKILL else None
        time.sleep(0.01)
    return None


def _loader(
    source: Any, requests: Iterable[Any], workers: int, device: torch.device, started: mmap.mmap
) -> DataLoader[Any]:
    return DataLoader(
        source,
        sampler=requests,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4,
        pin_memory=device.type == "cuda",
        worker_init_fn=functools.partial(_start, started),
        # Forked workers share the data set's memory, and it need not be picklable.
        multiprocessing_context="fork",
    )


def _have_started(batches: Any, started: mmap.mmap) -> bool:
    """Wait for the workers; those that have died count, since they are told of when they are asked."""
    deadline = time.monotonic() + START_S
    while True:
        waiting = [w for w, yes in zip(batches._workers, started[:]) if not yes and w.is_alive()]
        if not waiting or time.monotonic() > deadline:
            return not waiting
        time.sleep(0.001)


def _start(started: mmap.mmap, worker: int) -> None:
    """Slurm and a terminal signal every process; a data worker that died would lose the save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    torch.set_num_threads(1)
    started[worker] = 1
