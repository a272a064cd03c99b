"""Sweeps over the local pool."""

import json
import signal
import subprocess
import sys
import time

import pytest
from commands import (
    OWN,
    ROOT,
    environment,
    kill,
    problem_keys,
    quick,
    start,
    status,
    train,
    unnamed,
)

GRID = ("optim.lr=1e-3,1e-2", "schedule.warmup=2,4")


def sweep(outputs, *arguments, code=0):
    base, *rest = quick(outputs, *arguments)
    return train(base, "-m", *rest, code=code)


def told(outputs):
    """The status of every run below `outputs`, by its id."""
    return {path.name: status(path) for path in outputs.glob("quick/[0-9a-f]*")}


def begun(outputs, *arguments, code=0):
    """A sweep, and the ids of the runs that it has started or gone on with."""
    before = told(outputs)
    done = sweep(outputs, *arguments, code=code)
    return done, {name for name, now in told(outputs).items() if now != before.get(name)}


def test_only_what_is_missing_runs_and_a_wider_grid_joins(tmp_path):
    first, four = begun(tmp_path, *GRID)
    assert len(four) == 4
    table = [line for line in first.stdout.splitlines() if "optim.lr=" in line]
    values = [float(line.split()[0]) for line in table]
    assert len(values) == 4 and values == sorted(values)
    again, none = begun(tmp_path, *GRID)
    assert not none and unnamed(again.stdout, 0, 4) == []
    wider, two = begun(tmp_path, "optim.lr=1e-3,1e-2,3e-2", "schedule.warmup=2,4")
    assert len(two - four) == len(two) == 2 and unnamed(wider.stdout.splitlines()[0], 2, 6) == []
    groups = list((tmp_path / "quick" / "sweeps").glob("*.json"))
    assert len(groups) == 1
    assert json.loads(groups[0].read_text())["members"].keys() == four | two


def test_a_failing_run_leaves_the_others_alone(tmp_path):
    grid = ("+data.train.bad=-1,3", "optim.lr=1e-3,1e-2")
    done = sweep(tmp_path, *grid, code=1)
    runs = told(tmp_path)
    states = sorted(run["state"] for run in runs.values())
    assert states == ["failed", "failed", "finished", "finished"]
    failed = {name for name, run in runs.items() if run["state"] == "failed"}
    for name in failed:
        assert "NonFiniteError" in runs[name]["reason"] and runs[name]["reason"] in done.stdout
        assert str(tmp_path / "quick" / name / "logs") in done.stdout
    assert begun(tmp_path, *grid, code=1)[1] == failed


def test_groups_can_be_swept(tmp_path):
    done, two = begun(tmp_path, "schedule=cosine,linear,cosine", "trainer.steps=10")
    assert len(two) == 2
    assert unnamed(done.stdout.splitlines()[0], 2, 1) == []  # to start, and given twice
    assert len({json.dumps(run["best"]) for run in told(tmp_path).values()}) == 2


def test_interrupted_and_issued_again(tmp_path):
    base, *rest = quick(tmp_path, "model.pause=0.03", "optim.lr=1e-3,1e-2,1e-1")
    process = start(base, "-m", *rest)
    while len(list(tmp_path.glob("quick/*/checkpoints/[0-9]*"))) < 1:
        time.sleep(0.05)
    said = kill(process, signal.SIGINT)
    assert process.returncode == 75, said
    train(base, "-m", *rest)
    runs = list(tmp_path.glob("quick/[0-9a-f]*"))
    assert len(runs) == 3 and {status(p)["state"] for p in runs} == {"finished"}


def test_everything_wrong_is_told_once(tmp_path):
    done = sweep(tmp_path, "trainer.steps=3,0", "schedule.warmup=4", code=1)
    assert problem_keys(done.stderr) == ["schedule.warmup", "trainer.steps"]
    assert unnamed(done.stderr, "schedule.warmup=4", "trainer.steps=3", "trainer.steps=0") == []
    assert not list(tmp_path.iterdir())


def test_objective_is_a_metric_of_choice(tmp_path):
    done = sweep(tmp_path, "optim.lr=1e-3,1e-2", "objective=val/mae", "trainer.steps=8")
    assert done.stdout.splitlines()[-3].split()[0] == "val/mae"
    done = sweep(tmp_path, "optim.lr=1e-3,1e-2", "objective=val/mea", "trainer.steps=8")
    assert unnamed(done.stdout.splitlines()[-1], "objective=val/mea", "val/mae") == []
    assert OWN.exists()


def test_optuna_chooses_by_the_objective(tmp_path):
    pytest.importorskip("optuna", reason="the extra `sweep` is not installed")
    done = sweep(
        tmp_path,
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=8",
        "hydra.sweeper.n_jobs=2",
        "optim.lr=interval(1e-4, 1e-1)",
        "trainer.steps=8",
    )
    headings = [line for line in done.stdout.splitlines() if line.split()[:1] == ["val/loss"]]
    assert len(headings) == 4  # a table for every two trials
    runs = list(tmp_path.glob("quick/[0-9a-f]*"))
    assert len(runs) == 8 and {status(p)["state"] for p in runs} == {"finished"}
    found = (tmp_path / "quick" / "sweeps" / "optimization_results.yaml").read_text()
    best = min(status(p)["best"]["value"] for p in runs)
    assert f"best_value: {best}" in found


def test_a_hundred_runs_are_composed_once(tmp_path):
    """Composing takes 90 ms a time: a hundred runs at one composition each would take nine seconds.

    What is counted is how often Hydra composes, which no noise of the machine changes.
    """
    code = (
        "import sys, runpy\n"
        "from hydra._internal.config_loader_impl import ConfigLoaderImpl as Loader\n"
        "compose, calls = Loader.load_configuration, []\n"
        "Loader.load_configuration = lambda *a, **k: (calls.append(1), compose(*a, **k))[1]\n"
        "from launchers.local.launcher import LocalLauncher\n"
        "LocalLauncher.submit = lambda self, runs: print('submitted', len(runs)) or []\n"
        "sys.argv = ['train.py', *sys.argv[1:]]\n"
        "try:\n"
        "    runpy.run_path('train.py', run_name='__main__')\n"
        "except (SystemExit, ValueError):\n"
        "    pass\n"
        "print('composed', len(calls))"
    )
    rates = ",".join(f"{0.001 * n:.3f}" for n in range(1, 101))
    base, *rest = quick(tmp_path, f"optim.lr={rates}")
    done = subprocess.run(
        [sys.executable, "-c", code, base, "-m", *rest],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "submitted 100" in done.stdout, done.stdout + done.stderr
    assert int(done.stdout.split("composed ")[1]) <= 4
    assert len(list(tmp_path.glob("quick/*/config.yaml"))) == 100
