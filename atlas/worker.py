"""One rank of one run under any launcher: environment in, files out, the exit code tells the cause.

Reads RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. SIGTERM, SIGINT, SIGHUP and SIGUSR2
mean: save at the next agreed step and leave. Exits with 0 when done, 75 when stopped and resumable, 1 when
failed. Run it as `python -m atlas.worker RUN_DIRECTORY`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from atlas.errors import EXIT_FAILED, EXIT_INTERRUPTED, AtlasError, RunBusyError
from atlas.run import trust
from atlas.run.directory import Run
from atlas.run.failures import failure, record, summary
from atlas.run.lock import Lock, job_id
from atlas.run.signals import Stop
from atlas.run.status import begin, end_if_running

log = logging.getLogger("atlas")


def main(path: str | Path) -> int:
    """Train the run in directory `path` as the rank that the environment says."""
    run = Run(path)
    rank = int(os.environ.get("RANK", 0))
    trust.extend_sys_path(run.config_file, run.read_config()["run"]["sys_path"])
    with logged(run, rank):
        try:
            with Stop() as stop, held(run, rank) as lock:
                return enter(run, lock, stop)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            # A person's own code may end the process, with 0 too; the run has not ended by that.
            if not isinstance(error, RunBusyError):  # then the records are another process's
                with contextlib.suppress(OSError):
                    record(run, rank, error)
            show(run, rank, error)
            return EXIT_FAILED if not isinstance(error, KeyboardInterrupt) else EXIT_INTERRUPTED


def enter(run: Run, lock: Lock | None, stop: Stop) -> int:
    """Import torch, which takes its time, and train."""
    from atlas.training.job import train

    outcome = train(run, lock, stop)
    if lock is not None:
        tell(run)
    return outcome.code


@contextlib.contextmanager
def held(run: Run, rank: int) -> Iterator[Lock | None]:
    """Rank 0 holds the lock and marks the run as running; the other ranks hold nothing."""
    if rank != 0:
        yield None
        return
    lock = run.lock
    lock.acquire()
    try:
        if "ATLAS_SUPERVISED" not in os.environ:
            run.failure_file.unlink(missing_ok=True)
        begin(run, job_id())
        yield lock
    except BaseException as error:
        if lock.is_mine():
            state, reason = failure(error)
            with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
                end_if_running(run, state, reason)
        raise
    finally:
        lock.release()


@contextlib.contextmanager
def logged(run: Run, rank: int) -> Iterator[None]:
    """Atlas's log goes to `logs/rankN.log`, warnings of rank 0 to the terminal too."""
    run.logs.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(run.logs / f"rank{rank}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file]
    if rank == 0:
        terminal = logging.StreamHandler()
        terminal.setLevel(logging.WARNING)
        terminal.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        handlers.append(terminal)
    log.setLevel(logging.INFO)
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def show(run: Run, rank: int, error: BaseException) -> None:
    """The error on the terminal and in the rank's log; a person's own code with its traceback."""
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError), open(run.logs / f"rank{rank}.log", "a") as file:
        file.write(text)
        if (told := run.read_failure()) and not isinstance(error, RunBusyError):
            file.write(f"{summary(told)}\n")
    if "ATLAS_SUPERVISED" in os.environ:
        return  # the launcher shows what the first rank to fail had to say, once
    if isinstance(error, KeyboardInterrupt):
        print(f"left at once; the same command goes on from the last checkpoint of {run.path}")
    elif isinstance(error, AtlasError):
        print(f"error: {error}", file=sys.stderr)
    else:
        print(text, file=sys.stderr)
        print(f"the run failed; its log is {run.logs / f'rank{rank}.log'}", file=sys.stderr)


def leave(code: int) -> NoReturn:
    """End this process with `code`, past what its libraries do at the end of a process.

    The threads of a group of ranks, taken apart at the end, now and then wait for a rank that is
    gone, or abort a process that has done its work; and under Slurm submitit would write a result
    that nobody reads, and fail where a kill has left half of one.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tell(run: Run) -> None:
    """How the run ended, and what to type next."""
    from atlas.run.summary import summary

    print(summary(run), flush=True)


if __name__ == "__main__":
    leave(main(sys.argv[1]))
