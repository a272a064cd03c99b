"""Victims that run as jobs of a Slurm on this machine, and what can happen to a job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from victims import PATIENCE_S, Victim

from atlas.errors import AtlasError
from atlas.run.directory import Run
from atlas.run.status import State
from launchers.slurm.queue import ENDED, job_state

ASK_S = 0.5  # between two questions to the controller
CLUSTER = (
    "cluster=slurm",
    "cluster.device=cpu",
    "cluster.preflight=light",
    "cluster.signal_delay_s=30",
)


class Job(Victim):
    """A run of one rank in Slurm's queue, sent again by the same command until it has finished."""

    def __init__(self, outputs: Path, *overrides: str) -> None:
        super().__init__(outputs, *CLUSTER, "cluster.nproc_per_node=1", *overrides)
        self._job = ""
        self._asked, self._over = 0.0, 0
        self.process: Any = self

    def start(self, code: int | None = None) -> int | None:
        """Put it into the queue; `code` is only for victims that are waited for."""
        self.outputs.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(self.command(), capture_output=True, text=True, env=self.environment)
        with open(self.outputs / "said.log", "a") as log:
            log.write(done.stdout + done.stderr)
        found = re.search(r"^job (\d+) is in", done.stdout, re.MULTILINE)
        if not found:
            raise SystemExit(f"{self.outputs}: not queued\n{done.stdout}{done.stderr}")
        self._job, self._over = found[1], 0
        return None

    def poll(self) -> int | None:
        """0 finished, 75 to be sent again; None while Slurm has it."""
        if time.monotonic() - self._asked < ASK_S:
            return None
        self._asked = time.monotonic()
        try:
            now = job_state(self._job)
        except AtlasError:
            return None
        # Seen twice: a job that its node has lost is over for a moment before it is requeued.
        self._over = self._over + 1 if now is None or now in ENDED else 0
        if self._over < 2:
            return None
        return 0 if Run(self.run).read_status().state is State.FINISHED else 75

    def at_work(self) -> bool:
        """Whether its rank is training now."""
        status = Run(self.run).read_status()
        return status.state is State.RUNNING and status.pid is not None

    def befall(self, what: str) -> bool:
        """Let `what` of `EVENTS` happen to it; whether it was at work then."""
        if not self.at_work():
            return False
        EVENTS[what](self)
        deadline = time.monotonic() + PATIENCE_S
        while self.at_work() and time.monotonic() < deadline:
            time.sleep(0.1)
        return True

    def tell(self, *command: str) -> None:
        """Give one of Slurm's commands for this job."""
        subprocess.run([*command, self._job], check=True, capture_output=True, timeout=60)

    def signal_rank(self, number: int) -> None:
        """Send a signal to its process, past Slurm."""
        pid = Run(self.run).read_status().pid
        assert pid is not None, f"{self.run} has no rank"
        os.kill(pid, number)


EVENTS: dict[str, Callable[[Job], None]] = {
    "job preempted": lambda job: job.tell("scancel", "--signal=USR2"),
    "job requeued at once": lambda job: job.tell("scontrol", "requeue"),
    "job's rank crashed": lambda job: job.signal_rank(signal.SIGSEGV),
    "job's rank killed": lambda job: job.signal_rank(signal.SIGKILL),
    "job cancelled": lambda job: job.tell("scancel"),
}
