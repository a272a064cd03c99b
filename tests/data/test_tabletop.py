"""The simulated table top: what it shows, what it demonstrates, and that the seed tells it all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import unnamed
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from atlas.data import simulator
from atlas.data.tabletop import ROLLOUT, Tabletop
from atlas.errors import ConfigError

torch.set_num_threads(1)

CONF = Path(__file__).resolve().parents[2] / "conf"
SMALL: dict[str, Any] = {"episodes": 6, "val_episodes": 3, "rollouts": 4, "seed": 3}


@pytest.fixture(scope="module")
def train() -> Tabletop:
    return Tabletop("train", **SMALL)


@pytest.fixture(scope="module")
def val() -> Tabletop:
    return Tabletop("val", **SMALL)


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


def demonstrator(seed: int, scenes: list[int]) -> Any:
    """A policy that knows where the named object is."""
    targets = simulator.draw_scenes(seed, ROLLOUT, scenes).targets

    def act(batch: dict[str, Any]) -> torch.Tensor:
        gripper, chunk = batch["state"][:, 0].numpy(), []
        for _ in range(8):
            chunk.append(simulator.command(gripper, targets))
            gripper = simulator.move(gripper, chunk[-1])
        return torch.from_numpy(np.stack(chunk, axis=1))

    return act


def test_a_sample_has_the_shapes_of_the_contract(train: Tabletop) -> None:
    sample = train[0]
    shapes = {k: (v.dtype, tuple(v.shape)) for k, v in sample.items() if k != "instruction"}
    assert shapes == {
        "images": (torch.uint8, (2, 3, 56, 56)),
        "state": (torch.float32, (1, 2)),
        "actions": (torch.float32, (8, 2)),
        "action_mask": (torch.bool, (8,)),
    }
    assert sample["instruction"].split()[0] in {"touch", "reach", "find", "go"}


@pytest.mark.parametrize("ids", [[0], [5, 0, 5], range(20, 3, -4)])
def test_the_fast_path_equals_collated_samples(train: Tabletop, ids: Any) -> None:
    collated: dict[str, Any] = {}
    for key in train[0]:
        values = [train[i][key] for i in ids]
        collated[key] = values if key == "instruction" else torch.stack(values)
    assert equal(train.batch(list(ids), list(ids)), collated)


def test_chunks_are_the_commands_that_follow_up_to_the_end_of_the_episode(train: Tabletop) -> None:
    end = int(train.ends[0])
    for index, valid in [(0, 8), (end - 8, 8), (end - 7, 7), (end - 1, 1), (end, 8)]:
        sample = train[index]
        assert sample["action_mask"].tolist() == [True] * valid + [False] * (8 - valid)
        assert np.array_equal(sample["actions"][:valid], train.actions[index : index + valid])
        assert not sample["actions"][valid:].any()


@pytest.mark.parametrize("change", [{"seed": 4}, {"split": "val"}])
def test_other_seeds_and_splits_are_other_demonstrations(
    train: Tabletop, change: dict[str, Any]
) -> None:
    other = Tabletop(**{**SMALL, **change})
    starts = {tuple(train.states[first]) for first in (0, *train.ends[:-1])}
    assert not starts & {tuple(state) for state in other.states}


def test_everything_is_a_function_of_the_seed_and_not_of_how_much_is_made(train: Tabletop) -> None:
    again, more = Tabletop(**SMALL), Tabletop(**{**SMALL, "episodes": 9})
    everything = np.arange(len(train))
    assert equal(again.batch(everything), train.batch(everything))
    assert equal(more.batch(everything), train.batch(everything))
    assert len(more) > len(train)


def test_augmentation_depends_on_the_seed_of_each_sample_alone() -> None:
    data = Tabletop(**SMALL, augment=2)
    ids, seeds = np.arange(12), np.arange(100, 112)
    whole = data.batch(ids, seeds)
    parts = [data.batch(ids[i : i + 5], seeds[i : i + 5])["images"] for i in (0, 5, 10)]
    assert torch.equal(torch.cat(parts), whole["images"])
    assert not torch.equal(data.batch(ids, seeds + 1)["images"], whole["images"])
    same = data.batch([0] * 64, np.arange(64))["images"]
    assert len(torch.unique(same[:, 0], dim=0)) > 15  # of 25 shifts


def test_an_augmented_image_is_a_shifted_one() -> None:
    data = Tabletop(**SMALL, augment=1)
    plain = data[0]["images"]
    for shifted in data.batch([0] * 8, np.arange(8))["images"]:
        for view in range(2):
            padded = torch.nn.functional.pad(plain[view].float(), (1, 1, 1, 1), mode="replicate")
            windows = [padded[:, y : y + 56, x : x + 56] for y in range(3) for x in range(3)]
            assert any(torch.equal(shifted[view].float(), window) for window in windows)


def test_the_spec_is_plain_and_of_the_training_split(train: Tabletop, val: Tabletop) -> None:
    assert json.loads(json.dumps(train.spec)) == train.spec == val.spec
    actions = train.spec["statistics"]["actions"]
    assert np.allclose(actions["mean"], train.actions.mean(0))
    assert np.allclose(actions["std"], train.actions.std(0), rtol=1e-4)
    words = {word for text in train.instructions for word in text.split()}
    assert train.spec["vocabulary"] == sorted(words)


def test_both_cameras_see_the_gripper_and_all_objects(train: Tabletop) -> None:
    images = train.images.astype(int)
    assert (images.max(axis=2) < 40).any(axis=(2, 3)).all()  # the dark gripper, in every view
    scenes = simulator.draw_scenes(3, 0, list(range(6)))
    tables = simulator.draw_tables(scenes).astype(int)
    for scene in range(6):
        for colour in scenes.colours[scene]:
            rgb = np.array(list(simulator.COLOURS.values()))[colour][:, None, None]
            seen = (np.abs(tables[scene] - rgb).sum(axis=1) < 12).sum(axis=(1, 2))
            assert (seen >= 4).all(), (scene, colour, seen)


def test_the_demonstrator_succeeds_in_every_scene_and_standing_still_in_none(val: Tabletop) -> None:
    scenes = list(range(val.scenes))
    result = val.rollout(demonstrator(3, scenes), scenes)
    assert result["success"].tolist() == [1.0] * 4
    still = val.rollout(lambda batch: torch.zeros(len(batch["state"]), 8, 2), scenes)
    assert still["success"].tolist() == [0.0] * 4


def test_a_scene_of_a_rollout_is_the_same_alone_and_in_company(val: Tabletop) -> None:
    def drift(batch: dict[str, Any]) -> torch.Tensor:
        pixel = batch["images"].float().mean(dim=(1, 2, 3, 4)) / 255
        return (pixel[:, None, None] * 0.01).expand(-1, 8, 2)

    together = val.rollout(drift, [0, 1, 2, 3])["distance"]
    alone = [float(val.rollout(drift, [i])["distance"][0]) for i in range(4)]
    assert together.tolist() == alone and len(set(alone)) == 4


def test_blank_instructions_are_blank_everywhere_and_change_nothing_else(train: Tabletop) -> None:
    blank = Tabletop("val", **SMALL, blank_instruction=True)
    seen: list[str] = []

    def act(batch: dict[str, Any]) -> torch.Tensor:
        seen.extend(batch["instruction"])
        return torch.zeros(len(batch["state"]), 8, 2)

    blank.rollout(act, [0, 1])
    assert {*seen, *blank.batch(np.arange(len(blank)))["instruction"]} == {""}
    assert blank.spec == train.spec


def test_the_mean_action_is_as_far_off_as_counting_one_by_one_says(
    train: Tabletop, val: Tabletop
) -> None:
    mean = torch.tensor(train.spec["statistics"]["actions"]["mean"])
    errors = [
        (s["actions"] - mean).abs()[s["action_mask"]] for s in map(val.__getitem__, range(len(val)))
    ]
    expected = float(torch.cat(errors).mean())
    assert val.baselines(train)["mean_action"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"split": "test"}, ["split='test'", "'train'", "'val'"]),
        ({"episodes": 0}, ["data.episodes=0", 1]),
        ({"horizon": -1}, ["data.horizon=-1", 1]),
        ({"augment": 28}, ["data.train.augment=28", 0, 27]),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], named: list[Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        Tabletop(**{**SMALL, **change})
    assert unnamed(str(raised.value), *named) == []


def test_an_index_past_the_end_ends_the_iteration(train: Tabletop) -> None:
    with pytest.raises(IndexError):
        train[len(train)]


def test_the_configuration_makes_both_splits() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["data=tabletop", "data.episodes=2", "seed=3"])
    train, val = instantiate(config.data.train), instantiate(config.data.val)
    assert train.spec == val.spec and val.scenes == config.data.rollouts
    assert equal(train[0], Tabletop(**SMALL)[0])
