"""Jobs over two nodes with addresses of their own, one of which is lost in mid-run."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from commands import only_run, quick, status, train, unnamed, wait_for_step
from jobs import assert_twins, field, finished, log, process_of, submit, until

from atlas.run.directory import Run

pytestmark = [pytest.mark.usefixtures("two_nodes"), pytest.mark.slow]
TWO = ("cluster.nodes=2",)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Four ranks on this machine, without Slurm, to which nothing happens."""
    outputs = tmp_path_factory.mktemp("undisturbed")
    train(*quick(outputs, "cluster.device=cpu", "cluster.nproc_per_node=4"))
    return only_run(outputs)


def test_two_nodes_of_two_ranks(tmp_path, undisturbed):
    run, job = submit(tmp_path, *TWO)
    finished(run, job)
    assert field(job, "NumNodes") == "2"
    assert_twins(run, undisturbed)


def test_a_node_that_is_lost_in_mid_run(tmp_path, undisturbed):
    run, job = submit(tmp_path, *TWO, "model.pause=0.3", "trainer.save_interval=5")
    wait_for_step(tmp_path, 5)
    first = Run(run).lock.holder()
    old = process_of(job, 0)
    assert first is not None and first.host == "n1" and first.pid == old
    with lost("n1"):
        until(lambda: field(job, "Restarts") == "1", "Slurm requeues the job", 120)
        assert Path(f"/proc/{old}").exists()  # its node is gone for Slurm, and it lives on
    until(lambda: restarts(run) == 1, "the requeued job takes the lock over", 120)
    # Awake again beside the new rank 0: whatever it does now must not reach the run.
    finished(run, job, timeout=180)
    assert_twins(run, undisturbed)
    assert status(run)["restarts"] == 1


def test_a_lost_rank_0_that_goes_on_training_cannot_write(tmp_path):
    # Both ranks are on the lost node, so they notice nothing; Slurm starts the job on the other one.
    slow = ("model.pause=1.5", "trainer.save_interval=2")
    run, job = submit(tmp_path, *slow)
    wait_for_step(tmp_path, 2)
    node, old = field(job, "NodeList"), process_of(job, 0)
    with lost(node):
        until(lambda: restarts(run) == 1, "the requeued job takes the lock over", 120)
        until(lambda: status(run)["host"] != node, "the run is on the other node", 30)
        at = status(run)["step"]
        until(lambda: not Path(f"/proc/{old}").exists(), "the old rank 0 gives up", 30)
        now = Run(run).lock.holder()
        assert unnamed(log(run, job), run, now.pid, now.host) == []  # who has the run instead
        assert status(run)["state"] == "running" and status(run)["step"] >= at
        finished(run, job, timeout=180)
    train(*quick(tmp_path / "local", "cluster.device=cpu", "cluster.nproc_per_node=2"))
    assert_twins(run, only_run(tmp_path / "local"))


class lost:
    """A node without network and without slurmd; what runs on it goes on, unseen."""

    def __init__(self, node: str) -> None:
        self.node = node

    def __enter__(self) -> None:
        link("v" + self.node[1:], "down")
        os.kill(int(Path(f"/run/slurmd.{self.node}.pid").read_text()), signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        link("v" + self.node[1:], "up")
        command = f"hostname {self.node}; exec slurmd"
        subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.node}", "unshare", "-u", "sh", "-c", command],
            check=True,
        )


def link(name: str, state: str) -> None:
    subprocess.run(["ip", "link", "set", name, state], check=True)


def restarts(run: Path) -> int:
    holder = Run(run).lock.holder()
    return holder.restarts if holder else 0
