"""What is handed to Slurm, as far as it can be told without one."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from commands import ROOT, quick, train, unnamed

from atlas.errors import ConfigError
from launchers.slurm.launcher import SlurmLauncher
from launchers.slurm.queue import outside_allocation, seconds
from launchers.slurm.task import rank_environment

GOLDEN = Path(__file__).with_name("golden.sbatch")
DEFAULTS = {
    "timeout_min": 60,
    "signal_delay_s": 120,
    "max_requeues": 3,
    "preflight": "light",
    "wait": False,
}


def launcher(**settings: object) -> SlurmLauncher:
    place = {"nodes": 1, "nproc_per_node": 2, "device": "cpu"}
    return SlurmLauncher(**{**place, **DEFAULTS, **settings})  # type: ignore[arg-type]


def test_the_script_is_the_golden_one(tmp_path):
    everything = (
        *("cluster=slurm", "cluster.nodes=2", "cluster.nproc_per_node=4", "cluster.device=auto"),
        *("cluster.cpus_per_task=3", "cluster.mem_gb=16", "cluster.timeout_min=90"),
        *("cluster.partition=gpu", "cluster.account=robots", "cluster.qos=high"),
        *(
            "cluster.constraint=a100",
            "cluster.signal_delay_s=60",
            "cluster.setup=[module load cuda]",
        ),
        *("+cluster.sbatch.mail_type=END", "+cluster.sbatch.exclusive=true"),
        *("+cluster.sbatch.comment=null", "dry_run=true"),
    )
    printed = train(*quick(tmp_path, *everything), SOME_API_TOKEN="hunter2").stdout
    script = printed[printed.index("#!/bin/bash") :]
    run = re.search(rf"{tmp_path}/\S+/[0-9a-f]{{10}}\b", printed)[0]
    assert not Path(run).exists() and "hunter2" not in printed
    for text, name in ((run, "RUN"), (Path(run).name, "ID"), (sys.executable, "PYTHON")):
        script = script.replace(text, name)
    script, _, tested = script.replace(str(ROOT), "ATLAS").partition("\n# sbatch --test-only: ")
    assert tested.strip()
    if os.environ.get("ATLAS_WRITE_GOLDEN") == "1":
        GOLDEN.write_text(script)
    assert script == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"partion": "gpu"}, ["cluster.partion", "partition", "partition"]),
        ({"timeout_min": 0}, ["cluster.timeout_min=0", "1"]),
        ({"timeout_min": None}, ["cluster.timeout_min=None", "1"]),
        ({"mem_gb": "16G"}, ["cluster.mem_gb='16G'", "0", "null"]),
        ({"timeout_min": 2}, ["cluster.signal_delay_s=120", "cluster.timeout_min=2"]),
        ({"preflight": "some"}, ["cluster.preflight='some'", "full", "light"]),
        ({"setup": [3]}, ["cluster.setup", "3"]),
        ({"sbatch": {"time": 5}}, ["cluster.sbatch.time", "cluster.timeout_min"]),
        (
            {"sbatch": {"ntasks_per_node": 5}},
            ["cluster.sbatch.ntasks-per-node", "cluster.nproc_per_node"],
        ),
        ({"sbatch": {"array": "0-3"}}, ["cluster.sbatch.array"]),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_else(settings, named):
    with pytest.raises(ConfigError) as error:
        launcher(**settings).check()
    (problem,) = error.value.problems
    assert unnamed(problem, *named) == []


def test_the_gpus_of_a_login_node_do_not_count():
    with pytest.raises(ConfigError) as error:
        launcher(nproc_per_node="auto")
    wanted = ("cluster.nproc_per_node=auto", "cluster.nproc_per_node=8")
    assert unnamed(str(error.value), *wanted) == []


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"device": "cpu"}, False),
        ({"device": "cuda"}, True),
        ({"device": "auto"}, True),
        ({"device": "cuda", "sbatch": {"gres": "gpu:a100:2"}}, False),
        ({"device": "cuda", "sbatch": {"gpus_per_task": 1}}, False),
    ],
)
def test_gpus_are_asked_for_once_and_only_where_they_are_used(tmp_path, settings, asked):
    from atlas.run.directory import Run

    script = launcher(**settings).script(Run(tmp_path / "name" / "0123456789"), {})
    assert ("--gpus-per-node=2" in script) == asked


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1:00", 60),
        ("59", 59),
        ("2:03:04", 7384),
        ("1-00:00:10", 86410),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_the_time_that_is_left(text, value):
    assert seconds(text) == value


def test_a_job_s_variables_do_not_reach_the_next_one(monkeypatch):
    for name in ("SLURM_NTASKS", "SBATCH_PARTITION", "PMI_RANK", "SLURM_CONF", "RANK", "HF_HOME"):
        monkeypatch.setenv(name, "of the person")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with outside_allocation():
        assert os.environ["SBATCH_PARTITION"] == "of the person"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = dict(os.environ)
    with outside_allocation():
        assert os.environ["SLURM_CONF"] == os.environ["HF_HOME"] == "of the person"
        assert not {"SLURM_NTASKS", "SBATCH_PARTITION", "PMI_RANK", "RANK"} & {*os.environ}
    assert dict(os.environ) == before


def test_what_a_rank_is_told(monkeypatch):
    slurm = {
        "SLURM_JOB_ID": "70001",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "8",
        "SLURM_JOB_NODELIST": "n3",
        # Left in the environment of the person who submitted: another job's.
        "MASTER_ADDR": "elsewhere",
        "RANK": "0",
    }
    for name in ("SLURM_RESTART_COUNT", "OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    told = rank_environment()
    assert (told["RANK"], told["LOCAL_RANK"], told["WORLD_SIZE"]) == ("5", "1", "8")
    assert told["MASTER_ADDR"] == "n3" and told["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    ports = [int(told["MASTER_PORT"]), int(rank_environment()["MASTER_PORT"])]
    assert len(set(ports)) == 2 and all(10_000 <= port < 30_000 for port in ports)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[7-9],m1")
    if shutil.which("scontrol"):
        assert rank_environment()["MASTER_ADDR"] == "n7"
