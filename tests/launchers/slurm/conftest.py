"""A real Slurm for the tests beside this file, started by `up`; skipped where there can be none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "sbatch", "ip")


def missing() -> str | None:
    """Why Slurm cannot be started here, None where it can."""
    absent = [
        name
        for name in PROGRAMS
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
    ]
    if absent:
        return f"no Slurm to test with: {', '.join(absent)} not installed"
    if os.geteuid() != 0:
        return "no Slurm to test with: starting one takes root"
    return None


def start(nodes: int) -> None:
    """Start Slurm with `nodes` nodes, or leave it as it is where it is up."""
    if why := missing():
        if os.environ.get("ATLAS_REQUIRE_SLURM") == "1":
            pytest.fail(why)
        pytest.skip(why)
    done = subprocess.run([HERE / "up", str(nodes)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def one_node() -> None:
    """Slurm with one node, this machine."""
    start(1)


@pytest.fixture(scope="module")
def two_nodes() -> None:
    """Slurm with the nodes n1 and n2, each with an address of its own."""
    start(2)
