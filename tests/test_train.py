"""The main job as a person runs it, on the embedded data."""

import json
import re

import numpy as np
import pytest
from commands import lines, only_run, points, quick, status, train, unnamed

TINY = (
    "tracking=none",
    "data.episodes=30",
    "data.val_episodes=5",
    "data.rollouts=3",
    "trainer.val_interval=6",
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A few steps of the default model; the flags are those of the README's first example."""
    folder = tmp_path_factory.mktemp("main")
    train("optim.lr=2.8e-4", "schedule.warmup=10", "trainer.steps=12", f"outputs={folder}", *TINY)
    return folder


def test_journal(outputs):
    run = only_run(outputs)
    found = points(run)
    assert {step for step, key in found if key == "train/loss"} == {0, 10, 11}
    assert {step for step, key in found if key == "val/loss"} == {6, 12}
    groups = {key for step, key in found if key.startswith("lr/") and step == 10}
    assert groups == {"lr/lang_encoder", "lr/fusion", "lr/action_head"}
    assert found[10, "lr/fusion"] == pytest.approx(2.8e-4)
    assert found[10, "lr/lang_encoder"] == pytest.approx(2.8e-5)
    last = lines(run / "metrics.jsonl")[-1]
    assert {"val/success", "val/l1", "val/l1_vs_mean_action", "val/time_s"} <= last.keys()
    train_line = next(line for line in lines(run / "metrics.jsonl") if line["step"] == 10)
    assert {"grad_norm", "samples_per_s", "step_time_ms", "data_wait_share", "epoch"} <= set(
        train_line
    )


def test_status(outputs):
    found = status(only_run(outputs))
    assert found["state"] == "finished" and found["step"] == found["steps"] == 12
    assert found["best"]["metric"] == "val/loss" and found["best"]["step"] in (6, 12)
    assert found["command"].startswith("python ") and "optim.lr=2.8e-4" in found["command"]
    assert set(found["git"]) >= {"commit", "clean", "digest"}


def test_policy_acts_on_raw_observations(outputs):
    import atlas

    policy = atlas.load_policy(only_run(outputs), device="cpu")
    cameras = policy.spec["cameras"]
    # Larger than what it was trained on, as a camera gives it.
    picture = np.full((112, 112, 3), 127, np.uint8)
    observation = {
        "images": dict.fromkeys(cameras, picture),
        "state": np.zeros(2),
        "instruction": "touch the red ball",
    }
    actions = policy.act(observation)
    assert actions.shape == (policy.spec["horizon"], policy.spec["action_dim"])
    assert np.isfinite(actions).all()
    other = policy.act({**observation, "state": np.full(2, 0.5)})
    assert not np.array_equal(actions, other)
    named = {**observation, "state": np.full(2, 9.0)}
    for wrong, parts in (
        ({**named, "images": {}}, ["images", "overhead", "oblique"]),
        ({**named, "images": [picture]}, ["images", 1, 2, "overhead", "oblique"]),
        ({**named, "state": np.zeros(3)}, ["state", "[3]", "[2]"]),
        ({"instruction": ""}, ["images", "state"]),
    ):
        with pytest.raises(atlas.errors.AtlasError) as refused:
            policy.act(wrong)
        assert unnamed(str(refused.value), *parts) == []
    assert max(state.max() for state in policy._states) == 0.5, "what was refused is not remembered"


def test_dry_run_writes_nothing(tmp_path):
    done = train("dry_run=true", f"outputs={tmp_path / 'new'}", *TINY, "optim.scale_lr=sqrt")
    assert not (tmp_path / "new").exists()
    rows = [line for line in done.stdout.splitlines() if line]
    for parts in (
        ("32", "8", "4"),  # samples a batch, a GPU, and micro-batches
        ("sqrt", "32", "8", "4", "0.001", "0.002"),  # the scaled rate
        ("6", "64"),  # a validation every so many steps, on so many samples
    ):
        assert any(unnamed(row, *parts) == [] for row in rows), parts
    cells = [row.split() for row in rows]
    (count, rates) = (row[1:] for row in cells if row[0] == "vision")
    assert count[0] == "0" and int(count[1].replace(",", "")) > 0  # trained, frozen
    assert not any(re.search(r"\d", rate) for rate in rates)


def test_parts_of_a_persons_own(tmp_path):
    arguments = ("optim=plain", "schedule=staircase", "~schedule.warmup")
    train(*quick(tmp_path, *arguments))
    run = only_run(tmp_path)
    rates = [line["lr/head"] for line in lines(run / "metrics.jsonl") if "lr/head" in line]
    assert rates[0] == 0.05 and len(set(rates)) == 4
    assert status(run)["best"]["value"] < 0.05


def test_early_stop_is_a_finished_run(tmp_path):
    train(*quick(tmp_path, "optim.lr=1e-12", "trainer.patience=1", "trainer.ema=null"))
    found = status(only_run(tmp_path))
    assert found["state"] == "finished" and found["step"] < 24 and found["reason"]


def test_init_from_starts_with_the_best_weights_of_another_run(tmp_path):
    train(*quick(tmp_path))
    source = only_run(tmp_path)
    train(*quick(tmp_path, f"init_from={source.name}", "trainer.steps=8", "name=longer"))
    longer = next(tmp_path.glob("longer/*/metrics.jsonl"))
    first = lines(longer)[0]["train/loss"]
    assert first < lines(source / "metrics.jsonl")[0]["train/loss"]


def test_nan_names_step_samples_and_checkpoint(tmp_path):
    done = train(*quick(tmp_path, "+data.train.bad=3"), code=1)
    run = only_run(tmp_path)
    failure = json.loads((run / "logs" / "failure.json").read_text())
    saved = max((run / "checkpoints").glob("0*")).name
    assert failure["kind"] == "NaN" and failure["step"] >= int(saved)
    assert unnamed(done.stderr, failure["step"], 3, saved) == []
    assert "Traceback" not in done.stderr
    assert status(run)["state"] == "failed" and "NonFiniteError" in status(run)["reason"]


def test_another_model_in_the_checkpoint(tmp_path):
    train(*quick(tmp_path, "trainer.steps=5"))
    run = only_run(tmp_path)
    done = train(*quick(tmp_path, f"init_from={run.name}", "model.width=8", "name=other"), code=1)
    (line,) = (line for line in done.stderr.splitlines() if "encoder.weight" in line)
    assert unnamed(line, "encoder.weight", "(16, 4)", "(8, 4)") == []
