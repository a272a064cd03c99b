"""BabyAI's levels as a data set: a bot gives the demonstrations, a policy acts in other scenes.

BabyAI (Chevalier-Boisvert et al. 2019) is a grid world with instructions; the package minigrid has
its levels and a bot that solves them. Actions are discrete: an action is a one-hot vector, and a
policy predicts the probability of each action.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from atlas.data.arrays import Floats, Pixels
from atlas.data.augment import uniform
from atlas.data.demonstrations import Demonstrations, check_split, moments
from atlas.data.protocol import Act
from atlas.errors import ConfigError

TRAIN, VAL, ROLLOUT = range(3)  # streams of scenes; no two streams share a scene
SCENES = 1_000_000  # scenes in a stream
TILE = 8  # pixels; the robot sees 7 x 7 tiles and is in the middle of the bottom row
SIDE = 7 * TILE
ACTIONS = 7  # left, right, forward, pickup, drop, toggle, done
CAMERA = "agent"


class BabyAI(Demonstrations):
    """Frames of the bot's demonstrations of one level; the only camera is the robot's view.

    split: `train` has `episodes` demonstrations, `val` has `val_episodes` others.
    level: a name in minigrid's registry, such as BabyAI-GoToLocal-v0.
    seed: determines all scenes. horizon: actions in a chunk, of which rollouts execute `executed`
    before they ask the policy again. rollouts: number of scenes for `rollout`, in neither split.

    A state is the direction of the robot (cosine and sine) and whether it carries an object.
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
        _check_package()
        check_split(split, episodes=episodes, val_episodes=val_episodes, horizon=horizon)
        _check_executed(executed, horizon)
        self.level, self.seed, self.horizon, self.executed = level, seed, horizon, executed
        self.scenes = rollouts
        training = _demonstrate(level, seed, TRAIN, episodes)
        own = training if split == "train" else _demonstrate(level, seed, VAL, val_episodes)
        self.images, self.states, self.actions = own.images, own.states, own.actions
        self.episode, self.ends = own.episode, own.ends
        self.instructions = own.instructions
        self._frequencies = training.actions.mean(axis=0)
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
        """Minigrid's names of the actions."""
        return ["left", "right", "forward", "pickup", "drop", "toggle", "done"]

    def rollout(self, policy: Act, scenes: Sequence[int]) -> dict[str, Floats]:
        """Return the outcomes, one value a scene, of `policy` acting in all `scenes` in lockstep.

        policy: from observations (images uint8 [B, 1, 3, H, W], state [B, 1, 3], instruction) to
        the probability of each action, [B, T, 7]. `success` is 1 if the instruction was carried
        out within the level's limit of steps; `steps` is the number of steps that it took.

        Actions are drawn at random, determined by seed, scene and step. To take the most probable
        action would not work: the policy has no memory, so if it turns left and then right once,
        it does so forever.
        """
        worlds = [_reset(self.level, self.seed, ROLLOUT, int(scene)) for scene in scenes]
        success = np.zeros(len(worlds), np.float32)
        steps = np.zeros(len(worlds), np.float32)
        running = list(range(len(worlds)))
        while running:
            chunks = policy(_observe([worlds[n] for n in running])).detach().float().cpu().numpy()
            for n, chunk in zip(list(running), chunks[:, : self.executed]):
                for probabilities in chunk:
                    action = self._draw(probabilities, int(scenes[n]), int(steps[n]))
                    _, reward, terminated, truncated, _ = worlds[n].step(action)
                    steps[n] += 1
                    if terminated or truncated:
                        success[n] = float(reward > 0)
                        running.remove(n)
                        break
        return {"success": success, "steps": steps}

    def rollout_baselines(self, scenes: Sequence[int]) -> dict[str, dict[str, Floats]]:
        """Return the outcomes of `rollout` in `scenes` for agents without learning.

        `wander` draws each action as often as the bot takes it, whatever the robot sees; `bot` is
        the demonstrator, which knows the whole map.
        """
        frequencies = torch.from_numpy(self._frequencies)

        def wander(batch: Mapping[str, Any]) -> torch.Tensor:
            return frequencies.expand(len(batch["instruction"]), self.horizon, -1)

        return {"wander": self.rollout(wander, scenes), "bot": self._run_bot(scenes)}

    def _run_bot(self, scenes: Sequence[int]) -> dict[str, Floats]:
        worlds = [_reset(self.level, self.seed, ROLLOUT, int(scene)) for scene in scenes]
        taken = np.array([len(list(_solve(world))) for world in worlds], np.float32)
        limits = np.array([world.max_steps for world in worlds], np.float32)
        success = (taken > 0).astype(np.float32)
        return {"success": success, "steps": np.where(taken > 0, taken, limits)}

    def _draw(self, probabilities: Floats, scene: int, step: int) -> int:
        """Return an action drawn by `probabilities` [7]; the last action if they are all 0."""
        weights = probabilities.clip(0, 1)
        drawn = uniform([self.seed * SCENES + scene], step + 1)[0, step] * weights.sum()
        return min(int(np.searchsorted(np.cumsum(weights), drawn, side="right")), ACTIONS - 1)


class _Recorded:
    """The bot's episodes, concatenated: a row is a frame."""

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
    """Return demonstrations of the first `count` scenes of a stream that the bot can solve."""
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
        f"data.level={level}: the bot solved {len(episodes)} of {scene} scenes, but {count} are "
        "needed; choose a level that it can solve"
    )


def _solve(world: Any) -> Iterator[tuple[Pixels, Floats, int]]:
    """Yield image, state and action of each step; nothing if the bot does not succeed."""
    from minigrid.utils.baby_ai_bot import BabyAIBot

    rows: list[tuple[Pixels, Floats, int]] = []
    action = None
    try:
        bot = BabyAIBot(world)
        while True:
            action = bot.replan(action)
            rows.append((_image(world), _state(world), int(action)))
            _, reward, terminated, truncated, _ = world.step(action)
            if terminated or truncated:
                return iter(rows if reward > 0 else [])
    except Exception:  # assertions of the bot, in scenes that it does not support
        return iter([])


def _reset(level: str, seed: int, stream: int, scene: int) -> Any:
    """Return the world of a level at the start of a scene."""
    import gymnasium
    import minigrid  # noqa: F401  (it registers the levels)

    with contextlib.redirect_stdout(io.StringIO()):  # it prints every layout that it rejects
        try:
            world: Any = gymnasium.make(level).unwrapped
        except gymnasium.error.Error as error:
            raise ConfigError(
                f"data.level={level} is not a level of minigrid ({error}); use for example "
                "BabyAI-GoToLocal-v0, BabyAI-GoToRedBall-v0 or BabyAI-PickupLoc-v0"
            ) from error
        world.reset(seed=(seed * 3 + stream) * SCENES + scene)
    return world


def _observe(worlds: Sequence[Any]) -> dict[str, Any]:
    images = np.stack([_image(world) for world in worlds])[:, None]
    states = np.stack([_state(world) for world in worlds])[:, None]
    return {
        "images": torch.from_numpy(images),
        "state": torch.from_numpy(states),
        "instruction": [world.mission for world in worlds],
    }


def _image(world: Any) -> Pixels:
    """Return the robot's view, uint8 [3, H, W]; the robot is in the middle of the bottom row."""
    frame: Pixels = world.get_frame(highlight=False, tile_size=TILE, agent_pov=True)
    return np.ascontiguousarray(frame.transpose(2, 0, 1))


def _state(world: Any) -> Floats:
    angle = np.pi / 2 * world.agent_dir
    carries = float(world.carrying is not None)
    return np.array([np.cos(angle), np.sin(angle), carries], np.float32).round(6)


def _check_package() -> None:
    if find_spec("minigrid") is None:
        raise ConfigError("data=babyai needs minigrid: pip install -e '.[sim]'")


def _check_executed(executed: int, horizon: int) -> None:
    if not 1 <= executed <= horizon:
        raise ConfigError(f"data.executed={executed} must be 1 to data.horizon={horizon}")
