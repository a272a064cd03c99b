"""What is read from Slurm's commands, with programs that print what Slurm prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from atlas.errors import AtlasError
from launchers.slurm.queue import (
    QueuedJob,
    array_limit,
    first_host,
    is_preempted,
    job_state,
    one_line,
    queue,
    sbatch_verdict,
)

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a program on the PATH that prints and exits as it is given here."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def write(name: str, out: str = "", error: str = "", code: int = 0) -> None:
        (programs / f"{name}.out").write_text(out)
        (programs / f"{name}.err").write_text(error)
        (programs / name).write_text(
            f'#!/bin/sh\necho "$@" > {programs}/{name}.args\ncat > /dev/null < /dev/null\n'
            f"cat {programs}/{name}.out\ncat {programs}/{name}.err >&2\nexit {code}\n"
        )
        (programs / name).chmod(0o755)

    return write


JOBS = {
    "no job": ("", {}),
    "one": ("12|PENDING|/o/a/1/submission.sh\n", {"12": ("PENDING", "/o/a/1/submission.sh")}),
    "an array": (
        "7_0|RUNNING|/o/s.sh\n7_1|COMPLETING|/o/s.sh\n",
        {"7_0": ("RUNNING", "/o/s.sh"), "7_1": ("COMPLETING", "/o/s.sh")},
    ),
    "no script": ("3|FAILED|\n", {"3": ("FAILED", "")}),
    "a bar in the path": ("3|RUNNING|/o|o/s.sh\n", {"3": ("RUNNING", "/o|o/s.sh")}),
}


@pytest.mark.parametrize("case", JOBS)
def test_jobs(install, case):
    out, jobs = JOBS[case]
    install("squeue", out)
    assert queue(["--me"]) == {job: QueuedJob(*found) for job, found in jobs.items()}


def test_a_selection_is_given_to_squeue(install, tmp_path):
    install("squeue")
    queue(["-j", "1,2"])
    arguments = (tmp_path / "programs" / "squeue.args").read_text().split()
    assert arguments[-2:] == ["-j", "1,2"] and "-r" in arguments


@pytest.mark.parametrize(
    ("out", "error", "code", "state"),
    [
        ("12|PENDING|/s.sh\n", "", 0, "PENDING"),
        ("", "", 0, None),  # it ended minutes ago
        ("", "slurm_load_jobs error: Invalid job id specified\n", 1, None),
    ],
)
def test_state_of_a_job(install, out, error, code, state):
    install("squeue", out, error, code)
    assert job_state("12") == state


def test_a_controller_that_does_not_answer(install):
    install("squeue", error="slurm_load_jobs error: Unable to contact slurm controller\n", code=1)
    with pytest.raises(AtlasError, match="Unable to contact slurm controller"):
        job_state("12")


def test_a_machine_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AtlasError, match="squeue"):
        queue([])
    assert array_limit() == 1000
    assert "not installed" in sbatch_verdict("")


@pytest.mark.parametrize(
    ("out", "limit"),
    [
        ("MaxArraySize            = 1001\nMaxJobCount = 3\n", 1001),
        ("MaxArraySize=0\n", 1),
        ("MaxJobCount = 3\n", 1000),
        ("", 1000),
    ],
)
def test_limit_of_arrays(install, out, limit):
    install("scontrol", out)
    assert array_limit() == limit


@pytest.mark.parametrize(
    ("nodes", "out", "host"),
    [("n1", None, "n1"), ("n[3-5]", "n3\nn4\nn5\n", "n3"), ("m5,n1", "m5\nn1\n", "m5")],
)
def test_host_of_rank_0(install, nodes, out, host):
    install("scontrol", *([out] if out else ["", "never asked", 1]))
    assert first_host(nodes) == host


def test_a_list_of_hosts_that_nobody_can_expand(install):
    install("scontrol", "", "error", 1)
    with pytest.raises(AtlasError, match=r"n\[1-2\]"):
        first_host("n[1-2]")


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("JobId=7 PreemptTime=2024-01-01T00:00:00 X=1\n", True),
        ("JobId=7 PreemptTime=None X=1\n", False),
        ("JobId=7\n", False),
        ("", False),
    ],
)
def test_preemption(install, monkeypatch, out, expected):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    install("scontrol", out)
    assert is_preempted() == expected


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("sbatch: error: invalid partition\nsbatch: error: Batch job failed\n", None),
        ("", ""),
        (ValueError("x"), "x"),
    ],
)
def test_messages_in_one_line(message, line):
    expected = "invalid partition; Batch job failed" if line is None else line
    assert one_line(message) == expected


def test_what_slurm_says_without_queueing(install):
    install("sbatch", error="sbatch: Job 8 to start at 2024-01-01 using 4 processors\n")
    assert sbatch_verdict("#!/bin/sh") == (
        "\n# sbatch --test-only: Job 8 to start at 2024-01-01 using 4 processors"
    )
