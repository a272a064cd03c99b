"""BabyAI's levels: what the bot demonstrates carries its instruction out, and rollouts are told apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

pytest.importorskip("minigrid", reason="minigrid is not installed (extra sim)")

from commands import only_run, train, unnamed

from atlas.data import babyai
from atlas.data.babyai import BabyAI
from atlas.data.tabletop import Tabletop
from atlas.errors import ConfigError
from atlas.models.vla import VLA
from atlas.policy.evaluate import evaluate, table
from atlas.run.directory import Run
from atlas.training.build import build_model
from launchers.launch import resolve

torch.set_num_threads(1)

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture(scope="module")
def val() -> BabyAI:
    return BabyAI(split="val", episodes=12, val_episodes=6, rollouts=6)


def test_samples(val: BabyAI) -> None:
    train = BabyAI(episodes=12)
    assert (len(train.ends), len(val.ends)) == (12, 6)
    assert train.spec == val.spec
    sample = train[0]
    assert sample["images"].shape == (1, 3, 56, 56)
    assert sample["images"].dtype == torch.uint8
    assert (sample["state"].shape, sample["actions"].shape) == ((1, 3), (4, 7))
    assert sample["instruction"].startswith("go to")
    last = train[int(train.ends[0]) - 1]
    assert last["action_mask"].tolist() == [True, False, False, False]
    assert torch.equal(sample["actions"].sum(1), sample["action_mask"].float())


def test_scenes_are_a_function_of_the_seed_and_the_split(val: BabyAI) -> None:
    again = BabyAI(split="val", episodes=12, val_episodes=6)
    assert np.array_equal(again.images, val.images)
    babyai._demonstrate.cache_clear()
    fresh = BabyAI(split="val", episodes=12, val_episodes=6)
    assert np.array_equal(fresh.images, val.images)
    assert not np.array_equal(
        BabyAI(split="val", val_episodes=6, seed=1).images[:9], val.images[:9]
    )
    assert not np.array_equal(BabyAI(episodes=12).images[:9], val.images[:9])


def test_the_bot_succeeds_and_standing_still_does_not(
    val: BabyAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is demonstrated, played back in its scenes, carries out every instruction."""
    first = [int(end) for end in (0, *val.ends[:-1])]
    step = 0

    def bot(batch: dict[str, Any]) -> torch.Tensor:
        nonlocal step
        rows = [start + step for start, end in zip(first, val.ends) if start + step < end]
        assert torch.equal(batch["images"], torch.from_numpy(val.images[rows])), "another scene"
        step += 1
        return torch.from_numpy(val.actions[rows])[:, None]

    monkeypatch.setattr(babyai, "ROLLOUT", babyai.VAL)
    outcomes = val.rollout(bot, range(6))
    assert outcomes["success"].tolist() == [1.0] * 6
    assert outcomes["steps"].tolist() == np.diff([0, *val.ends]).tolist()

    def still(batch: dict[str, Any]) -> torch.Tensor:
        actions = torch.zeros(len(batch["instruction"]), 4, 7)
        actions[..., 6] = 1  # "done", which does nothing here
        return actions

    assert val.rollout(still, range(3))["success"].tolist() == [0.0] * 3


def test_actions_are_drawn_and_rollouts_repeat(val: BabyAI) -> None:
    def unsure(batch: dict[str, Any]) -> torch.Tensor:
        return torch.tensor([0.3, 0.3, 0.4, 0, 0, 0, 0]).expand(len(batch["instruction"]), 4, 7)

    likely = np.array([0.2, 0, 0.8, 0, 0, 0, 0], np.float32)
    drawn = [val._draw(likely, 3, step) for step in range(100)]
    assert set(drawn) == {0, 2} and 65 < drawn.count(2) < 95
    first, again = val.rollout(unsure, range(4)), val.rollout(unsure, range(4))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    one = val.rollout(unsure, [2])
    assert one["steps"][0] == first["steps"][2], "whatever other scenes are played"


def test_what_rollouts_are_compared_with(val: BabyAI) -> None:
    found = val.rollout_baselines(range(12))
    assert list(found) == ["wander", "bot"]
    assert found["bot"]["success"].mean() == 1.0 > found["wander"]["success"].mean()
    assert (found["bot"]["steps"] <= 64).all()
    assert found["bot"]["steps"].mean() < found["wander"]["steps"].mean()


def policy(data: Any, *overrides: str) -> VLA:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve(compose("config", list(overrides)))
    built: VLA = build_model(config, data.spec)  # type: ignore[assignment]
    return built


@pytest.mark.parametrize("head", ["l1", "flow_matching"])
def test_discrete_actions_are_not_regressed(val: BabyAI, head: str) -> None:
    with pytest.raises(ConfigError) as raised:
        policy(val, f"model/action_head={head}")
    assert unnamed(str(raised.value), 7, "model/action_head=categorical") == []


def test_numbers_are_not_chosen_among() -> None:
    data = Tabletop(episodes=2, val_episodes=1)
    with pytest.raises(ConfigError) as raised:
        policy(data, "model/action_head=categorical")
    assert unnamed(str(raised.value), 2, "model/action_head=l1") == []


def test_statistics_of_choices_do_not_count(val: BabyAI) -> None:
    head, batch = "model/action_head=categorical", val.batch([0, 1])
    moments = {"mean": [0.3] * 7, "std": [0.2] * 7}
    statistics = {**val.spec["statistics"], "actions": moments}
    other = SimpleNamespace(spec={**val.spec, "statistics": statistics})
    assert torch.equal(policy(val, head).act(batch), policy(other, head).act(batch))
    relative = SimpleNamespace(spec={**val.spec, "relative": True})
    with pytest.raises(ConfigError, match="relative"):  # the key that makes the difference
        policy(relative, head)


def test_the_recipe_learns(val: BabyAI) -> None:
    """On a handful of frames it learns by heart what the bot does."""
    torch.manual_seed(0)
    model = policy(val, "experiment=babyai", "data=babyai")
    batch = val.batch(range(len(val)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = model(batch)
    for _ in range(60):
        out = model(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    out = model.eval()(batch)
    assert out["weight"] == batch["action_mask"].sum()
    assert out["accuracy"] > 0.8 > first["accuracy"]
    assert torch.allclose(model.act(batch).sum(dim=-1), torch.ones(len(val), val.horizon))


def test_a_run_is_evaluated_beside_what_learns_nothing(tmp_path: Path) -> None:
    train(
        f"outputs={tmp_path}",
        "experiment=babyai",
        "tracking=none",
        "data.episodes=8",
        "data.val_episodes=4",
        "data.rollouts=6",
        "trainer.steps=2",
        "schedule.warmup=0",
    )
    run = Run(only_run(tmp_path))
    last = run.read_status().last
    assert {"val/accuracy", "val/success", "val/l1_vs_mean_action"} <= last.keys()
    found = evaluate(run, "cpu")
    assert found["accuracy"]["mean"] == pytest.approx(last["val/accuracy"], abs=1e-6)
    assert 0 < found["accuracy"]["majority_action"] < 1
    assert found["rollout"]["success"] == pytest.approx(last["val/success"])
    assert found["rollout_baselines"]["bot"]["success"] == 1.0
    told = table(found)
    assert "majority_action" in told
    assert any(unnamed(line, "wander", "success") == [] for line in told.splitlines())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"level": "BabyAI-Nowhere-v0"}, ["data.level=BabyAI-Nowhere-v0", "BabyAI-GoToLocal-v0"]),
        ({"episodes": 0}, ["data.episodes=0", 1]),
        ({"executed": 5}, ["data.executed=5", 1, "data.horizon=4"]),
        ({"split": "test"}, ["split='test'", "'train'", "'val'"]),
    ],
)
def test_what_cannot_be(options: dict[str, Any], named: list[Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        BabyAI(**options)
    assert unnamed(str(raised.value), *named) == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(babyai, "find_spec", lambda _: None)
    with pytest.raises(ConfigError) as raised:
        BabyAI()
    assert unnamed(str(raised.value), "minigrid", "pip install -e '.[sim]'") == []
