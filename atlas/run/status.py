"""The life of a run: its states, `status.json`, and the verbs that change them.

      (new)
        │ Run.create
        ▼            begin                end
     queued ───────────────▶ running ───────────▶ finished | failed | killed | preempted
      ▲  ▲                    │   ▲                  │           │        │          │
      │  └───── requeue ──────┘   └───── begin ──────┤           │        │          │
      │                                              │           │        │          │
      └───────── queue, requeue ─────────────────────┴───────────┴────────┴──────────┘

Who may change a state:

- The process that creates a run: to `queued`, once (`Run.create`).
- The launcher that submits a Slurm job: `queue`, under the guard that also protects the lock. Rank 0 of a
  job that starts at once waits for it, so its `begin` comes second.
- Rank 0, which holds the run's lock: `begin` first, and `end` last. If its job was preempted, `stop`
  after that, with what became of the job: back in the queue, or why not.
- Whoever outlives the ranks, for those that could not write it themselves: `end_if_running` (the local
  launcher), `end` and `requeue` (the epilog of the batch script, under the guard, if the job has not
  been submitted or requeued since), and `undo_requeue` if Slurm refuses.

A recorded `running` is judged by the reader: without a live lock holder the run was killed
(`Run.judge_state`). No reader writes that down: it does not hold the lock, and may be wrong about a
holder on another host.

`restarts` counts the attempts after the first, whoever starts them. An attempt counts once: when its job
enters the queue, or at `begin` if no job did (the run was in a later state than `queued`).

Fields that this version does not know are kept: another version of Atlas may have written them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atlas.run.directory import Run


class State(str, Enum):
    """The state of a run, as `status.json` writes it."""

    QUEUED = "queued"  # created, or waiting in a queue
    RUNNING = "running"
    PREEMPTED = "preempted"  # stopped for another job, or by a time limit; saved
    FINISHED = "finished"
    FAILED = "failed"
    KILLED = "killed"  # stopped by the user, or lost its process; the last checkpoint is valid

    def __str__(self) -> str:
        return self.value

    @property
    def is_over(self) -> bool:
        """Whether nothing works on the run or will by itself."""
        return self not in (State.QUEUED, State.RUNNING)

    @property
    def is_stopped(self) -> bool:
        """Whether the run ended before its last step without having failed."""
        return self in (State.PREEMPTED, State.KILLED)


@dataclass(frozen=True)
class Status:
    """A snapshot of `status.json`; a run without one has the defaults, and `state` None."""

    id: str | None = None
    name: str | None = None
    state: State | None = None
    reason: str | None = None
    step: int = 0  # updates taken
    steps: int | None = None
    best: Mapping[str, Any] | None = None  # {"metric", "value", "step"}
    last: Mapping[str, float] = field(default_factory=dict)  # the last value of every metric
    restarts: int = 0
    world_size: int | None = None
    launcher: str | None = None
    host: str | None = None
    pid: int | None = None
    job_id: str | None = None
    mlflow_run_id: str | None = None
    created: float | None = None  # seconds since 1970
    updated: float | None = None  # seconds since 1970
    command: str | None = None
    git: Mapping[str, Any] | None = None  # the version of the code

    @classmethod
    def parse(cls, stored: Mapping[str, Any]) -> Status:
        """Return the snapshot of `stored`, without fields that this version does not know.

        Raise `ValueError` for a state that it does not know.
        """
        known = {f.name: stored[f.name] for f in fields(cls) if stored.get(f.name) is not None}
        if "state" in known:
            known["state"] = State(known["state"])
        return cls(**known)


def queue(run: Run, launcher: str, job_id: str) -> None:
    """Record that `run` waits in the queue as job `job_id`."""
    before = run.read_status()
    run.failure_file.unlink(missing_ok=True)  # it belongs to an earlier job
    run.update_status(
        state=State.QUEUED,
        reason=None,
        launcher=launcher,
        job_id=job_id,
        pid=None,
        restarts=before.restarts + _is_again(before),
    )


def begin(run: Run, job_id: str | None) -> None:
    """Record that this process trains `run` from now on, as its rank 0."""
    before = run.read_status()
    run.update_status(
        state=State.RUNNING,
        reason=None,
        restarts=before.restarts + _is_again(before),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        launcher=os.environ.get("ATLAS_LAUNCHER", "local"),
        host=socket.gethostname(),
        pid=os.getpid(),
        job_id=job_id,
    )


def end(run: Run, state: State, reason: str | None, **results: Any) -> None:
    """Record how `run` ended, with further fields of the status in `results`."""
    run.update_status(state=state, reason=reason, **results)


def end_if_running(run: Run, state: State, reason: str | None) -> None:
    """Record how `run` ended, unless another process has done so."""
    if run.read_status().state is State.RUNNING:
        end(run, state, reason)


def stop(run: Run, reason: str) -> None:
    """Record that `run` was preempted and saved; `reason` says whether its job is in the queue."""
    end(run, State.PREEMPTED, reason)


def requeue(run: Run, reason: str) -> None:
    """Record that the job of `run` goes back into the queue after a failure."""
    run.failure_file.unlink(missing_ok=True)  # the next attempt writes its own
    run.update_status(state=State.QUEUED, reason=reason, restarts=run.read_status().restarts + 1)


def undo_requeue(run: Run, reason: str) -> None:
    """Record that the queue refused the job: `run` has failed after all."""
    end(run, State.FAILED, reason, restarts=run.read_status().restarts - 1)


def _is_again(before: Status) -> bool:
    """Return whether an attempt that starts now is a further one, not yet counted by the queue."""
    return before.state not in (None, State.QUEUED)
