"""The ranks of one run on this machine: started, watched and stopped together.

Ranks are forked from a warm process, Python's fork server, which has imported torch once. Importing
torch takes seconds and most of the start of a small run; forked ranks share it, and so do all runs of
a sweep. Ranks cannot be forked from the launcher itself: it does not import torch (so that a wrong
command line is refused at once), and it may have threads by then, whose locks a fork would copy in
whatever state they are.

Torch elastic (torchrun's agent) is not used here: it would import torch in the launcher, and it turns
exit code 75, by which a rank reports that it was stopped and saved, into a failure.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from atlas import worker
from atlas.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, RunBusyError
from atlas.record.shipping.shipper import SHIPPED_BY_POOL
from atlas.run.directory import Run
from atlas.run.failures import record_exit
from atlas.run.signals import STOP_SIGNALS
from atlas.run.status import State, end_if_running
from atlas.system.processes import die_with_parent
from atlas.system.terminal import ignore_closed_output


def warm_context() -> ForkServerContext:
    """Return a context whose processes are forked from one that has imported torch.

    Called early, that process imports torch while the configurations are still being composed.
    """
    context = multiprocessing.get_context("forkserver")
    # `__main__` too: otherwise every rank would import train.py, and Hydra with it.
    context.set_forkserver_preload(["__main__", "launchers.local.warm"])
    # The warm process is in the launcher's process group and must ignore what stops that group:
    # if it ended, the ranks would end with it. It inherits what is ignored here.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return context


class Ranks:
    """The processes of one run, in the order of their ranks."""

    def __init__(self, run: Run, processes: Sequence[BaseProcess]) -> None:
        self.run = run
        self._processes = processes

    @classmethod
    def start(
        cls,
        context: ForkServerContext,
        run: Run,
        world_size: int,
        gpus: Sequence[str] | None,
        is_alone: bool,
        threads: int,
    ) -> Ranks:
        """Start the ranks of `run`.

        `gpus` are the devices that they may use; with None they see what the launcher sees. A run
        that `is_alone` has its rank 0 on the terminal and a shipper of its own. Each rank computes
        with `threads` threads on the CPU.
        """
        run.failure_file.unlink(missing_ok=True)
        shared = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "ATLAS_LAUNCHER": "local",
            "ATLAS_SUPERVISED": "1",
            "ATLAS_THREADS": str(threads),
            **({} if is_alone else {SHIPPED_BY_POOL: "1"}),
            **({} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}),
        }
        processes = []
        for rank in range(world_size):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = None if is_alone and rank == 0 else str(run.logs / f"rank{rank}.log")
            process = context.Process(target=enter, args=(str(run.path), environment, log))
            process.start()
            processes.append(process)
        return cls(run, processes)

    @property
    def sentinels(self) -> list[int]:
        """File descriptors that become ready when a rank that still runs ends."""
        return [p.sentinel for p in self._processes if p.exitcode is None]

    def signal(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        for process in self._processes:
            if process.pid and process.exitcode is None:
                os.kill(process.pid, number)

    def poll(self) -> int | None:
        """Return the exit code of the run once every rank has ended, else None.

        When a rank fails, the others wait for it in a collective and would never end. They are
        killed at once, and the failure of the first one is recorded.
        """
        codes = [p.exitcode for p in self._processes]
        failed = [c for c in codes if c not in (None, EXIT_DONE, EXIT_STOPPED)]
        if failed:
            self.signal(signal.SIGKILL)
            for process in self._processes:
                process.join()
            self._record_failure(codes)
            return EXIT_INTERRUPTED if EXIT_INTERRUPTED in failed else EXIT_FAILED
        if None in codes:
            return None
        return max(c for c in codes if c is not None)

    def _record_failure(self, codes: Sequence[int | None]) -> None:
        """Write the reason to `status.json`, also for a rank that was killed and could not."""
        if self.run.lock.live_holder():
            return  # our ranks have ended, so another process has taken the run over
        failure = self.run.read_failure()
        if failure is None:
            well = (None, EXIT_DONE, EXIT_STOPPED)
            rank, code = next((r, c) for r, c in enumerate(codes) if c not in well)
            assert code is not None
            failure = record_exit(self.run, rank, code)
        end_if_running(self.run, State(failure["state"]), failure["reason"])


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def failure_text(run: Run) -> str:
    """Return the error of the first rank that failed, and where its log is."""
    failure = run.read_failure()
    if failure is None:
        try:
            run.refuse_if_live()  # another process took the lock before our ranks
        except RunBusyError as error:
            return f"error: {error}"
        return f"error: {run.read_status().reason}\nits logs are in {run.logs}"
    if not failure["traceback"]:
        return f"error: {failure['message']}"
    log = run.logs / f"rank{failure['rank']}.log"
    where = f"rank {failure['rank']} on {failure['host']} failed; its log is {log}"
    return f"{failure['traceback']}\n{where}"


def enter(path: str, environment: Mapping[str, str], log: str | None) -> None:
    """Train as one rank of the run in `path`, and exit; called in the forked process."""
    die_with_parent()  # the parent is the warm process, which ends with the launcher
    os.setpgrp()  # the launcher alone hears the terminal's Ctrl-C, and forwards it once
    for number in STOP_SIGNALS:  # the warm process ignores them
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    if log:
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        sys.stdout.flush()
        os.dup2(fd, 1)
        os.dup2(fd, 2)
    ignore_closed_output()
    raise SystemExit(worker.main(Path(path)))
