"""Predictions over a data set: batches, bad samples, the first episode, and what is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from atlas.data.baselines import Errors
from atlas.errors import AtlasError
from atlas.policy.predictions import Predictions, check_batch, period_of, read_vectors

CPU = torch.device("cpu")


class Recorded:
    """Ten samples of two episodes, the second first; sample i has the actions i and i + 1."""

    episode = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    episodes = [3, 8]  # noqa: RUF012
    spec = {"fps": 10, "interval": 0.2}  # noqa: RUF012

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        first = np.nan if index == self.bad else float(index)
        return {
            "state": torch.zeros(1, 1),
            "actions": torch.tensor([[first], [index + 1.0]]),
            "action_mask": torch.tensor([True, index != 9]),
        }


def settings(on_bad: str | None = None) -> Any:
    return SimpleNamespace(seed=0, data=SimpleNamespace(batch_size=4, on_bad=on_bad))


def predictions(data: Any, on_bad: str | None = None) -> Predictions:
    """Of a policy that predicts one too much."""
    policy = SimpleNamespace(device=CPU, act_batch=lambda batch: batch["actions"] + 1.0)
    return Predictions(settings(on_bad), policy, data)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bad", "count"), [(None, 10), (5, 9)])
def test_all_good_samples_are_measured(bad: int | None, count: int) -> None:
    errors = Errors()
    assert predictions(Recorded(bad), "skip").measure(errors) == count
    assert (errors.mean, errors.table.tolist()) == (1.0, [[1.0], [1.0]])


def test_the_first_episode() -> None:
    found = predictions(Recorded()).first_trajectory(["gripper"])
    assert found is not None
    assert "episode 8" in found.title
    assert found.actions[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert (found.predictions - found.actions == 1).all() and found.mask.all()
    assert (found.offsets.tolist(), found.period, found.unit) == ([0.0, 0.2], 0.1, "seconds")


def test_a_bad_sample_is_a_gap() -> None:
    found = predictions(Recorded(bad=2), "skip").first_trajectory(["gripper"])
    assert found is not None
    assert np.isnan(found.actions[:, 0, 0]).tolist() == [False, False, True, False]
    assert found.mask[:, 0].tolist() == [True, True, False, True]


def test_data_without_episodes_has_no_trajectory() -> None:
    data = [Recorded()[index] for index in range(4)]
    assert predictions(data).first_trajectory(["gripper"]) is None
    assert (period_of({}), period_of({"fps": 4})) == ((1.0, "steps"), (0.25, "seconds"))


def test_vectors_are_read_by_batches_or_by_the_data_set() -> None:
    read = list(read_vectors(settings("skip"), Recorded(bad=5)))
    assert [len(state) for state, _, _ in read] == [4, 3, 2]
    assert np.concatenate([a[:, 1, 0] for _, a, _ in read]).tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    own = SimpleNamespace(blocks=lambda: iter(read[:1]))
    assert len(list(read_vectors(settings(), own))) == 1


@pytest.mark.parametrize("batch", [{"state": 0, "actions": 0}, {}, [1, 2]])
def test_what_is_needed_is_named(batch: Any) -> None:
    with pytest.raises(AtlasError, match="action_mask"):
        check_batch(batch)
