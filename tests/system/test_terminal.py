"""Runs whose terminal is closed, or whose processes are all asked to stop at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest
from commands import command, environment, only_run, quick, status, unnamed, wait_for_step

LONG = ("model.pause=0.02", "trainer.steps=2000", "trainer.save_interval=5", "cluster.device=cpu")


def begin(*arguments: str, **more: Any) -> subprocess.Popen[bytes]:
    """A run in a session of its own, as a login gives one."""
    return subprocess.Popen(command(*arguments), env=environment(), start_new_session=True, **more)


def as_from_a_login() -> None:
    """What a shell does between fork and exec; these tests may themselves be run under nohup."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def is_resumable(process: subprocess.Popen[bytes], run: Path, number: signal.Signals) -> bool:
    process.wait(60)
    told = status(run)
    newest = max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))
    assert (process.returncode, told["state"], told["step"]) == (75, "killed", newest)
    return unnamed(told["reason"], number.name) == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_processes_are_asked_to_stop(tmp_path, ranks):
    # As by scancel, at the end of an allocation, and by `timeout`.
    process = begin(*quick(tmp_path, *LONG, f"cluster.nproc_per_node={ranks}", "data.workers=1"))
    run = wait_for_step(tmp_path, 5)
    os.killpg(process.pid, signal.SIGTERM)
    assert is_resumable(process, run, signal.SIGTERM)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_terminal_is_closed(tmp_path, ranks):
    try:
        ours, theirs = pty.openpty()
    except OSError as error:
        pytest.skip(f"no terminal to close: {error}")
    process = begin(
        *quick(tmp_path, *LONG, f"cluster.nproc_per_node={ranks}", "trainer.progress=true"),
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        preexec_fn=as_from_a_login,
    )
    os.close(theirs)
    while not list(tmp_path.glob("*/*/checkpoints/00000005")):
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 4096)
        assert process.poll() is None
    os.close(ours)
    assert is_resumable(process, only_run(tmp_path), signal.SIGHUP)


def test_a_run_under_nohup_outlives_the_terminal(tmp_path):
    arguments = quick(tmp_path, "model.pause=0.02", "trainer.save_interval=5")
    process = subprocess.Popen(
        ["nohup", *command(*arguments)], env=environment(), stdout=subprocess.DEVNULL
    )
    run = wait_for_step(tmp_path, 5)
    process.send_signal(signal.SIGHUP)
    process.wait(60)
    assert status(run)["state"] == "finished"


@pytest.mark.parametrize("reads", [0, 1])
def test_the_reader_of_the_output_goes_away(tmp_path, reads):
    process = begin(*quick(tmp_path), stdout=subprocess.PIPE)
    for _ in range(reads):
        process.stdout.readline()
    process.stdout.close()
    with contextlib.closing(process.stdout):
        assert process.wait(60) == 0
    assert status(only_run(tmp_path))["state"] == "finished"
