"""Which process a number means, and children that end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from atlas.system.processes import is_running, start_time

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# A parent that prints the number of a child and waits; the child dies with it.
PARENT = """
import subprocess, sys, time
code = "import time; from atlas.system.processes import die_with_parent; die_with_parent();"
child = subprocess.Popen([sys.executable, "-c", code + "print('ready', flush=True); time.sleep(60)"],
    stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def is_ended(pid: int) -> bool:
    return start_time(pid) == -1


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_number_means_one_process_only():
    me = os.getpid()
    assert is_running(me, start_time(me)) and not is_running(me, start_time(me) - 1)


def test_an_ended_process_does_not_run_even_before_its_parent_has_noticed():
    child = subprocess.Popen(["sleep", "60"])
    started = start_time(child.pid)
    assert is_running(child.pid, started)
    child.kill()
    assert until(lambda: is_ended(child.pid))  # a zombie
    child.wait()
    assert not is_running(child.pid, started)


def test_a_child_dies_with_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert not is_ended(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert until(lambda: is_ended(child))
