"""The lock of a run's directory: one writer at a time, also across hosts and requeues.

The lock is the file `lock.json`, which names its holder. To judge a holder and to replace the file is
one act under the guard of the folder above, so of two processes that find a dead holder one gets the
lock. On this host a holder is alive while a process with its pid and start time exists. On another host
only the heartbeat, the file's modification time, tells: a holder that has been silent for `STALE_S`
seconds is taken for dead.

A job that Slurm requeues has to resume at once, and not `STALE_S` seconds later. The ranks of its
previous attempt may live on, on a node that the controller has lost. So the same job with a higher
restart count takes the lock over, even from a holder that seems alive, and every writer checks that it
still holds the lock before each flush and save: the old rank 0 stops writing, whatever it computes.

What a kill leaves behind: between the replacement of the file and the first heartbeat, a file that is
fresh and names a dead process, which is judged by its pid or goes stale; during `release`, either the
file or nothing. Nothing has to be removed by hand.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from atlas.errors import RunBusyError
from atlas.system.files import guarded, write_json
from atlas.system.processes import is_running, start_time

BEAT_S = 10.0
# A holder on another host is taken for dead when its heartbeat is older than this.
STALE_S = 90.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `started` (clock ticks since boot) tells a reused pid from the first."""

    host: str
    pid: int
    started: int
    job_id: str | None
    restarts: int
    token: str

    @classmethod
    def me(cls) -> Holder:
        """Return this process as a holder, with its Slurm job if it is part of one."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=start_time(os.getpid()),
            job_id=job_id(),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            token=uuid.uuid4().hex,
        )


class Lock:
    """A lock with a heartbeat, from `acquire` to `release`; a dead holder loses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mine: Holder | None = None
        self._stop = threading.Event()

    def acquire(self) -> None:
        """Take the lock; raise `RunBusyError` with host and pid of a holder that is alive."""
        me = Holder.me()
        with guarded(self.path.parent.parent):
            other = self.holder()
            if other and self._is_live(other) and not _supersedes(me, other):
                raise RunBusyError(
                    f"{self.path.parent} is being written by process {other.pid} on {other.host}"
                    + (f" (job {other.job_id})" if other.job_id else "")
                    + f", last heartbeat {self.age():.0f} s ago; wait for it, or stop it first"
                )
            write_json(self.path, asdict(me))
        self._mine = me
        self._stop.clear()
        threading.Thread(target=self._beat, name="atlas-heartbeat", daemon=True).start()

    def release(self) -> None:
        """Release the lock, unless another process has taken it over."""
        self._stop.set()
        with guarded(self.path.parent.parent):
            if self.is_mine():
                self.path.unlink(missing_ok=True)
        self._mine = None

    def is_mine(self) -> bool:
        """Return whether this process still holds the lock; asked before every save and flush."""
        holder = self.holder()
        return bool(self._mine and holder and holder.token == self._mine.token)

    def require_mine(self) -> None:
        """Raise `RunBusyError` if this process no longer holds the lock; call it before writing."""
        if not self.is_mine():
            now = self.holder()
            by = f"process {now.pid} on {now.host}" if now else "nobody"
            raise RunBusyError(
                f"{self.path.parent} is now held by {by}; this process stops writing to it"
            )

    def holder(self) -> Holder | None:
        """Return the recorded holder, dead or alive."""
        try:
            return Holder(**json.loads(self.path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return None  # no version of Atlas that still runs writes such a file

    def live_holder(self) -> Holder | None:
        """Return the holder if it is alive."""
        holder = self.holder()
        return holder if holder and self._is_live(holder) else None

    def age(self) -> float:
        """Return the seconds since the last heartbeat."""
        try:
            return max(0.0, time.time() - self.path.stat().st_mtime)
        except FileNotFoundError:
            return float("inf")

    def _is_live(self, holder: Holder) -> bool:
        if holder.host == socket.gethostname():
            return is_running(holder.pid, holder.started)
        return self.age() < STALE_S

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if self.is_mine():
                    os.utime(self.path)


def job_id() -> str | None:
    """Return the Slurm job of this process as squeue writes it: `12`, in an array `12_3`."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{job}_{task}" if job and task else job


def _supersedes(me: Holder, other: Holder) -> bool:
    """Return whether `me` is a later attempt of the job that `other` belongs to."""
    return me.job_id is not None and me.job_id == other.job_id and me.restarts > other.restarts
