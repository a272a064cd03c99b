"""A run in Slurm's queue: its log, how to follow it, and its end."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from atlas.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, AtlasError
from atlas.run.directory import Run
from atlas.run.status import State
from atlas.run.summary import summary
from launchers.base import Handle
from launchers.slurm.queue import ENDED, QUERY_S, job_state

EXIT_CODES: dict[State | None, int] = {
    State.FINISHED: EXIT_DONE,
    State.PREEMPTED: EXIT_STOPPED,
    State.KILLED: EXIT_STOPPED,
}
POLL_S = 2.0


class SlurmHandle(Handle):
    """A run in Slurm's queue; `jobs` are the ids of all jobs that were submitted with it."""

    def __init__(self, run: Run, job_id: str, folder: Path, jobs: Sequence[str]) -> None:
        super().__init__(run)
        self.job_id = job_id
        self.folder = folder
        self._jobs = jobs
        self._times_seen_ended = 0

    @property
    def log(self) -> Path:
        """What rank 0 prints and what Slurm says about the job; other ranks' logs are next to it."""
        return self.folder / f"{self.job_id}_0_log.out"

    def wait(self) -> int:
        """Block until the run has ended and return its exit code; Ctrl-C leaves the job alone."""
        try:
            while (code := self._exit_code()) is None:
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            stop = f"scancel {self.job_id} stops it"
            print(f"\nno longer waiting; job {self.job_id} continues ({stop})")
            raise SystemExit(EXIT_INTERRUPTED) from None
        if len(self._jobs) == 1:
            self._report(code)
        return code

    def cancel(self) -> None:
        """Cancel the job; Slurm signals the run, which saves and stops."""
        subprocess.run(["scancel", self.job_id], check=False, timeout=QUERY_S)

    def describe(self) -> str:
        """Return where the job is and how to follow it; the same text for every run of an array."""
        if len(self._jobs) > 1:
            array = self.job_id.partition("_")[0]
            return (
                f"job array {array} of {len(self._jobs)} runs is in Slurm's queue\n"
                f"  state  squeue -r -j {array}\n"
                f"  logs   {self.folder}/{array}_<run>_0_log.out\n"
                f"  stop   scancel {array}   (each run saves first; run the same command to resume)"
            )
        return (
            f"job {self.job_id} is in Slurm's queue\n"
            f"  state  squeue -j {self.job_id}\n"
            f"  log    tail -F {self.log}\n"
            f"  stop   scancel {self.job_id}   (it saves first; run the same command to resume)"
        )

    def _exit_code(self) -> int | None:
        """Return the exit code, or None while the job can still change the run.

        A job whose node was lost looks ended for a moment before Slurm requeues it, so an end
        counts only when it is seen twice, unless the run itself says that it has ended.
        """
        try:
            now = job_state(self.job_id)
        except AtlasError:  # the controller does not answer for a while
            return None
        state = self.run.read_status().state  # read last: it can have ended in between
        has_ended = now is None or now in ENDED
        if state in (State.FINISHED, State.FAILED) and (has_ended or now == "COMPLETING"):
            return EXIT_CODES.get(state, EXIT_FAILED)
        self._times_seen_ended = self._times_seen_ended + 1 if has_ended else 0
        return EXIT_CODES.get(state, EXIT_FAILED) if self._times_seen_ended > 1 else None

    def _report(self, code: int) -> None:
        print(summary(self.run))
        if code != EXIT_DONE:
            print(f"  log {self.log}", flush=True)
