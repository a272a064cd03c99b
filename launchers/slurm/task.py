"""What runs in every task of a Slurm job, and when the job goes back into the queue.

Slurm's signals arrive in every task. SIGUSR2 means preemption, or `signal_delay_s` before the time
limit; SIGTERM means scancel, or preemption with a grace time. The worker saves at the next step on
which all ranks agree, and returns 75. What follows is decided by rank 0 alone, since it has the last
metrics to send, and since a job is requeued once:

- Preempted: requeued, as often as it happens.
- Time limit: requeued, at most `cluster.max_requeues` times, so that a run that gets nowhere ends.
- scancel: not requeued. Slurm sends the same SIGTERM for a preemption with a grace time, so rank 0
  asks it which of the two this is.
- A failure (any other exit code): the batch script decides (`launchers.slurm.epilog`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

from atlas import worker
from atlas.errors import EXIT_DONE, EXIT_STOPPED
from atlas.run.directory import Run
from atlas.run.lock import job_id
from atlas.run.status import State, stop
from launchers.slurm import epilog
from launchers.slurm.queue import first_host, is_preempted, output, seconds

# Slurm sends the signal before a time limit up to a minute early (man sbatch, --signal).
EARLY_S = 60.0
# Ports below the range that Linux uses for outgoing connections (32768 and above).
FIRST_PORT, PORTS = 10_000, 20_000


class Task:
    """What every task of a job calls; pickled by name, with the run's directory and nothing else."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> None:
        """Train, and exit with a code that is right for the whole job."""
        # submitit has installed its own handler of the signal. The worker replaces it while it
        # trains; in the end the handler is what requeues the job.
        handler = getattr(signal.getsignal(signal.SIGUSR2), "__self__", None)
        os.environ.update(rank_environment())
        run, rank = Run(self.path), int(os.environ["RANK"])
        if handler and rank == 0:
            epilog.note_attempt(run, handler._job_paths.folder, str(job_id()), epilog.attempt())
        code = worker.main(self.path)
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # all is saved, so there is nothing to stop
        if rank:
            # Not 75: srun would end rank 0, which still sends the last metrics and requeues the job.
            worker.exit_process(EXIT_DONE if code == EXIT_STOPPED else code)
        if handler and code == EXIT_STOPPED:
            requeue_if_preempted(run, handler)
        worker.exit_process(code)

    def checkpoint(self) -> Any:
        """Return what submitit puts back into the queue: the same task."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def requeue_if_preempted(run: Run, handler: Any) -> None:
    """Requeue the job of a stopped run, unless scancel stopped it; called by rank 0 at its end."""
    state = run.read_status().state
    if state is State.PREEMPTED or (state is State.KILLED and is_preempted()):
        outcome = requeue_job(handler, is_time_limit(run))
        print(outcome, flush=True)
        stop(run, outcome)


def requeue_job(handler: Any, is_time_limit: bool) -> str:
    """Have submitit requeue this job, and return what came of it as the reason of the run's state.

    A time limit uses up one of `cluster.max_requeues`, a preemption none.
    """
    from submitit.core.utils import UncompletedJobError

    cause = "time limit" if is_time_limit else "preempted"
    # submitit would take every preemption of a job with a short limit for a time limit.
    handler.has_timed_out = lambda: is_time_limit
    pickle = handler._job_paths.submitted_pickle
    # Left by a kill while it was being written; submitit would fail on it every time.
    pickle.with_name(f"{pickle.name}.save_tmp").unlink(missing_ok=True)
    try:
        handler.checkpoint_and_try_requeue(signal.SIGUSR2)
    except SystemExit:
        return f"{cause}: saved and back in the queue"
    except UncompletedJobError:
        return f"{cause}: saved; cluster.max_requeues are used up, {epilog.RESUME}"
    except (OSError, subprocess.SubprocessError) as error:
        return f"{cause}: saved; scontrol requeue failed ({error}), {epilog.RESUME}"
    return f"{cause}: saved"


def rank_environment() -> dict[str, str]:
    """Return the environment that the worker reads, from Slurm's variables of this task."""
    slurm = os.environ
    job, restarts = int(slurm["SLURM_JOB_ID"]), int(slurm.get("SLURM_RESTART_COUNT", 0))
    world = {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "MASTER_ADDR": first_host(slurm["SLURM_JOB_NODELIST"]),
        # Another port after each requeue: on a lost node, ranks of the last attempt may still run.
        "MASTER_PORT": str(FIRST_PORT + (job + 7919 * restarts) % PORTS),
        "ATLAS_LAUNCHER": "slurm",
    }
    if int(world["WORLD_SIZE"]) > 1:
        # As torchrun does: ranks with one thread per core each would slow each other down.
        threads = slurm.get("SLURM_CPUS_PER_TASK", "1")
        world["OMP_NUM_THREADS"] = slurm.get("OMP_NUM_THREADS", threads)
    return world


def is_time_limit(run: Run) -> bool:
    """Return whether the run was stopped by the signal before its job's time limit."""
    left = seconds(output("squeue", "-h", "-j", os.environ["SLURM_JOB_ID"], "-o", "%L").strip())
    if left is None:
        return False
    # The time that was left when the run was saved: sending the last metrics took some since then.
    saved = [path.stat().st_mtime for path in run.checkpoints.glob("[0-9]*/meta.json")]
    since = time.time() - max(saved, default=time.time())
    return left + since <= run.read_config()["cluster"]["signal_delay_s"] + EARLY_S
