"""How good a run's policy is: action errors on held-out episodes, and rollouts where there are any."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas.config.schema import Settings
from atlas.data import baselines
from atlas.data.baselines import Errors, Hits, Vectors
from atlas.data.protocol import (
    HasBaselines,
    HasEpisodes,
    HasRecordedEpisodes,
    HasRolloutBaselines,
    NamesActions,
    Prepares,
    ReadsBlocks,
    scenes_of,
    spec_of,
)
from atlas.errors import AtlasError
from atlas.models.protocol import Acts
from atlas.policy import trajectories
from atlas.policy.export import made
from atlas.policy.policy import Policy, load_policy
from atlas.protocol import offers
from atlas.run.directory import Run
from atlas.run.trust import read_trusted_config
from atlas.system.files import write_json
from atlas.training.build import build_data
from atlas.training.feeding.randomness import StepSeeds
from atlas.training.feeding.stream import Fetcher

NEEDED = ("state", "actions", "action_mask")

Array = NDArray[Any]


def evaluate(run: Run, device: str = "auto", out: Path | None = None) -> dict[str, Any]:
    """Measure the best weights of `run` on the validation split of its own data.

    Writes evaluation.json and evaluation.png into `out`, by default the run's directory, and
    returns what the former holds. Raises `AtlasError` where the run has no checkpoint or its data
    no validation split.
    """
    folder = made(out or run.path)  # known to be there before what takes minutes
    policy = load_policy(run.path, device)
    settings = Settings.of(read_trusted_config(run))
    train, val = build_data(settings)
    if val is None:
        raise AtlasError(f"run {run.id} has data.val=null: there are no held-out episodes")
    if not offers(policy.model, Acts):
        raise AtlasError(f"{type(policy.model).__name__} has no method act, which predicts actions")
    if offers(val, Prepares):
        val.prepare()
    predictions = Predictions(settings, policy, val)
    errors, hits = Errors(), Hits()
    samples = predictions.measure(errors, *([hits] if discrete(val) else []))
    joints = action_names(val, errors.table.shape[1])
    found = {
        "run": run.id,
        "name": settings.name,
        "step": policy.step,
        "device": str(policy.device),
        "samples": samples,
        "episodes": len(np.unique(val.episode)) if offers(val, HasEpisodes) else None,
        "error": summary(errors, joints),
        "baselines": _baselines(settings, train, val, errors, joints),
        "accuracy": _accuracy(settings, train, val, hits) if discrete(val) else None,
        "rollout": rollout(policy, val),
        "rollout_baselines": rollout_baselines(val),
        "created": round(time.time(), 3),
    }
    write_json(folder / run.evaluation_file.name, plain(found))
    if (episode := predictions.episode(joints)) is not None:
        trajectories.draw(episode, folder / run.evaluation_picture.name)
    return found


class Predictions:
    """The policy's chunks for all samples of a data set, in batches of the run's size."""

    def __init__(self, settings: Settings, policy: Policy, data: Any) -> None:
        self._policy, self._data = policy, data
        self._size = settings.data.batch_size
        self._fetcher = Fetcher(data, settings.seed, settings.data.on_bad)
        # As in the run's validations, so that what is drawn at random is drawn alike.
        self._seeds = StepSeeds(settings.seed, 0, policy.device)

    def measure(self, *measures: Errors | Hits) -> int:
        """Add all samples to `measures`, in the data's own units; the number of samples.

        With data.on_bad=skip without the bad ones, as in the run's validations.
        """
        samples = 0
        for ids, predicted, batch in self._batches(np.arange(len(self._data))):
            actions, mask = batch["actions"].numpy(), batch["action_mask"].numpy()
            for each in measures:
                each.add(predicted, actions, mask)
            samples += len(ids)
        return samples

    def episode(self, names: list[str]) -> trajectories.Episode | None:
        """The first episode, to be drawn; None where the data does not tell its episodes."""
        if not offers(self._data, HasEpisodes):
            return None
        first = self._data.episode[0]
        ids = np.flatnonzero(self._data.episode == first)
        parts = [
            (i, p, b["actions"].numpy(), b["action_mask"].numpy()) for i, p, b in self._batches(ids)
        ]
        if not parts:
            return None
        read, *found = (np.concatenate(part) for part in zip(*parts))
        predictions, actions, mask = (
            _at(np.searchsorted(ids, read), part, len(ids)) for part in found
        )
        period, unit = times(self._data.spec)
        interval = self._data.spec.get("interval", period)
        return trajectories.Episode(
            f"held-out episode {first_name(self._data, first)}: true and predicted actions",
            actions,
            predictions,
            mask,
            names,
            np.arange(actions.shape[1]) * interval,
            period,
            unit,
        )

    def _batches(self, ids: Array) -> Iterator[tuple[Array, Array, dict[str, Any]]]:
        """Ids, predicted chunks [B, T, A] and the batch."""
        for chunk, start in enumerate(range(0, len(ids), self._size)):
            part = ids[start : start + self._size]
            part, batch = self._fetcher.good(part, part, refill=False)
            if batch is None:
                continue
            check_batch(batch)
            self._seeds.validation(chunk)
            yield part, self._policy.act_batch(batch).numpy(), batch


def _at(places: Array, rows: Array, count: int) -> Array:
    """`count` rows, those of `rows` at their `places`, the others a gap in a drawing."""
    gap = False if rows.dtype == bool else np.nan
    spread = np.full((count, *rows.shape[1:]), gap, rows.dtype)
    spread[places] = rows
    return spread


def rollout(policy: Policy, data: Any) -> dict[str, float] | None:
    """The mean of each outcome over the data set's scenes; None where there are none."""
    scenes = scenes_of(data)
    if not scenes:
        return None
    outcomes = data.rollout(policy.act_batch, range(scenes))
    return {"scenes": scenes, **means(outcomes)}


def rollout_baselines(data: Any) -> dict[str, dict[str, float]] | None:
    """The means of the same outcomes for what learns nothing, where the data set can tell them."""
    scenes = scenes_of(data)
    if not scenes or not offers(data, HasRolloutBaselines):
        return None
    found = data.rollout_baselines(range(scenes))
    return {name: means(outcomes) for name, outcomes in found.items()}


def means(outcomes: Mapping[str, Array]) -> dict[str, float]:
    """Over the scenes."""
    return {name: float(values.mean()) for name, values in outcomes.items()}


def discrete(data: Any) -> bool:
    """Whether one of some actions is taken at a time, a 1 among zeros."""
    return bool((spec_of(data) or {}).get("discrete"))


def summary(errors: Errors, joints: list[str]) -> dict[str, Any]:
    """Mean absolute errors over all, by joint, by place in the chunk, and by both."""
    return {
        "mean": errors.mean,
        "by_joint": dict(zip(joints, errors.by_joint.tolist())),
        "by_horizon": errors.by_horizon.tolist(),
        "by_horizon_and_joint": errors.table.tolist(),
    }


def _baselines(
    settings: Settings, train: Any, val: Any, errors: Errors, joints: list[str]
) -> dict[str, Any]:
    """What needs no network, with `ratio`: the policy's error over its."""
    # Holding the state is a prediction only where actions are states: the data set knows.
    names = list(val.baselines(train)) if offers(val, HasBaselines) else ["mean_action"]
    guesses = baselines.fit(lambda: blocks(settings, train), names)
    measured = baselines.measure(guesses, blocks(settings, val))
    return {
        name: {"ratio": errors.mean / error.mean, **summary(error, joints)}
        for name, error in measured.items()
    }


def _accuracy(settings: Settings, train: Any, val: Any, hits: Hits) -> dict[str, Any]:
    """How often the most likely action is the demonstrated one; `majority_action`: the commonest."""
    guess = baselines.fit(lambda: blocks(settings, train), ["mean_action"])["mean_action"]
    majority = Hits()
    for state, actions, mask in blocks(settings, val):
        majority.add(np.broadcast_to(guess(state), actions.shape), actions, mask)
    return {
        "mean": hits.mean,
        "by_horizon": hits.by_horizon.tolist(),
        "majority_action": majority.mean,
    }


def blocks(settings: Settings, data: Any) -> Iterator[Vectors]:
    """State, actions and mask of all samples, without images where the data set can do so."""
    if offers(data, ReadsBlocks):
        yield from data.blocks()
        return
    size = settings.data.batch_size
    fetcher = Fetcher(data, settings.seed, settings.data.on_bad)
    for start in range(0, len(data), size):
        ids = np.arange(start, min(start + size, len(data)))
        _, batch = fetcher.good(ids, ids, refill=False)
        if batch is None:
            continue
        check_batch(batch)
        state, actions, mask = (batch[key].numpy() for key in NEEDED)
        yield state, actions, mask


def check_batch(batch: Any) -> None:
    """Raise `AtlasError` for batches of something else than actions."""
    lacking = [k for k in NEEDED if not isinstance(batch, Mapping) or k not in batch]
    if lacking:
        raise AtlasError(
            f"the batches of this data set have no {', '.join(lacking)}; atlas evaluate is about "
            "chunks of actions: state [B, K, S], actions [B, T, A], action_mask [B, T]"
        )


def action_names(data: Any, count: int) -> list[str]:
    """What the data set calls its actions, else numbers."""
    names = data.action_names if offers(data, NamesActions) else None
    return list(names) if names is not None and len(names) == count else [*map(str, range(count))]


def first_name(data: Any, place: int) -> str:
    """The recording's own number of the episode in this place, where it has one."""
    numbers = data.episodes if offers(data, HasRecordedEpisodes) else None
    return str(numbers[place] if isinstance(numbers, list) else place)


def times(spec: Mapping[str, Any]) -> tuple[float, str]:
    """How far samples are apart, and in which unit."""
    fps = spec.get("fps")
    return (1.0 / fps, "seconds") if fps else (1.0, "steps")


def plain(value: Any) -> Any:
    """`value` with null for what is not a number, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(found: Mapping[str, Any]) -> str:
    """What a person wants to know of it, in lines."""
    error, rows = found["error"], [("this policy", found["error"]["mean"], 1.0)]
    rows += [(name, base["mean"], base["ratio"]) for name, base in found["baselines"].items()]
    lines = [
        f"run {found['run']} after {found['step']} updates, {found['samples']} held-out samples"
        + (f" of {found['episodes']} episodes" if found["episodes"] else ""),
        "",
        f"{'mean absolute error':<24}{'in own units':>14}{'policy / it':>14}",
        *(f"{name:<24}{mean:14.5f}{ratio:14.3f}" for name, mean, ratio in rows),
        "",
        "by place in the chunk  " + " ".join(f"{e:.5f}" for e in error["by_horizon"]),
        "",
        f"{'by joint':<28}{'policy':>10}" + "".join(f"{name:>13}" for name in found["baselines"]),
    ]
    for joint, value in error["by_joint"].items():
        others = [base["by_joint"][joint] for base in found["baselines"].values()]
        lines.append(f"{joint:<28}{value:10.5f}" + "".join(f"{e:13.5f}" for e in others))
    if accuracy := found["accuracy"]:
        lines += [
            "",
            f"{'accuracy':<24}{accuracy['mean']:14.3f}",
            f"{'majority_action':<24}{accuracy['majority_action']:14.3f}",
            "by place in the chunk  " + " ".join(f"{e:.3f}" for e in accuracy["by_horizon"]),
        ]
    if found["rollout"]:
        outcomes = {k: v for k, v in found["rollout"].items() if k != "scenes"}
        lines += ["", f"rollouts in {found['rollout']['scenes']} scenes: {_told(outcomes)}"]
        beside = found["rollout_baselines"] or {}
        lines += [f"{name:<24}{_told(means)}" for name, means in beside.items()]
    return "\n".join(lines)


def _told(outcomes: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in outcomes.items())
