"""What runs in every task of a job on Slurm."""

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
# Ports below the range that Linux gives to outgoing connections (32768 and above).
FIRST_PORT, PORTS = 10_000, 20_000


class Task:
    """What every task of a job calls; pickled by name, with the run's directory and nothing else."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> None:
        """Train, and exit with a code that is true for the whole job."""
        # submitit has put its own handler here. It is the right one until the worker takes over,
        # and what requeues the job in the end.
        handler = getattr(signal.getsignal(signal.SIGUSR2), "__self__", None)
        os.environ.update(rank_environment())
        run, rank = Run(self.path), int(os.environ["RANK"])
        if handler and rank == 0:
            epilog.note_attempt(run, handler._job_paths.folder, str(job_id()), epilog.attempt())
        code = worker.main(self.path)
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # all is saved, nothing is left to be asked for
        if rank:
            # Not 75: srun would end rank 0, which has the last metrics to send and the job to
            # requeue.
            worker.exit_process(EXIT_DONE if code == EXIT_STOPPED else code)
        if handler and code == EXIT_STOPPED:
            settle(run, handler)
        worker.exit_process(code)

    def checkpoint(self) -> Any:
        """What submitit puts back into the queue: the same task."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def settle(run: Run, handler: Any) -> None:
    """Rank 0's last act in a job that was asked to stop: requeue it where that was a preemption."""
    state = run.read_status().state
    if state is State.PREEMPTED or (state is State.KILLED and is_preempted()):
        told = requeue(handler, is_out_of_time(run))
        print(told, flush=True)
        stop(run, told)


def requeue(handler: Any, timed_out: bool) -> str:
    """Have submitit requeue this job; says what came of it.

    A time limit uses up one of the requeues that were granted, a preemption none.
    """
    from submitit.core.utils import UncompletedJobError

    cause = "time limit" if timed_out else "preempted"
    # submitit's own judgement takes every preemption under a short limit for a time limit.
    handler.has_timed_out = lambda: timed_out
    pickle = handler._job_paths.submitted_pickle
    # Left by a kill in the middle of writing it; submitit would stop at it for good.
    pickle.with_name(f"{pickle.name}.save_tmp").unlink(missing_ok=True)
    try:
        handler.checkpoint_and_try_requeue(signal.SIGUSR2)
    except SystemExit:
        return f"{cause}: saved and back in the queue"
    except UncompletedJobError:
        return f"{cause}: saved; cluster.max_requeues are used up, the same command goes on"
    except (OSError, subprocess.SubprocessError) as error:
        return f"{cause}: saved; scontrol requeue failed ({error}), the same command goes on"
    return f"{cause}: saved"


def rank_environment() -> dict[str, str]:
    """What the worker reads, from Slurm's variables of this task."""
    slurm = os.environ
    job, restarts = int(slurm["SLURM_JOB_ID"]), int(slurm.get("SLURM_RESTART_COUNT", 0))
    world = {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "MASTER_ADDR": first_host(slurm["SLURM_JOB_NODELIST"]),
        # Another port after a requeue: ranks of the earlier attempt can live on, on a lost node.
        "MASTER_PORT": str(FIRST_PORT + (job + 7919 * restarts) % PORTS),
        "ATLAS_LAUNCHER": "slurm",
    }
    if int(world["WORLD_SIZE"]) > 1:
        # As torchrun does it: every rank with a thread a core would take turns with the others.
        threads = slurm.get("SLURM_CPUS_PER_TASK", "1")
        world["OMP_NUM_THREADS"] = slurm.get("OMP_NUM_THREADS", threads)
    return world


def is_out_of_time(run: Run) -> bool:
    """Whether the run was stopped by the signal before its job's time limit."""
    left = seconds(output("squeue", "-h", "-j", os.environ["SLURM_JOB_ID"], "-o", "%L").strip())
    if left is None:
        return False
    # As it was when the run was saved: since then the last metrics were sent.
    saved = [path.stat().st_mtime for path in run.checkpoints.glob("[0-9]*/meta.json")]
    since = time.time() - max(saved, default=time.time())
    return left + since <= float(run.read_config()["cluster"]["signal_delay_s"]) + EARLY_S
