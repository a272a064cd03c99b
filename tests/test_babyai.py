"""BabyAI's levels: what the bot demonstrates carries its instruction out, and rollouts are told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("minigrid", reason="minigrid is not installed (extra sim)")

from atlas.data import babyai
from atlas.data.babyai import BabyAI
from atlas.errors import ConfigError

torch.set_num_threads(1)


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
    monkeypatch.setattr(babyai, "PRIOR", 0.0)
    outcomes = val.rollout(bot, range(6))
    assert outcomes["success"].tolist() == [1.0] * 6
    assert outcomes["steps"].tolist() == np.diff([0, *val.ends]).tolist()

    def still(batch: dict[str, Any]) -> torch.Tensor:
        actions = torch.zeros(len(batch["instruction"]), 4, 7)
        actions[..., 6] = 1  # "done", which does nothing here
        return actions

    assert val.rollout(still, range(3))["success"].tolist() == [0.0] * 3


def test_an_uncertain_policy_wanders_and_rollouts_repeat(val: BabyAI) -> None:
    def unsure(batch: dict[str, Any]) -> torch.Tensor:
        return torch.zeros(len(batch["instruction"]), 4, 7)

    drawn = [val._draw(np.zeros(7, np.float32), 3, step) for step in range(60)]
    assert {0, 1, 2} <= set(drawn) <= {0, 1, 2, 3, 4}, "what the bot does, and nothing else"
    first, again = val.rollout(unsure, range(4)), val.rollout(unsure, range(4))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    one = val.rollout(unsure, [2])
    assert one["steps"][0] == first["steps"][2], "whatever other scenes are played"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"level": "BabyAI-Nowhere-v0"}, r"data\.level=BabyAI-Nowhere-v0 is no level of minigrid"),
        ({"episodes": 0}, r"data\.episodes=0"),
        ({"executed": 5}, r"data\.executed=5 must be 1 to data\.horizon=4"),
        ({"split": "test"}, "use 'train' or 'val'"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        BabyAI(**options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(babyai, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs minigrid: pip install -e '\.\[sim\]'"):
        BabyAI()
