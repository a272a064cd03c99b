"""The processes of one run on this machine: started, watched, stopped together."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
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
    """A context whose processes are forked from one that has imported torch once.

    Asked for early, it imports torch while the configurations are still being composed.
    """
    context = multiprocessing.get_context("forkserver")
    # `__main__` too: otherwise every rank would import train.py, and Hydra with it.
    context.set_forkserver_preload(["__main__", "launchers.local.warm"])
    # What asks all processes to stop, as a terminal, Slurm and `timeout` do, is for the launcher. It
    # would end this one, and with it the ranks.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return context


class Ranks:
    """The ranks of one run; `gpus` are the devices they may use (None: whatever is visible).

    A run that is `alone` has its rank 0 on the terminal and its own shipper. `threads` is how many
    each rank computes with on the CPU.
    """

    def __init__(
        self,
        context: ForkServerContext,
        run: Run,
        world_size: int,
        gpus: Sequence[str] | None,
        alone: bool,
        threads: int,
    ) -> None:
        self.run = run
        run.failure_file.unlink(missing_ok=True)
        shared = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "ATLAS_LAUNCHER": "local",
            "ATLAS_SUPERVISED": "1",
            "ATLAS_THREADS": str(threads),
            **({} if alone else {SHIPPED_BY_POOL: "1"}),
            **({} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}),
        }
        self._processes: list[ForkServerProcess] = []
        for rank in range(world_size):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = None if alone and rank == 0 else run.logs / f"rank{rank}.log"
            process = context.Process(
                target=_enter, args=(str(run.path), environment, str(log) if log else None)
            )
            process.start()
            self._processes.append(process)

    @property
    def sentinels(self) -> list[int]:
        """What becomes ready when a rank that still runs ends."""
        return [p.sentinel for p in self._processes if p.exitcode is None]

    def signal(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        for process in self._processes:
            if process.pid and process.exitcode is None:
                os.kill(process.pid, number)

    def poll(self) -> int | None:
        """The exit code of the run once every rank has ended, else None.

        When a rank fails the others wait for it in vain: they are stopped at once, and what the
        first one to fail had to say is recorded.
        """
        codes = [p.exitcode for p in self._processes]
        bad = [c for c in codes if c not in (None, EXIT_DONE, EXIT_STOPPED)]
        if bad:
            self.signal(signal.SIGKILL)
            for process in self._processes:
                process.join()
            self._record(codes)
            return EXIT_INTERRUPTED if EXIT_INTERRUPTED in bad else EXIT_FAILED
        if None in codes:
            return None
        return max(c for c in codes if c is not None)

    def _record(self, codes: Sequence[int | None]) -> None:
        """Leave the reason in `status.json`, for a rank that could not say it by itself too."""
        if self.run.lock.live_holder():
            return  # ours are gone: another process has the run, and it is not ours to judge
        failure = self.run.read_failure()
        if failure is None:
            failure = record_exit(
                self.run, *next((r, c) for r, c in enumerate(codes) if c not in (None, 0, 75))
            )
        end_if_running(self.run, State(failure["state"]), failure["reason"])


def free_port() -> int:
    """A TCP port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def failure_text(run: Run) -> str:
    """What the first rank to fail had to say, and where its log is."""
    failure = run.read_failure()
    if failure is None:
        try:
            run.refuse_if_live()  # another process had the lock before ours
        except RunBusyError as error:
            return f"error: {error}"
        return f"error: {run.read_status().reason}\nits logs are in {run.logs}"
    if not failure["traceback"]:
        return f"error: {failure['message']}"
    log = run.logs / f"rank{failure['rank']}.log"
    where = f"rank {failure['rank']} on {failure['host']} failed; its log is {log}"
    return f"{failure['traceback']}\n{where}"


def _enter(path: str, environment: Mapping[str, str], log: str | None) -> None:
    """What a rank does from its fork on."""
    die_with_parent()  # which is the warm process, and that ends with the launcher
    os.setpgrp()  # a terminal's Ctrl-C goes to the launcher, which hands it on once
    for number in STOP_SIGNALS:  # which the warm process ignores
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
