"""The built-in data set: demonstrations of touching a named object on a simulated table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from atlas.data import simulator
from atlas.data.arrays import Floats, Ints, Pixels
from atlas.data.augment import splitmix
from atlas.data.demonstrations import Demonstrations, check_split, moments
from atlas.data.protocol import Act
from atlas.data.simulator import Scenes
from atlas.errors import ConfigError

TRAIN, VAL, ROLLOUT = range(3)  # streams of scenes; no two streams share a scene
EXECUTED = 4  # actions of a chunk that a rollout executes before it asks the policy again
ROLLOUT_STEPS = 36  # the longest demonstrations take about 25


class Tabletop(Demonstrations):
    """Frames of demonstrations; a sample is the camera images and the next `horizon` actions.

    split: `train` has `episodes` demonstrations, `val` has `val_episodes` others.
    seed: determines all scenes, demonstrations and rollouts.
    horizon: actions in a chunk. rollouts: number of scenes for `rollout`, in neither split.
    blank_instruction: make every instruction empty, to measure how much language contributes.
    augment: `batch` shifts each view by up to this many pixels in each direction (0: off).
    """

    def __init__(
        self,
        split: str = "train",
        episodes: int = 500,
        val_episodes: int = 50,
        seed: int = 0,
        horizon: int = 8,
        rollouts: int = 50,
        blank_instruction: bool = False,
        augment: int = 0,
    ) -> None:
        check_split(split, episodes=episodes, val_episodes=val_episodes, horizon=horizon)
        _check_augment(augment)
        self.split, self.seed, self.horizon, self.augment = split, seed, horizon, augment
        self.scenes, self.blank_instruction = rollouts, blank_instruction
        training = _demonstrations(seed, TRAIN, episodes)
        own = training if split == "train" else _demonstrations(seed, VAL, val_episodes)
        self.episode, self.ends = own.episode, own.ends
        self.states, self.actions = own.states, own.actions
        self.instructions = [""] * len(own.scenes) if blank_instruction else own.instructions
        self.images = simulator.draw_tables(own.scenes)[own.episode]
        simulator.draw_grippers(self.images, self.states)
        self.spec: dict[str, Any] = {
            "cameras": list(simulator.CAMERAS),
            "image_size": [simulator.SIZE, simulator.SIZE],
            "state_dim": 2,
            "history": 1,
            "action_dim": 2,
            "horizon": horizon,
            "vocabulary": sorted({w for text in training.instructions for w in text.split()}),
            "relative": False,
            "statistics": {
                "state": moments(training.states),
                "actions": moments(training.actions),
            },
        }

    @property
    def augments(self) -> bool:
        """Whether a sample's images depend on its seed."""
        return bool(self.augment)

    def _augment(self, images: Pixels, seeds: Ints) -> Pixels:
        return _shift(images, seeds, self.augment)

    def rollout(self, policy: Act, scenes: Sequence[int]) -> dict[str, Floats]:
        """Return the outcomes, one value a scene, of `policy` acting in all `scenes` in lockstep.

        policy: from observations (images uint8 [B, V, 3, H, W], state [B, 1, 2], instruction) to
        actions [B, T, 2] in table widths a step, of which the first EXECUTED are executed.
        `success` is 1 if the gripper ends on the named object and 0 otherwise; `distance` is the
        gripper's final distance from the object's centre, in table widths.
        """
        world = simulator.draw_scenes(self.seed, ROLLOUT, [int(i) for i in scenes])
        instructions = [""] * len(world) if self.blank_instruction else world.instructions()
        tables, grippers = simulator.draw_tables(world), world.starts
        for _ in range(0, ROLLOUT_STEPS, EXECUTED):
            images = tables.copy()
            simulator.draw_grippers(images, grippers)
            observation = {
                "images": torch.from_numpy(images),
                "state": torch.from_numpy(grippers[:, None]),
                "instruction": instructions,
            }
            chunk = policy(observation).detach().float().cpu().numpy()
            for step in range(min(EXECUTED, chunk.shape[1])):
                grippers = simulator.move(grippers, chunk[:, step])
        distance = np.linalg.norm(grippers - world.targets, axis=-1).astype(np.float32)
        success = simulator.on_target(world, grippers).astype(np.float32)
        return {"success": success, "distance": distance}


class _Recorded:
    """Concatenated episodes: a row of `states` and `actions` is a frame."""

    def __init__(self, scenes: Scenes) -> None:
        states, actions, lengths = simulator.demonstrate(scenes)
        within = np.arange(states.shape[1]) < lengths[:, None]
        self.scenes, self.instructions = scenes, scenes.instructions()
        self.states, self.actions = states[within], actions[within]
        self.episode: Ints = np.repeat(np.arange(len(scenes)), lengths)
        self.ends: Ints = np.cumsum(lengths)  # one past the last frame of each episode


@lru_cache(maxsize=4)
def _demonstrations(seed: int, stream: int, episodes: int) -> _Recorded:
    # Without images: both splits need the training statistics, and this makes them cheap.
    return _Recorded(simulator.draw_scenes(seed, stream, list(range(episodes))))


def _check_augment(augment: int) -> None:
    if not 0 <= augment < simulator.SIZE // 2:
        raise ConfigError(f"data.train.augment={augment} must be 0 to {simulator.SIZE // 2 - 1} px")


def _shift(images: Pixels, seeds: Ints, most: int) -> Pixels:
    """Return each view shifted by up to `most` pixels, with its border repeated.

    `seeds`: one seed a sample.
    """
    count, views, _, height, width = images.shape
    lanes = np.arange(2 * views, dtype=np.uint64)
    draws = splitmix(splitmix(seeds.astype(np.uint64))[:, None] + lanes)
    offsets = (draws % np.uint64(2 * most + 1)).astype(np.int64).reshape(count, views, 2)
    border = [(0, 0)] * 3 + [(most, most)] * 2
    padded, shifted = np.pad(images, border, mode="edge"), np.empty_like(images)
    for sample, view in np.ndindex(count, views):
        down, right = offsets[sample, view]
        window = np.s_[:, down : down + height, right : right + width]
        shifted[sample, view] = padded[sample, view][window]
    return shifted
