"""The lock of a run's directory: one writer at a time, also across hosts and requeues."""

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

BEAT_S = 10.0
# A holder on another host is given up when its heartbeat is older than this; on this host its
# process is looked at instead.
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
        """This process, with its Slurm job where it has one."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            job_id=job_id(),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            token=uuid.uuid4().hex,
        )


class Lock:
    """Held from `acquire` to `release`, with a heartbeat; taken over when the holder is dead."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mine: Holder | None = None
        self._stop = threading.Event()

    def acquire(self) -> None:
        """Take the lock or raise `RunBusyError` naming the live holder's host and pid."""
        me = Holder.me()
        with guarded(self.path.parent.parent):
            other = self.holder()
            if other and self._is_live(other) and not _supersedes(me, other):
                raise RunBusyError(
                    f"{self.path.parent} is being written by process {other.pid} on {other.host}"
                    + (f" (job {other.job_id})" if other.job_id else "")
                    + f", last heard of {self.age():.0f} s ago; wait for it, or stop it first"
                )
            write_json(self.path, asdict(me))
        self._mine = me
        self._stop.clear()
        threading.Thread(target=self._beat, name="atlas-heartbeat", daemon=True).start()

    def release(self) -> None:
        """Give the lock back; a lock that somebody took over is left alone."""
        self._stop.set()
        with guarded(self.path.parent.parent):
            if self.is_mine():
                self.path.unlink(missing_ok=True)
        self._mine = None

    def is_mine(self) -> bool:
        """Whether this process still holds the lock; asked before every save and flush."""
        holder = self.holder()
        return bool(self._mine and holder and holder.token == self._mine.token)

    def check(self) -> None:
        """Raise `RunBusyError` when the lock was taken over by another process."""
        if not self.is_mine():
            now = self.holder()
            by = f"process {now.pid} on {now.host}" if now else "nobody"
            raise RunBusyError(
                f"{self.path.parent} is now held by {by}; this process stops writing to it"
            )

    def holder(self) -> Holder | None:
        """The recorded holder, dead or alive."""
        try:
            return Holder(**json.loads(self.path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return None  # not written by this version of Atlas; nothing live writes such a file

    def live_holder(self) -> Holder | None:
        """The holder, if it is alive."""
        holder = self.holder()
        return holder if holder and self._is_live(holder) else None

    def age(self) -> float:
        """Seconds since the last heartbeat."""
        try:
            return max(0.0, time.time() - self.path.stat().st_mtime)
        except FileNotFoundError:
            return float("inf")

    def _is_live(self, holder: Holder) -> bool:
        if holder.host == socket.gethostname():
            return _started(holder.pid) == holder.started
        return self.age() < STALE_S

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if self.is_mine():
                    os.utime(self.path)


def job_id() -> str | None:
    """The Slurm job that this process is part of, as squeue writes it: `12`, in an array `12_3`."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{job}_{task}" if job and task else job


def _supersedes(me: Holder, other: Holder) -> bool:
    """A requeued job takes over from its own earlier life, whose ranks can outlive their node."""
    return me.job_id is not None and me.job_id == other.job_id and me.restarts > other.restarts


def _started(pid: int) -> int:
    """The start time of a process in clock ticks since boot, -1 where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    fields = stat.rpartition(")")[2].split()
    return -1 if fields[0] == "Z" else int(fields[19])
