"""One rank of one run under any launcher: environment in, files out, the exit code tells the cause.

It reads RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. SIGTERM, SIGINT, SIGHUP and SIGUSR2
mean: save at the next agreed step and leave. The exit code is 0 if the run is finished, 75 if it stopped
and can be resumed, 1 if it failed. Run it as `python -m atlas.worker RUN_DIRECTORY`.
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
from typing import Any, NoReturn

from atlas.errors import EXIT_FAILED, EXIT_INTERRUPTED, AtlasError, RunBusyError
from atlas.run import trust
from atlas.run.directory import Run
from atlas.run.failures import describe_failure, record_failure, state_after
from atlas.run.lock import Lock, job_id
from atlas.run.signals import Stop
from atlas.run.status import begin, end_if_running
from atlas.run.summary import summary

log = logging.getLogger("atlas")


def main(path: str | Path) -> int:
    """Train the run in directory `path` as the rank that the environment names; return the exit code."""
    run = Run(path)
    rank = int(os.environ.get("RANK", 0))
    config = run.read_config()
    trust.extend_sys_path(run.config_file, config["run"]["sys_path"])
    with logging_to_files(run, rank):
        try:
            with Stop() as stop, holding_lock(run, rank) as lock:
                return train_rank(run, config, lock, stop)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            # The user's code may call sys.exit, also with 0; that does not finish the run.
            if not isinstance(error, RunBusyError):  # then the records are another process's
                with contextlib.suppress(OSError):
                    record_failure(run, rank, error)
            report_error(run, rank, error)
            return EXIT_FAILED if not isinstance(error, KeyboardInterrupt) else EXIT_INTERRUPTED


def train_rank(run: Run, config: dict[str, Any], lock: Lock | None, stop: Stop) -> int:
    """Train, and have rank 0 print how the run ended; return the exit code."""
    from atlas.training.job import train  # imports torch, which takes seconds

    outcome = train(run, config, lock, stop)
    if lock is not None:
        print(summary(run), flush=True)
    return outcome.code


@contextlib.contextmanager
def holding_lock(run: Run, rank: int) -> Iterator[Lock | None]:
    """Hold the lock and mark the run as running, on rank 0; other ranks hold nothing.

    The order matters if the process is killed in between. The lock comes first, since only its holder
    may write. A status of `running` without a live holder is judged as killed, so the status says how
    the run ended before the lock is released.
    """
    if rank != 0:
        yield None
        return
    lock = run.lock
    lock.acquire()
    try:
        if "ATLAS_SUPERVISED" not in os.environ:  # the launcher did so before it started the ranks
            run.failure_file.unlink(missing_ok=True)
        begin(run, job_id())
        yield lock
    except BaseException as error:
        if lock.is_mine():
            with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
                end_if_running(run, *state_after(error))
        raise
    finally:
        lock.release()


@contextlib.contextmanager
def logging_to_files(run: Run, rank: int) -> Iterator[None]:
    """Write Atlas's log to `logs/rankN.log`, and warnings of rank 0 to the terminal too."""
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


def report_error(run: Run, rank: int, error: BaseException) -> None:
    """Write `error` to the rank's log and, unless a launcher does so, to the terminal.

    Errors that Atlas raises for the user are printed without a traceback.
    """
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError), open(run.logs / f"rank{rank}.log", "a") as file:
        file.write(text)
        if (failure := run.read_failure()) and not isinstance(error, RunBusyError):
            file.write(f"{describe_failure(failure)}\n")
    if "ATLAS_SUPERVISED" in os.environ:
        return  # the launcher prints the failure record of the first rank to fail, once
    if isinstance(error, KeyboardInterrupt):
        print(f"aborted; run the same command to resume {run.path} from its last checkpoint")
    elif isinstance(error, AtlasError):
        print(f"error: {error}", file=sys.stderr)
    else:
        print(text, file=sys.stderr)
        print(f"the run failed; its log is {run.logs / f'rank{rank}.log'}", file=sys.stderr)


def exit_process(code: int) -> NoReturn:
    """End this process with `code`, without what its libraries do at the end of a process.

    The threads of a process group, taken apart at the end, sometimes wait for a rank that is gone,
    or abort a process that has done its work. Under Slurm, submitit would write a result that nobody
    reads, and would fail where a kill has left half of one.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    exit_process(main(sys.argv[1]))
