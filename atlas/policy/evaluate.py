"""Evaluation of a run's policy: action errors on held-out episodes, and outcomes of rollouts."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atlas.config.schema import Settings
from atlas.data import baselines
from atlas.data.arrays import Array
from atlas.data.baselines import Errors, Hits
from atlas.data.protocol import (
    HasBaselines,
    HasEpisodes,
    HasRolloutBaselines,
    NamesActions,
    Prepares,
    scenes_of,
    spec_of,
)
from atlas.errors import AtlasError
from atlas.models.protocol import Acts
from atlas.policy import trajectories
from atlas.policy.export import make_folder
from atlas.policy.policy import Policy, load_policy
from atlas.policy.predictions import Predictions, read_vectors
from atlas.protocol import offers
from atlas.run.directory import Run
from atlas.run.trust import read_trusted_config
from atlas.system.files import write_json
from atlas.training.build import build_data


def evaluate(run: Run, device: str = "auto", out: Path | None = None) -> dict[str, Any]:
    """Measure the best weights of `run` on its validation split; return the results.

    Writes evaluation.json (the results) and evaluation.png into `out`, by default the run's
    directory. Raises `AtlasError` if the run has no checkpoint or no validation split.
    """
    folder = make_folder(out or run.path)  # first, because what follows can take minutes
    policy = load_policy(run.path, device)
    if not offers(policy.model, Acts):
        raise AtlasError(
            f"{type(policy.model).__name__} has no method act(batch), which predicts actions; "
            "atlas evaluate needs it"
        )
    settings = Settings.of(read_trusted_config(run))
    train, val = _open_data(run, settings)
    predictions = Predictions(settings, policy, val)
    errors, hits = Errors(), Hits()
    samples = predictions.measure(errors, *([hits] if is_discrete(val) else []))
    joints = action_names(val, errors.table.shape[1])
    results = {
        "run": run.id,
        "name": settings.name,
        "step": policy.step,
        "device": str(policy.device),
        "samples": samples,
        "episodes": len(np.unique(val.episode)) if offers(val, HasEpisodes) else None,
        "error": summarize(errors, joints),
        "baselines": _baselines(settings, train, val, errors, joints),
        "accuracy": _accuracy(settings, train, val, hits) if is_discrete(val) else None,
        "rollout": rollout(policy, val),
        "rollout_baselines": rollout_baselines(val),
        "created": round(time.time(), 3),
    }
    write_json(folder / run.evaluation_file.name, plain(results))
    if (trajectory := predictions.first_trajectory(joints)) is not None:
        trajectories.draw(trajectory, folder / run.evaluation_picture.name)
    return results


def _open_data(run: Run, settings: Settings) -> tuple[Any, Any]:
    """Return the training set and the prepared validation set; raise `AtlasError` without one."""
    train, val = build_data(settings)
    if val is None:
        raise AtlasError(
            f"run {run.id} has data.val=null: there are no held-out episodes to evaluate; evaluate "
            "a run with a validation split"
        )
    if offers(val, Prepares):
        val.prepare()
    return train, val


def rollout(policy: Policy, data: Any) -> dict[str, float] | None:
    """Return the mean of each outcome over the data set's scenes, None if it has no scenes."""
    scenes = scenes_of(data)
    if not scenes:
        return None
    outcomes = data.rollout(policy.act_batch, range(scenes))
    return {"scenes": scenes, **means(outcomes)}


def rollout_baselines(data: Any) -> dict[str, dict[str, float]] | None:
    """Return the mean outcomes of agents without learning, None if the data set has none."""
    scenes = scenes_of(data)
    if not scenes or not offers(data, HasRolloutBaselines):
        return None
    found = data.rollout_baselines(range(scenes))
    return {name: means(outcomes) for name, outcomes in found.items()}


def means(outcomes: Mapping[str, Array]) -> dict[str, float]:
    """Return the mean of each outcome over the scenes."""
    return {name: float(values.mean()) for name, values in outcomes.items()}


def is_discrete(data: Any) -> bool:
    """Return whether the actions are choices among discrete ones (one-hot vectors)."""
    return bool((spec_of(data) or {}).get("discrete"))


def summarize(errors: Errors, joints: list[str]) -> dict[str, Any]:
    """Return mean absolute errors: overall, by joint, by step of the chunk, and by both."""
    return {
        "mean": errors.mean,
        "by_joint": dict(zip(joints, errors.by_joint.tolist())),
        "by_horizon": errors.by_horizon.tolist(),
        "by_horizon_and_joint": errors.table.tolist(),
    }


def _baselines(
    settings: Settings, train: Any, val: Any, errors: Errors, joints: list[str]
) -> dict[str, Any]:
    """Return the errors of each baseline, with `ratio`: the policy's error divided by its error."""
    # To hold the state is a prediction only if actions are states, which the data set knows.
    names = list(val.baselines(train)) if offers(val, HasBaselines) else ["mean_action"]
    fitted = baselines.fit(lambda: read_vectors(settings, train), names)
    measured = baselines.measure(fitted, read_vectors(settings, val))
    return {
        name: {"ratio": errors.mean / error.mean, **summarize(error, joints)}
        for name, error in measured.items()
    }


def _accuracy(settings: Settings, train: Any, val: Any, hits: Hits) -> dict[str, Any]:
    """Return how often the most probable action is the demonstrated one.

    `majority_action` is the accuracy of always choosing the most frequent action of `train`.
    """
    fitted = baselines.fit(lambda: read_vectors(settings, train), ["mean_action"])
    majority = Hits()
    for state, actions, mask in read_vectors(settings, val):
        predicted = np.broadcast_to(fitted["mean_action"](state), actions.shape)
        majority.add(predicted, actions, mask)
    return {
        "mean": hits.mean,
        "by_horizon": hits.by_horizon.tolist(),
        "majority_action": majority.mean,
    }


def action_names(data: Any, count: int) -> list[str]:
    """Return the data set's names of the `count` entries of an action, or numbers."""
    names = data.action_names if offers(data, NamesActions) else None
    return list(names) if names is not None and len(names) == count else [*map(str, range(count))]


def plain(value: Any) -> Any:
    """Return `value` with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(results: Mapping[str, Any]) -> str:
    """Return the results of `evaluate` as lines of text."""
    lines = [_title(results), "", *_error_lines(results)]
    if accuracy := results["accuracy"]:
        lines += ["", *_accuracy_lines(accuracy)]
    if results["rollout"]:
        lines += ["", *_rollout_lines(results)]
    return "\n".join(lines)


def _title(results: Mapping[str, Any]) -> str:
    episodes = f" of {results['episodes']} episodes" if results["episodes"] else ""
    return (
        f"run {results['run']} after {results['step']} updates, "
        f"{results['samples']} held-out samples{episodes}"
    )


def _error_lines(results: Mapping[str, Any]) -> list[str]:
    error, compared = results["error"], results["baselines"]
    rows = [("this policy", error["mean"], 1.0)]
    rows += [(name, base["mean"], base["ratio"]) for name, base in compared.items()]
    lines = [
        f"{'mean absolute error':<24}{'in own units':>14}{'policy / it':>14}",
        *(f"{name:<24}{mean:14.5f}{ratio:14.3f}" for name, mean, ratio in rows),
        "",
        "by step of the chunk   " + " ".join(f"{e:.5f}" for e in error["by_horizon"]),
        "",
        f"{'by joint':<28}{'policy':>10}" + "".join(f"{name:>13}" for name in compared),
    ]
    for joint, value in error["by_joint"].items():
        others = [base["by_joint"][joint] for base in compared.values()]
        lines.append(f"{joint:<28}{value:10.5f}" + "".join(f"{e:13.5f}" for e in others))
    return lines


def _accuracy_lines(accuracy: Mapping[str, Any]) -> list[str]:
    return [
        f"{'accuracy':<24}{accuracy['mean']:14.3f}",
        f"{'majority_action':<24}{accuracy['majority_action']:14.3f}",
        "by step of the chunk   " + " ".join(f"{e:.3f}" for e in accuracy["by_horizon"]),
    ]


def _rollout_lines(results: Mapping[str, Any]) -> list[str]:
    outcomes = {k: v for k, v in results["rollout"].items() if k != "scenes"}
    lines = [f"rollouts in {results['rollout']['scenes']} scenes: {_outcomes(outcomes)}"]
    compared = results["rollout_baselines"] or {}
    return lines + [f"{name:<24}{_outcomes(values)}" for name, values in compared.items()]


def _outcomes(outcomes: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in outcomes.items())
