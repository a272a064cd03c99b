"""Processes: which one a number means, and children that end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def start_time(pid: int) -> int:
    """Return when process `pid` started, in clock ticks since boot; -1 if it has ended.

    A zombie counts as ended: it writes nothing more, and only its parent can remove it.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    # The command's name, in parentheses, can hold spaces and parentheses: count from its end.
    state, *fields = stat.rpartition(")")[2].split()
    return -1 if state == "Z" else int(fields[18])


def is_running(pid: int, started: int) -> bool:
    """Return whether the process that had `pid` and start time `started` still runs.

    The number alone is not enough: the kernel gives it to another process later.
    """
    return start_time(pid) == started


def die_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send signal `number` to this process when its parent ends; Linux only.

    Give the number of the `parent` if that may end before this call.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)
