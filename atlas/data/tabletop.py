"""The embedded data set: demonstrations of touching a named object on a simulated table top."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atlas.data import simulator
from atlas.data.augment import splitmix
from atlas.data.demonstrations import Demonstrations, Policy, check, moments
from atlas.data.simulator import Floats, Ints, Pixels, Scenes
from atlas.errors import ConfigError

TRAIN, VAL, ROLLOUT = range(3)  # streams of scenes that have no scene in common
EXECUTED = 4  # actions of a predicted chunk that a rollout executes before it asks again
ROLLOUT_STEPS = 36  # the longest demonstrations take about 25


class Tabletop(Demonstrations):
    """Frames of demonstrations; a sample is what the cameras see and the next `horizon` actions.

    split: `train` has `episodes` demonstrations, `val` has `val_episodes` others.
    seed: all scenes, demonstrations and rollouts are a function of it.
    horizon: actions in a chunk. rollouts: scenes for `rollout`, in neither split.
    blank_instruction: every instruction is the empty string, to measure what language is worth.
    augment: `batch` shifts each view by up to this many pixels, each way (0: not at all).
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
        _check(split, episodes, val_episodes, horizon, augment)
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

    def _augmented(self, images: Pixels, seeds: Ints) -> Pixels:
        return _shift(images, seeds, self.augment)

    def rollout(self, policy: Policy, scenes: Sequence[int]) -> dict[str, Floats]:
        """Let `policy` act in these scenes, all in lock-step; one value a scene.

        policy: raw observations (images uint8 [B, V, 3, H, W], state [B, 1, 2], instruction) to
        actions [B, T, 2] in table widths a step, of which the first few are executed.
        Returns `success`, 1 where the gripper ends on the named object and else 0, and
        `distance`, how far from its centre it ends, in table widths.
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
    """Episodes one after the other: a row of `states` and `actions` is a frame."""

    def __init__(self, scenes: Scenes) -> None:
        states, actions, lengths = simulator.demonstrate(scenes)
        within = np.arange(states.shape[1]) < lengths[:, None]
        self.scenes, self.instructions = scenes, scenes.instructions()
        self.states, self.actions = states[within], actions[within]
        self.episode: Ints = np.repeat(np.arange(len(scenes)), lengths)
        self.ends: Ints = np.cumsum(lengths)  # one past the last frame of each episode


@lru_cache(maxsize=4)
def _demonstrations(seed: int, stream: int, episodes: int) -> _Recorded:
    """Without images, so that both splits can know the training statistics at no cost."""
    return _Recorded(simulator.draw_scenes(seed, stream, list(range(episodes))))


def _check(split: str, episodes: int, val_episodes: int, horizon: int, augment: int) -> None:
    check(split, episodes=episodes, val_episodes=val_episodes, horizon=horizon)
    if not 0 <= augment < simulator.SIZE // 2:
        raise ConfigError(f"data.train.augment={augment} must be 0 to {simulator.SIZE // 2 - 1} px")


def _shift(images: Pixels, seeds: NDArray[Any], most: int) -> Pixels:
    """Move each view by up to `most` pixels each way, repeating the border; one seed a sample."""
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
