"""BabyAI's levels as a data set: its bot demonstrates, and a policy acts in scenes of its own.

BabyAI (Chevalier-Boisvert et al. 2019) is a grid world with instructions; minigrid has its levels
and the bot that solves them. Actions are discrete: an action is a vector with a 1 for the one that
is taken, and a policy predicts how likely each is.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from atlas.data.augment import uniform
from atlas.data.demonstrations import Batch, Demonstrations, Floats, Pixels, Policy, check, moments
from atlas.errors import ConfigError

TRAIN, VAL, ROLLOUT = range(3)  # streams of scenes that have no scene in common
SCENES = 1_000_000  # in a stream
TILE = 8  # pixels; the robot sees 7 x 7 tiles, itself in the middle of the lowest row
SIDE = 7 * TILE
ACTIONS = 7  # left, right, forward, pickup, drop, toggle, done
CAMERA = "agent"


class BabyAI(Demonstrations):
    """Frames of the bot's demonstrations of one level; what the robot sees is its only camera.

    split: `train` has `episodes` demonstrations, `val` has `val_episodes` others.
    level: a name of minigrid's registry, such as BabyAI-GoToLocal-v0.
    seed: all scenes are a function of it. horizon: actions in a chunk, of which rollouts execute
    `executed` before they ask again. rollouts: scenes for `rollout`, in neither split.

    A state is the direction the robot looks in (cosine and sine) and whether it carries a thing.
    """

    def __init__(
        self,
        split: str = "train",
        level: str = "BabyAI-GoToLocal-v0",
        episodes: int = 1000,
        val_episodes: int = 100,
        seed: int = 0,
        horizon: int = 4,
        executed: int = 1,
        rollouts: int = 100,
    ) -> None:
        _check(split, episodes, val_episodes, horizon, executed)
        self.level, self.seed, self.horizon, self.executed = level, seed, horizon, executed
        self.scenes = rollouts
        training = _demonstrate(level, seed, TRAIN, episodes)
        own = training if split == "train" else _demonstrate(level, seed, VAL, val_episodes)
        self.images, self.states, self.actions = own.images, own.states, own.actions
        self.episode, self.ends = own.episode, own.ends
        self.instructions = own.instructions
        self._often = training.actions.mean(axis=0)
        words = {word for text in training.instructions for word in text.split()}
        self.spec = {
            "cameras": [CAMERA],
            "image_size": [SIDE, SIDE],
            "state_dim": training.states.shape[1],
            "history": 1,
            "action_dim": ACTIONS,
            "horizon": horizon,
            "vocabulary": sorted(words),
            "relative": False,
            "discrete": True,
            "statistics": {
                "state": moments(training.states),
                "actions": {"mean": [0.0] * ACTIONS, "std": [1.0] * ACTIONS},
            },
        }

    @property
    def action_names(self) -> list[str]:
        """The actions in minigrid's words."""
        return ["left", "right", "forward", "pickup", "drop", "toggle", "done"]

    def rollout(self, policy: Policy, scenes: Sequence[int]) -> dict[str, Floats]:
        """Let `policy` act in these scenes, all in lock-step; one value a scene.

        policy: raw observations (images uint8 [B, 1, 3, H, W], state [B, 1, 3], instruction) to
        [B, T, 7], the probability of each action. Returns `success`, 1 where the instruction was
        carried out within the level's own limit of steps, and `steps` it took.

        Actions are drawn, as a function of seed, scene and step. The most likely one would not do:
        without a memory, a policy that turns to and fro once does so for good.
        """
        worlds = [_reset(self.level, self.seed, ROLLOUT, int(scene)) for scene in scenes]
        success = np.zeros(len(worlds), np.float32)
        steps = np.zeros(len(worlds), np.float32)
        going = list(range(len(worlds)))
        while going:
            chunks = policy(_observe([worlds[n] for n in going])).detach().float().cpu().numpy()
            for n, chunk in zip(list(going), chunks[:, : self.executed]):
                for likely in chunk:
                    action = self._draw(likely, int(scenes[n]), int(steps[n]))
                    _, reward, done, cut, _ = worlds[n].step(action)
                    steps[n] += 1
                    if done or cut:
                        success[n] = float(reward > 0)
                        going.remove(n)
                        break
        return {"success": success, "steps": steps}

    def rollout_baselines(self, scenes: Sequence[int]) -> dict[str, dict[str, Floats]]:
        """What `rollout` returns in these scenes for those that learn nothing.

        `wander` draws actions as often as the bot takes them, whatever it sees; `bot` is the
        demonstrator, which knows the whole map.
        """
        odds = torch.from_numpy(self._often)

        def wander(batch: Batch) -> torch.Tensor:
            return odds.expand(len(batch["instruction"]), self.horizon, -1)

        return {"wander": self.rollout(wander, scenes), "bot": self._solved(scenes)}

    def _solved(self, scenes: Sequence[int]) -> dict[str, Floats]:
        worlds = [_reset(self.level, self.seed, ROLLOUT, int(scene)) for scene in scenes]
        taken = np.array([len(list(_solve(world))) for world in worlds], np.float32)
        limits = np.array([world.max_steps for world in worlds], np.float32)
        success = (taken > 0).astype(np.float32)
        return {"success": success, "steps": np.where(taken > 0, taken, limits)}

    def _draw(self, likely: Floats, scene: int, step: int) -> int:
        """An action, as often as `likely` [7] says; the last where that says nothing."""
        odds = likely.clip(0, 1)
        drawn = uniform([self.seed * SCENES + scene], step + 1)[0, step] * odds.sum()
        return min(int(np.searchsorted(np.cumsum(odds), drawn, side="right")), ACTIONS - 1)


class _Recorded:
    """The bot's episodes one after the other: a row is a frame."""

    def __init__(self, episodes: list[list[tuple[Pixels, Floats, int]]], texts: list[str]) -> None:
        rows = [row for episode in episodes for row in episode]
        self.images = np.stack([image for image, _, _ in rows])[:, None]
        self.states = np.stack([state for _, state, _ in rows])
        self.actions = np.eye(ACTIONS, dtype=np.float32)[[action for _, _, action in rows]]
        lengths = [len(episode) for episode in episodes]
        self.episode = np.repeat(np.arange(len(episodes)), lengths)
        self.ends = np.cumsum(lengths)
        self.instructions = texts


@lru_cache(maxsize=4)
def _demonstrate(level: str, seed: int, stream: int, count: int) -> _Recorded:
    """The first `count` scenes of a stream that the bot can solve."""
    episodes, texts = [], []
    for scene in range(SCENES):
        world = _reset(level, seed, stream, scene)
        episode = list(_solve(world))
        if episode:
            episodes.append(episode)
            texts.append(world.mission)
        if len(episodes) == count:
            return _Recorded(episodes, texts)
        if scene > 10 * count + 100:
            break
    raise ConfigError(
        f"data.level={level}: the bot solved {len(episodes)} of {scene} scenes, and "
        f"{count} are wanted; choose a level that it can solve"
    )


def _solve(world: Any) -> Iterator[tuple[Pixels, Floats, int]]:
    """Image, state and action of each step; nothing where the bot does not get there."""
    from minigrid.utils.baby_ai_bot import BabyAIBot

    rows: list[tuple[Pixels, Floats, int]] = []
    action = None
    try:
        bot = BabyAIBot(world)
        while True:
            action = bot.replan(action)
            rows.append((_image(world), _state(world), int(action)))
            _, reward, done, cut, _ = world.step(action)
            if done or cut:
                return iter(rows if reward > 0 else [])
    except Exception:  # the bot's own assertions, in scenes that it was not made for
        return iter([])


def _reset(level: str, seed: int, stream: int, scene: int) -> Any:
    """A level's world in a scene's first state."""
    import gymnasium
    import minigrid  # noqa: F401  (it registers the levels)

    with contextlib.redirect_stdout(io.StringIO()):  # it tells of every layout that it rejects
        try:
            world: Any = gymnasium.make(level).unwrapped
        except gymnasium.error.Error as error:
            raise ConfigError(
                f"data.level={level} is no level of minigrid ({error}); for example "
                "BabyAI-GoToLocal-v0, BabyAI-GoToRedBall-v0 or BabyAI-PickupLoc-v0"
            ) from error
        world.reset(seed=(seed * 3 + stream) * SCENES + scene)
    return world


def _observe(worlds: Sequence[Any]) -> Batch:
    images = np.stack([_image(world) for world in worlds])[:, None]
    states = np.stack([_state(world) for world in worlds])[:, None]
    return {
        "images": torch.from_numpy(images),
        "state": torch.from_numpy(states),
        "instruction": [world.mission for world in worlds],
    }


def _image(world: Any) -> Pixels:
    """uint8 [3, H, W], what the robot sees, with itself in the middle of the lowest row."""
    frame: Pixels = world.get_frame(highlight=False, tile_size=TILE, agent_pov=True)
    return np.ascontiguousarray(frame.transpose(2, 0, 1))


def _state(world: Any) -> Floats:
    angle = np.pi / 2 * world.agent_dir
    carries = float(world.carrying is not None)
    return np.array([np.cos(angle), np.sin(angle), carries], np.float32).round(6)


def _check(split: str, episodes: int, val_episodes: int, horizon: int, executed: int) -> None:
    if find_spec("minigrid") is None:
        raise ConfigError("data=babyai needs minigrid: pip install -e '.[sim]'")
    check(split, episodes=episodes, val_episodes=val_episodes, horizon=horizon)
    if not 1 <= executed <= horizon:
        raise ConfigError(f"data.executed={executed} must be 1 to data.horizon={horizon}")
