"""Many ranks on one machine: the same result under every launcher, and nothing left behind."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from commands import (
    ROOT,
    command,
    environment,
    kill,
    lines,
    only_run,
    points,
    quick,
    same,
    start,
    status,
    train,
    unnamed,
    wait_for_step,
    weights,
)

from atlas.run.directory import Run
from launchers.hydra_errors import report_errors

SMALL = (
    "cluster.device=cpu",
    "tracking=none",
    "trainer.steps=20",
    "schedule.warmup=5",
    "trainer.accumulate=1",
    "trainer.val_interval=null",
    "data.episodes=40",
    "data.val_episodes=4",
    "data.rollouts=2",
)
SEED_FILE = ("--config", "atlas/configs/train_config.yaml")


def torchrun(ranks, *arguments, module="torch.distributed.run", script="train.py"):
    port = random.randint(20000, 29000)
    line = [sys.executable, "-m", module, f"--nproc_per_node={ranks}", f"--master_port={port}"]
    done = subprocess.run(
        [*line, script, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def flat_weights(run):
    """All trained weights as one vector."""
    import torch

    return torch.cat([value.double().flatten() for value in weights(run)["model"].values()])


@pytest.mark.slow
def test_eight_ranks_agree_under_every_launcher(tmp_path):
    import torch

    def outputs(name):
        return (*SMALL, f"outputs={tmp_path / name}")

    # The file's own values, for the launchers that are not given the file.
    as_file = ("optim.lr=1e-4",)
    train(*as_file, *outputs("local"), "cluster.nproc_per_node=8")
    torchrun(8, *SEED_FILE, *outputs("torchrun"), script="atlas/train.py")
    elder = "torch.distributed.launch"
    torchrun(8, *SEED_FILE, *outputs("launch"), module=elder, script="atlas/train.py")
    runs = {name: only_run(tmp_path / name) for name in ("local", "torchrun", "launch")}
    assert len({run.name for run in runs.values()}) == 1  # the same run, wherever it runs
    for name in ("torchrun", "launch"):
        assert same(weights(runs[name])["model"], weights(runs["local"])["model"])
        assert points(runs[name]) == points(runs["local"])
    # One process that takes the same samples in eight micro-batches.
    one = ("cluster.nproc_per_node=1", "trainer.accumulate=8")
    train(*as_file, *outputs("one"), *one)
    train("optim.lr=1e-30", *outputs("start"), *one)
    begin = flat_weights(only_run(tmp_path / "start"))
    alone = flat_weights(only_run(tmp_path / "one")) - begin
    eight = flat_weights(runs["local"]) - begin
    assert torch.linalg.norm(alone - eight) < 1e-3 * torch.linalg.norm(alone)


@pytest.mark.parametrize(
    "ranks", [2, *(pytest.param(many, marks=pytest.mark.slow) for many in (4, 8))]
)
def test_killed_and_resumed(tmp_path, ranks):
    many = ("cluster.device=cpu", f"cluster.nproc_per_node={ranks}", "data.batch_size=2")
    train(*quick(tmp_path / "twin", *many))
    arguments = quick(tmp_path / "killed", *many, "model.pause=0.02", "trainer.save_interval=3")
    process = start(*arguments)
    run = wait_for_step(tmp_path / "killed", 6)
    kill(process)
    train(*arguments)
    twin = only_run(tmp_path / "twin")
    assert points(run) == points(twin)
    assert lines(run / "samples.jsonl") == lines(twin / "samples.jsonl")
    assert same(weights(run), weights(twin))


@pytest.mark.parametrize(
    "sizes", [(2, 1, 2), pytest.param((8, 4, 2, 1, 8), marks=pytest.mark.slow)], ids=str
)
def test_resumed_at_other_world_sizes(tmp_path, sizes):
    """The same samples in the same updates, and the curve goes on as it would have."""
    device, smooth = "cluster.device=cpu", ("model.dropout=0", "data.batch_size=2")
    first = (*smooth, device, f"cluster.nproc_per_node={sizes[0]}")
    train(*quick(tmp_path / "twin", *first))
    outputs = tmp_path / "cut"
    process = start(*quick(outputs, *first, "model.pause=0.03", "trainer.save_interval=2"))
    run = wait_for_step(outputs, 4)
    for size in sizes[1:]:
        kill(process)
        at = max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))
        where = (f"resume={run.name}", f"outputs={outputs}", device)
        process = start(*where, f"cluster.nproc_per_node={size}")
        if size != sizes[-1]:
            wait_for_step(outputs, at + 3)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    twin = only_run(tmp_path / "twin")
    assert lines(run / "samples.jsonl") == lines(twin / "samples.jsonl")
    found, wanted = points(run), points(twin)
    assert found.keys() == wanted.keys()
    assert all(found[at] == pytest.approx(wanted[at], rel=1e-3, abs=1e-6) for at in wanted)
    refused = train(*where, "cluster.nproc_per_node=7", code=1).stderr
    all_sizes = [n for n in range(1, 2 * sizes[0] + 1) if 2 * sizes[0] % n == 0]
    assert unnamed(refused, f"resume={run.name}", "7", ", ".join(map(str, all_sizes))) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 8])
def test_killed_and_resumed_under_torchrun(tmp_path, ranks):
    many = ("cluster.device=cpu", "data.batch_size=2")
    train(*quick(tmp_path / "twin", *many, f"cluster.nproc_per_node={ranks}"))
    arguments = quick(tmp_path / "killed", *many, "model.pause=0.02", "trainer.save_interval=3")
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    process = subprocess.Popen(
        [*line, f"--master_port={random.randint(20000, 29000)}", "train.py", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    run = wait_for_step(tmp_path / "killed", 6)
    family = psutil.Process(process.pid).children(recursive=True)
    for one in [psutil.Process(process.pid), *family]:
        one.kill()
    psutil.wait_procs(family, timeout=20)
    process.wait()
    torchrun(ranks, *arguments)
    twin = only_run(tmp_path / "twin")
    assert points(run) == points(twin)
    assert same(weights(run), weights(twin))


def test_a_model_may_change_its_batch_in_place(tmp_path):
    """Ranks get ready with the batch that they are then trained on."""
    greedy = ("model._target_=own_parts.Greedy", "model.dropout=0", "cluster.device=cpu")
    train(*quick(tmp_path / "one", *greedy))
    two = ("cluster.nproc_per_node=2", "data.batch_size=2")
    train(*quick(tmp_path / "two", *greedy, *two))
    one, both = (points(only_run(tmp_path / name)) for name in ("one", "two"))
    assert one[0, "train/loss"] == pytest.approx(both[0, "train/loss"], rel=1e-5)


def test_stopped_ranks_agree_on_the_step(tmp_path):
    arguments = quick(
        tmp_path, "cluster.device=cpu", "cluster.nproc_per_node=2", "model.pause=0.03"
    )
    process = start(*arguments)
    run = wait_for_step(tmp_path, 5)
    said = kill(process, signal.SIGTERM)
    assert process.returncode == 75, said
    assert status(run)["state"] == "killed"
    assert (run / "checkpoints" / f"{status(run)['step']:08d}").exists()


def ranks_of(process):
    """The processes of the ranks, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            rank = child.environ().get("RANK")
        except (psutil.Error, OSError):
            continue
        found[rank] = child
    return found


def descendants(run):
    """Processes that still have to do with `run`, its shipper and data workers among them."""
    left = []
    for process in psutil.process_iter(["cmdline", "pid"]):
        if str(run.parent.parent) in " ".join(process.info["cmdline"] or []):
            left.append(process)
    return left


@pytest.mark.parametrize(
    "victim, ranks",
    [
        *(("parent", 2), ("data worker", 2)),
        pytest.param("rank 0", 2, marks=pytest.mark.slow),
        pytest.param("rank 1", 2, marks=pytest.mark.slow),
        pytest.param("rank 5", 8, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_left_running(tmp_path, victim, ranks):
    arguments = quick(
        tmp_path,
        "cluster.device=cpu",
        f"cluster.nproc_per_node={ranks}",
        "model.pause=0.05",
        "data.workers=1",
        "trainer.steps=500",
    )
    process = start(*arguments)
    run = wait_for_step(tmp_path, 5)
    family = [process.pid, *(c.pid for c in psutil.Process(process.pid).children(recursive=True))]
    pids = lock_pids(process)
    target = {
        "parent": process.pid,
        "data worker": psutil.Process(pids[1]).children()[0].pid,
        **{f"rank {rank}": pid for rank, pid in enumerate(pids)},
    }[victim]
    os.kill(target, signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    deadline = time.monotonic() + 10
    while any(map(alive, family)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in family if alive(pid)], said
    if victim != "parent":
        assert process.returncode == 1, said
        assert status(run)["state"] == "failed" and status(run)["reason"], status(run)
        assert said.count("Traceback") <= 1, said
    train(*arguments, "trainer.max_time=0.1", code=75)
    assert status(run)["step"] > 5


def lock_pids(process):
    """The pids of the ranks: the forked processes, in the order of their start."""
    server = [c for c in psutil.Process(process.pid).children() if "forkserver" in cmdline(c)]
    ranks = [c for c in server[0].children()]
    return sorted(c.pid for c in ranks)


def cmdline(process):
    return " ".join(process.cmdline())


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_interrupted_while_the_ranks_start(tmp_path):
    """A terminal sends Ctrl-C to every process of the launcher, whatever they are at."""
    process = subprocess.Popen(
        command(*quick(tmp_path, "cluster.nproc_per_node=2")),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    while not list(tmp_path.glob("*/*/config.yaml")):
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode in (75, 130) and "Traceback" not in said, said


def test_interrupted_before_a_run_is_there(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which `report_errors` sets
    with pytest.raises(SystemExit) as left, report_errors():
        raise KeyboardInterrupt
    assert left.value.code == 130


def test_a_failing_rank_is_told_once(tmp_path):
    arguments = quick(tmp_path, "cluster.device=cpu", "cluster.nproc_per_node=2")
    done = train(*arguments, "+data.train.bad=3", code=1)
    run = Run(only_run(tmp_path))
    assert status(run.path)["state"] == "failed" and run.read_failure()["kind"] == "NaN"
    assert (
        unnamed(run.read_status().reason, "NaN", "NonFiniteError", run.read_failure()["step"]) == []
    )
    assert done.stderr.count(run.read_failure()["message"]) == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["-m", "optim.lr=1e-3,1e-4"], ["-m", "torchrun", "python train.py -m"]),
        (["cluster=slurm"], ["torchrun", "python train.py cluster=slurm", "cluster=local"]),
    ],
)
def test_what_makes_no_sense_under_torchrun(tmp_path, arguments, named):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--master_port"]
    done = subprocess.run(
        [*line, str(random.randint(20000, 29000)), "train.py", *arguments, f"outputs={tmp_path}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and unnamed(done.stderr, *named) == []
    assert not list(tmp_path.iterdir())
