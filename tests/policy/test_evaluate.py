"""`atlas evaluate` and `atlas export` on runs that were trained here, and `load_policy` of both."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="av is not installed (extra vla)")
pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra vla)")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from commands import only_run, quick, status, train, unnamed
from robot import write_folder

import atlas
from atlas import cli
from atlas.data.baselines import Errors, fit, measure
from atlas.data.lerobot.dataset import LeRobot
from atlas.errors import AtlasError
from atlas.policy import export
from atlas.policy.evaluate import evaluate, plain, table
from atlas.record.shipping.sync import sync
from atlas.run.directory import Run

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("made") / "robot", (30, 20, 25))


@pytest.fixture(scope="session")
def robot_run(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on recordings, with MLflow."""
    outputs = tmp_path_factory.mktemp("outputs")
    train(
        "model=vla",
        "data=lerobot",
        f"data.root={made}",
        "data.val_episodes=1",
        "data.horizon=4",
        "trainer.steps=30",
        "trainer.accumulate=1",
        "trainer.ema=0.9",
        "schedule.warmup=2",
        f"outputs={outputs}",
        "cluster.device=cpu",
        ATLAS_CACHE=str(outputs / "cache"),
    )
    return only_run(outputs)


@pytest.fixture(scope="session")
def table_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("outputs")
    train(
        "data.episodes=20",
        "data.val_episodes=4",
        "data.rollouts=5",
        "trainer.steps=10",
        "trainer.accumulate=1",
        "schedule.warmup=2",
        "tracking=none",
        f"outputs={outputs}",
        "cluster.device=cpu",
    )
    return only_run(outputs)


@pytest.fixture
def run(robot_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy of the run, to write into."""
    monkeypatch.setenv("ATLAS_CACHE", str(robot_run.parents[1] / "cache"))
    return Run(shutil.copytree(robot_run, tmp_path / robot_run.name, symlinks=True))


def test_errors_by_joint_and_horizon() -> None:
    rng = np.random.default_rng(0)
    guessed, actions = rng.normal(size=(2, 7, 4, 3))
    mask = rng.random((7, 4)) < 0.7
    mask[:, 3] = False
    errors = Errors()
    for part in (slice(0, 3), slice(3, 7)):  # however the samples are cut
        errors.add(guessed[part], actions[part], mask[part])
    wrong = abs(guessed - actions)
    assert errors.mean == pytest.approx(wrong[mask].mean())
    np.testing.assert_allclose(errors.by_joint, wrong[mask].mean(0))
    np.testing.assert_allclose(errors.by_horizon[1], wrong[:, 1][mask[:, 1]].mean())
    np.testing.assert_allclose(errors.table[2], wrong[:, 2][mask[:, 2]].mean(0))
    assert np.isnan(errors.by_horizon[3]), "no sample reaches so far"
    assert plain({"a": [1.0, float("nan")]}) == {"a": [1.0, None]}


def test_the_evaluation_is_the_runs_validation(run: Run, made: Path) -> None:
    found = evaluate(run, "cpu")
    best = status(run.path)["best"]["step"]
    journal = {line["step"]: line for line in map(json.loads, run.journal_file.open())}
    assert found["step"] == best
    error = found["error"]
    assert error["mean"] == pytest.approx(journal[best]["val/l1"], rel=1e-4)
    val = LeRobot(made, split="val", val_episodes=1, horizon=4)
    train = LeRobot(made, val_episodes=1, horizon=4)
    for name, value in val.baselines(train).items():
        base = found["baselines"][name]
        assert base["mean"] == pytest.approx(value)
        assert base["ratio"] == pytest.approx(journal[best][f"val/l1_vs_{name}"], rel=1e-4)
        assert np.mean(list(base["by_joint"].values())) == pytest.approx(value)
    assert list(found["baselines"]) == ["mean_action", "hold_state", "ridge"]
    assert len(error["by_horizon"]) == 4
    assert np.shape(error["by_horizon_and_joint"]) == (4, 3)
    assert (found["samples"], found["episodes"], found["rollout"]) == (25, 1, None)
    assert json.loads(run.evaluation_file.read_text())["error"] == plain(error)
    assert run.evaluation_picture.read_bytes().startswith(b"\x89PNG")
    assert len(table(found).splitlines()) > 8


def test_the_command_and_its_artifacts(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured reaches MLflow with the next sync."""
    assert cli.main(["evaluate", str(run.path), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "hold_state" in said
    assert str(run.evaluation_picture.parent) in said
    [shipped] = sync([run])
    assert shipped.error is None
    uploaded = json.loads(run.mlflow_file.read_text())["uploaded"]
    assert {"evaluation.json", "evaluation.png"} <= set(uploaded)
    other = tmp_path / "elsewhere"
    run.evaluation_file.unlink()
    assert cli.main(["evaluate", str(run.path), "--device", "cpu", "--out", str(other)]) == 0
    assert sorted(p.name for p in other.iterdir()) == ["evaluation.json", "evaluation.png"]
    assert not run.evaluation_file.exists()


def test_rollouts(table_run: Path, tmp_path: Path) -> None:
    found = evaluate(Run(table_run), "cpu", tmp_path)
    last = status(table_run)["last"]
    assert found["rollout"]["scenes"] == 5
    assert found["rollout"]["success"] == pytest.approx(last["val/success"])
    assert found["rollout"]["distance"] == pytest.approx(last["val/distance"], rel=1e-4)
    assert list(found["baselines"]) == ["mean_action"], "holding the state is no action here"
    assert found["error"]["mean"] == pytest.approx(last["val/l1"], rel=1e-4)
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000


@pytest.mark.parametrize("arguments", [["evaluate"], ["export", "--out", "new"]])
def test_what_is_no_robot_policy(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    train(*quick(tmp_path / "outputs"))
    path = only_run(tmp_path / "outputs")
    code = cli.main([arguments[0], str(path), *arguments[1:]])
    said = capsys.readouterr()
    if arguments[0] == "evaluate":
        assert code == 1
        assert unnamed(said.err, "atlas evaluate", "Net", "act") == []  # the method it has not
    else:
        assert code == 0, said.err
    assert "Traceback" not in said.err


def observation(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (48, 64, 3), np.uint8) for name in ("top", "hand")}
    return {"images": images, "state": rng.normal(size=3), "instruction": "Open the drawer"}


@pytest.mark.parametrize("command", [["evaluate", "--device", "cpu"], ["export"]])
def test_a_folder_that_cannot_be_made_is_told_at_once(
    run: Run, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    out = run.config_file / "out"
    assert cli.main([*command, str(run.path), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert unnamed(said.err, f"--out {out}") == [] and not said.out
    assert os.strerror(errno.ENOTDIR) in said.err


def test_an_exported_policy_acts_as_the_run(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert cli.main(["export", str(run.path), "--out", str(folder)]) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "policy.json"]
    moved = shutil.move(folder, tmp_path / "moved")
    expected = atlas.load_policy(run.path, "cpu")
    shutil.rmtree(run.path)
    policy = atlas.load_policy(moved, "cpu")
    assert (policy.spec, policy.step) == (expected.spec, expected.step)
    for seed in range(3):
        np.testing.assert_array_equal(
            policy.act(observation(seed)), expected.act(observation(seed))
        )
    assert policy.act(observation()).shape == (4, 3)


def test_reading_an_export_unpickles_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.write(run, tmp_path / "exported")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load"))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("unpickled"))
    atlas.load_policy(tmp_path / "exported", "cpu").act(observation())


def test_a_tensor_that_shares_memory_is_exported(run: Run, tmp_path: Path) -> None:
    saved = export.read_run(run)
    export.write(run, tmp_path / "exported")
    found = export.read(tmp_path / "exported")
    assert found.weights.keys() == saved.weights.keys()
    assert all(torch.equal(found.weights[name], value) for name, value in saved.weights.items())


def test_what_cannot_be_exported_or_read(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    export.write(run, folder)
    kept = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(AtlasError, match=re.escape(f"--out {folder}")):
        export.write(run, folder)
    assert {file: file.read_bytes() for file in folder.iterdir()} == kept
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(AtlasError) as raised:
        atlas.load_policy(folder)
    assert type(raised.value.__cause__).__name__ == "SafetensorError"
    assert unnamed(str(raised.value), folder, raised.value.__cause__) == []
    content = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(AtlasError) as raised:
        atlas.load_policy(folder)
    assert unnamed(str(raised.value), folder / "policy.json", "format=2", export.FORMAT) == []
    with pytest.raises(AtlasError) as raised:
        atlas.load_policy(tmp_path / "nothing")
    assert unnamed(str(raised.value), tmp_path / "nothing", "config.yaml", "policy.json") == []


def test_small_files_of_pretrained_parts_come_along(tmp_path: Path) -> None:
    part, out = tmp_path / "llama", tmp_path / "out"
    (part / ".cache").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors", ".cache/lock"):
        (part / name).write_text(name)
    node = {"lang_encoder": {"path": str(part), "layers": [1]}, "vision": {"path": "org/name"}}
    found = export.copy_parts(node, out)
    assert found["lang_encoder"] == {"path": "parts/lang_encoder", "layers": [1]}
    assert found["vision"] == {"path": "org/name"}, "a name on the hub stays one"
    copied = sorted(p.name for p in (out / "parts/lang_encoder").iterdir())
    assert copied == ["config.json", "tokenizer.json"]
    assert export._resolve_parts(found, out)["lang_encoder"]["path"] == str(
        out / "parts/lang_encoder"
    )


def test_baselines_that_make_sense() -> None:
    """Without targets of the states' size there is nothing to hold."""
    rng = np.random.default_rng(1)
    state, actions = rng.normal(size=(50, 3, 4)), rng.normal(size=(50, 2, 3))
    block = (state, actions, np.ones((50, 2), bool))
    assert list(fit(lambda: [block])) == ["mean_action"]
    same = (state, state[:, -1:] + np.diff(state, axis=1)[:, -1:] * [[[1.0], [2.0]]], block[2])
    errors = measure(fit(lambda: [same]), [same])
    assert errors["ridge"].mean < 0.05 * errors["hold_state"].mean, "linear in the velocity"
