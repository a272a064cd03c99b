"""A policy's predictions for the samples of a data set, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from atlas.config.schema import Settings
from atlas.data.arrays import Array
from atlas.data.baselines import Errors, Hits, Vectors
from atlas.data.protocol import HasEpisodes, HasRecordedEpisodes, ReadsBlocks, spec_of
from atlas.errors import AtlasError
from atlas.policy.policy import Policy
from atlas.policy.trajectories import Trajectory
from atlas.protocol import offers
from atlas.training.feeding.randomness import StepSeeds
from atlas.training.feeding.stream import Fetcher

NEEDED = ("state", "actions", "action_mask")


class Predictions:
    """A policy's chunks for the samples of a data set, in batches of the run's size."""

    def __init__(self, settings: Settings, policy: Policy, data: Any) -> None:
        self._policy, self._data = policy, data
        self._size = settings.data.batch_size
        self._fetcher = Fetcher(data, settings.seed, settings.data.on_bad)
        # As in the run's validations, so that the model draws the same random numbers.
        self._seeds = StepSeeds(settings.seed, 0, policy.device)

    def measure(self, *measures: Errors | Hits) -> int:
        """Add all samples to `measures`, in the data's units; return the number of samples.

        With data.on_bad=skip, bad samples are left out, as in the run's validations.
        """
        samples = 0
        for ids, predicted, batch in self._batches(np.arange(len(self._data))):
            actions, mask = batch["actions"].numpy(), batch["action_mask"].numpy()
            for measure in measures:
                measure.add(predicted, actions, mask)
            samples += len(ids)
        return samples

    def first_trajectory(self, names: list[str]) -> Trajectory | None:
        """Return the predictions along the first episode, None if the data has no episodes.

        `names`: of the A entries of an action.
        """
        if not offers(self._data, HasEpisodes):
            return None
        episode = self._data.episode[0]
        ids = np.flatnonzero(self._data.episode == episode)
        parts = [
            (i, p, b["actions"].numpy(), b["action_mask"].numpy()) for i, p, b in self._batches(ids)
        ]
        if not parts:
            return None
        read, *arrays = (np.concatenate(part) for part in zip(*parts))
        predictions, actions, mask = (
            _spread(np.searchsorted(ids, read), array, len(ids)) for array in arrays
        )
        spec = spec_of(self._data) or {}
        period, unit = period_of(spec)
        return Trajectory(
            f"held-out episode {episode_name(self._data, episode)}: true and predicted actions",
            actions,
            predictions,
            mask,
            names,
            np.arange(actions.shape[1]) * spec.get("interval", period),
            period,
            unit,
        )

    def _batches(self, ids: Array) -> Iterator[tuple[Array, Array, dict[str, Any]]]:
        """Yield ids, predicted chunks [B, T, A] and the batch."""
        for number, start in enumerate(range(0, len(ids), self._size)):
            part = ids[start : start + self._size]
            part, batch = self._fetcher.good(part, part, refill=False)
            if batch is None:
                continue
            check_batch(batch)
            self._seeds.validation(number)
            yield part, self._policy.act_batch(batch).numpy(), batch


def read_vectors(settings: Settings, data: Any) -> Iterator[Vectors]:
    """Yield states, actions and masks of all samples, without images if the data set can."""
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
    """Raise `AtlasError` if `batch` does not hold states and actions."""
    absent = [k for k in NEEDED if not isinstance(batch, Mapping) or k not in batch]
    if absent:
        raise AtlasError(
            f"the batches of this data set have no {', '.join(absent)}; atlas evaluate needs state "
            "[B, K, S], actions [B, T, A] and action_mask [B, T], so add them to the data set"
        )


def episode_name(data: Any, place: int) -> str:
    """Return the number of the episode in the recordings if known, else its place in the data."""
    numbers = data.episodes if offers(data, HasRecordedEpisodes) else None
    return str(numbers[place] if isinstance(numbers, list) else place)


def period_of(spec: Mapping[str, Any]) -> tuple[float, str]:
    """Return the time between successive samples, and its unit."""
    fps = spec.get("fps")
    return (1.0 / fps, "seconds") if fps else (1.0, "steps")


def _spread(places: Array, rows: Array, count: int) -> Array:
    """Return `count` rows: `rows` at `places`, and gaps (NaN or False) elsewhere."""
    gap = False if rows.dtype == bool else np.nan
    spread = np.full((count, *rows.shape[1:]), gap, rows.dtype)
    spread[places] = rows
    return spread
