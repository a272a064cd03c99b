"""Models that are built without weights before a run is queued."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import OWN, ROOT, only_run, quick, train, unnamed
from hydra import compose, initialize_config_dir

from atlas.errors import ConfigError
from atlas.training.dry_run.preflight import check
from launchers import preflight
from launchers.launch import resolve

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def own_modules(monkeypatch):
    for folder in (OWN, HERE):
        monkeypatch.syspath_prepend(str(folder))


def configuration(outputs: Path, *overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        given = ["experiment=quick", f"hydra.searchpath=[file://{OWN}]", f"outputs={outputs}"]
        return resolve(compose("config", [*given, *overrides]))


# What is asked for, and what is named: a choice that is suggested is listed too.
REFUSED = [
    (["+optim.lr_multipliers.hed=1"], ["optim.lr_multipliers.hed", "head", "head"]),
    (
        [
            "optim.lr_multipliers.encoder=0",
            "+optim.lr_multipliers.norm=0",
            "optim.lr_multipliers.head=0",
        ],
        ["optim.lr_multipliers"],
    ),
    (["model.width=7.5"], ["model", "TypeError"]),
    (["model._target_=parts.Lopsided"], ["model", "data.train", "RuntimeError: mat1"]),
    (["model._target_=parts.Silent"], ["model._target_", "dict", "l", "loss"]),
    (["model._target_=own_parts.Nett"], ["model", "own_parts.Nett"]),
    (["data.train.samples=0"], ["data.train", "Points"]),
    (["+optim.optimizer.betta=1"], ["optim.optimizer", "betta"]),
]
UNCHECKED = [
    (["model._target_=parts.OnGpu"], ["model", "RuntimeError: no NVIDIA driver on this machine"]),
    (["data.train._target_=parts.Absent"], ["data", "FileNotFoundError: /scratch/points"]),
    (["model._target_=parts.Huge"], ["model", "400.0"]),
]
# Models whose weights have to be there, and one that prints where the answer is expected.
PASSED = [[f"model._target_=parts.{name}"] for name in ("Counting", "Reading", "Talking")]


def test_what_is_wrong_is_told_from_what_cannot_be_told_here(tmp_path):
    table = [*REFUSED, *UNCHECKED, *((overrides, []) for overrides in PASSED)]
    configs = [configuration(tmp_path, *overrides) for overrides, _ in table]
    for (overrides, named), report in zip(table, preflight._ask_child(configs, 8), strict=True):
        refused = any(overrides == wrong for wrong, _ in REFUSED)
        texts = report["problems" if refused else "unchecked"]
        assert bool(texts) == bool(named), (overrides, report)
        assert unnamed("\n".join(texts), *named) == [], (overrides, report)
        assert refused or not report["problems"], report


def test_a_model_that_the_source_of_its_weights_does_not_fit(tmp_path):
    train(*quick(tmp_path, "trainer.steps=1", "schedule.warmup=0", "data.val=null"))
    run = only_run(tmp_path)
    for width, problems in ((16, 0), (8, 1)):
        config = configuration(tmp_path, f"init_from={run.name}", f"model.width={width}")
        report = check(config, 1)
        assert len(report.problems) == problems and not report.unchecked
    assert unnamed(report.problems[0], "encoder.weight", "(16, 4)", "(8, 4)") == []


def test_everything_that_is_wrong_is_raised_and_not_remembered(tmp_path):
    configs = [configuration(tmp_path, *overrides) for overrides, _ in REFUSED[:3]]
    with pytest.raises(ConfigError) as error:
        preflight.preflight(configs, 8)
    assert len(error.value.problems) == 3
    assert not list(tmp_path.glob(".preflight/*"))


def test_a_pass_is_remembered_until_something_changes(tmp_path, monkeypatch):
    asked: list[int] = []
    ask = preflight._ask_child
    monkeypatch.setattr(preflight, "_ask_child", lambda c, w: (asked.append(len(c)), ask(c, w))[1])
    plain = configuration(tmp_path)
    grid = [plain, configuration(tmp_path, "seed=1"), configuration(tmp_path, "optim.lr=0.1")]
    assert preflight.preflight(grid, 2) == [] and asked == [1]
    assert preflight.preflight(grid, 2) == [] and asked == [1]
    preflight.preflight([plain, configuration(tmp_path, "model.width=8")], 2)
    assert asked == [1, 1]
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "module.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(folder))
    preflight.preflight([plain], 2)
    (folder / "module.py").write_text("x = 2\n")
    preflight.preflight([plain], 2)
    assert asked == [1, 1, 1, 1]


def test_a_child_that_dies_is_no_reason_not_to_train(tmp_path):
    notes = preflight.preflight([configuration(tmp_path, "model._target_=parts.Deadly")], 2)
    assert len(notes) == 1 and unnamed(notes[0], "3") == []  # the exit code


def test_the_robot_policy_passes_without_its_weights(tmp_path):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = resolve(compose("config", [f"outputs={tmp_path}"]))
    question = {"sys_path": [], "world_size": 8, "configs": [config]}
    done = subprocess.run(
        [sys.executable, "-m", "atlas.training.dry_run.preflight"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert json.loads(done.stdout) == [{"problems": [], "unchecked": []}], done.stderr
