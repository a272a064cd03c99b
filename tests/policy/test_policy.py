"""`Policy.act`: what a model is given for an observation, whatever form the observation has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from atlas.errors import AtlasError
from atlas.policy.policy import Policy

CPU = torch.device("cpu")
SPEC = {"cameras": ["top", "hand"], "image_size": [4, 6], "state_dim": 2, "history": 3}


class Recorder(nn.Module):
    """Keeps the batches that it is given; its actions are [B, 5, 2], in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.batches: list[dict[str, Any]] = []

    def act(self, batch: dict[str, Any]) -> Tensor:
        self.batches.append(batch)
        size = len(batch["state"])
        return (self.weight * torch.arange(10.0)).view(1, 5, 2).expand(size, -1, -1).bfloat16()


def image(value: int, height: int = 4, width: int = 6) -> np.ndarray:
    """A picture [H, W, 3] whose red, green and blue are `value`, 1 and 2."""
    return np.broadcast_to(np.array([value, 1, 2], np.uint8), (height, width, 3))


def observation(**changes: Any) -> dict[str, Any]:
    images = {"hand": image(7), "top": image(5)}
    return {"images": images, "state": [0.5, 1.5], "instruction": "lift", **changes}


def policy(spec: dict[str, Any] | None = None) -> tuple[Policy, Recorder]:
    model = Recorder()
    return Policy(model, SPEC if spec is None else spec, CPU, step=9), model


def test_an_observation_becomes_a_batch_of_one() -> None:
    robot, model = policy()
    actions = robot.act(observation())
    (batch,) = model.batches
    assert (actions.shape, actions.dtype) == ((5, 2), np.float32)
    assert not model.training and robot.step == 9
    assert (batch["images"].shape, batch["images"].dtype) == ((1, 2, 3, 4, 6), torch.uint8)
    assert (batch["state"].shape, batch["state"].dtype) == ((1, 3, 2), torch.float32)
    assert batch["instruction"] == ["lift"]


@pytest.mark.parametrize(
    "images",
    [
        {"top": image(5), "hand": image(7)},
        {"hand": image(7), "other": image(9), "top": image(5)},
        [image(5), image(7)],
        np.stack([image(5), image(7)]),
    ],
    ids=["by name", "in any order and more than needed", "a list", "an array"],
)
def test_images_are_in_the_order_of_the_cameras(images: Any) -> None:
    robot, model = policy()
    robot.act(observation(images=images))
    pixels = model.batches[0]["images"][0, :, :, 0, 0]
    assert pixels.tolist() == [[5, 1, 2], [7, 1, 2]], "[V, RGB]"


def test_images_of_another_size_are_resized() -> None:
    robot, model = policy()
    ramp = np.repeat(np.arange(0, 240, 20, np.uint8), 8).reshape(12, 8)[..., None].repeat(3, -1)
    robot.act(observation(images=[ramp, image(7, 8, 12)]))
    top, hand = model.batches[0]["images"][0]
    assert top.shape == hand.shape == (3, 4, 6)
    assert hand.unique().tolist() == [1, 2, 7]
    column = top[0, :, 0].int()
    assert (column.diff() > 40).all() and torch.equal(column[:, None].expand(-1, 6), top[0].int())


def test_states_are_remembered_until_reset() -> None:
    robot, model = policy()
    for value in range(5):
        robot.act(observation(state=[value, 0]))
    robot.reset()
    robot.act(observation(state=[9, 0]))
    seen = [batch["state"][0, :, 0].tolist() for batch in model.batches]
    assert seen == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [9, 9, 9]]


def test_a_policy_without_a_spec_takes_what_it_is_given() -> None:
    robot, model = policy({})
    robot.act(observation(images=[image(1, 3, 3)], state=np.zeros(7)))
    robot.act(observation(images=[image(1, 3, 3)], state=np.ones(7)))
    assert model.batches[1]["images"].shape == (1, 1, 3, 3, 3)
    assert model.batches[1]["state"].tolist() == [[[1.0] * 7]], "no history"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"images": {"top": image(5)}}, ["hand", "top"]),
        ({"images": [image(5)] * 3}, ["3", "2", "top", "hand"]),
        ({"state": [1.0]}, ["state", "[1]", "[2]"]),
        ({"state": [[1.0, 2.0]]}, ["state", "[1, 2]", "[2]"]),
    ],
)
def test_what_is_refused_is_not_remembered(changes: dict[str, Any], parts: list[str]) -> None:
    robot, model = policy()
    with pytest.raises(AtlasError) as refused:
        robot.act(observation(**changes))
    assert [part for part in parts if part not in str(refused.value)] == []
    robot.act(observation(state=[3, 0]))
    assert model.batches[0]["state"][0, :, 0].tolist() == [3, 3, 3]


def test_missing_keys_are_named() -> None:
    robot, _ = policy()
    with pytest.raises(AtlasError) as refused:
        robot.act({"state": [1.0, 2.0]})
    assert "images" in str(refused.value) and "instruction" in str(refused.value)


def test_a_batch_acts_without_gradients_and_on_the_cpu() -> None:
    robot, _ = policy()
    actions = robot.act_batch({"state": torch.zeros(4, 3, 2)})
    assert (actions.shape, actions.dtype, actions.requires_grad) == (
        (4, 5, 2),
        torch.float32,
        False,
    )
