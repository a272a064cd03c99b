"""Predictions without learning from images: mean action, unchanged state, ridge regression."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from atlas.data.arrays import Array

RIDGE = 0.01  # penalty of the ridge regression, as a fraction of each feature's sum of squares
NAMES = ("mean_action", "hold_state", "ridge")

# Of B samples: states [B, K, S], actions [B, T, A] in the data's units, mask [B, T], True if valid.
Vectors = tuple[Array, Array, Array]
Predict = Callable[[Array], Array]  # from states [B, K, S] to actions, broadcastable to [B, T, A]


class Errors:
    """Absolute errors of actions by step of the chunk and by joint, summed over batches."""

    def __init__(self) -> None:
        self._sum: Array = np.zeros(())
        self._count: Array = np.zeros(())

    def add(self, predicted: Array, actions: Array, mask: Array) -> None:
        """Add the errors of a batch.

        `predicted` broadcasts to `actions` [B, T, A]; `mask` [B, T] is True for valid actions.
        """
        errors = np.abs(predicted.astype(np.float64) - actions) * mask[..., None]
        self._sum = self._sum + errors.sum(axis=0)
        self._count = self._count + mask.sum(axis=0)

    @property
    def mean(self) -> float:
        """The mean over all valid elements."""
        return float(self._sum.sum() / (self._count.sum() * self._sum.shape[-1]))

    @property
    def by_joint(self) -> Array:
        """[A], the means over steps and samples."""
        return self._sum.sum(axis=0) / self._count.sum()

    @property
    def by_horizon(self) -> Array:
        """[T], the means over joints and samples; NaN for a step without a valid sample."""
        return self.table.mean(axis=1)

    @property
    def table(self) -> Array:
        """[T, A], the means over samples."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._sum / self._count[:, None]


class Hits:
    """How often the most probable discrete action is the demonstrated one."""

    def __init__(self) -> None:
        self._correct: Array = np.zeros(())
        self._count: Array = np.zeros(())

    def add(self, predicted: Array, actions: Array, mask: Array) -> None:
        """Add a batch: probabilities and one-hot actions [B, T, A], mask [B, T]."""
        correct = (predicted.argmax(axis=-1) == actions.argmax(axis=-1)) & mask
        self._correct = self._correct + correct.sum(axis=0)
        self._count = self._count + mask.sum(axis=0)

    @property
    def mean(self) -> float:
        """The fraction of all valid actions."""
        return float(self._correct.sum() / self._count.sum())

    @property
    def by_horizon(self) -> Array:
        """[T], the fractions over samples; NaN for a step without a valid sample."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._correct / self._count


def fit(read: Callable[[], Iterable[Vectors]], names: Iterable[str] = NAMES) -> dict[str, Predict]:
    """Return the baselines `names`, fitted to the training samples that `read()` yields.

    `hold_state` and `ridge` start from the current state, so they are left out if actions and
    states have different sizes.
    """
    state, actions, _ = next(iter(read()))
    same_size = state.shape[-1] == actions.shape[-1]
    fitted: dict[str, Predict] = {}
    for name in names:
        if name == "mean_action":
            fitted[name] = partial(_constant, _mean(read()))
        elif name == "hold_state" and same_size:
            fitted[name] = _hold
        elif name == "ridge" and same_size:
            fitted[name] = partial(_predict_ridge, _fit_ridge(read()))
    return fitted


def measure(fitted: dict[str, Predict], batches: Iterable[Vectors]) -> dict[str, Errors]:
    """Return the errors of each fitted baseline on the samples in `batches`."""
    errors = {name: Errors() for name in fitted}
    for state, actions, mask in batches:
        for name, predict in fitted.items():
            errors[name].add(predict(state), actions, mask)
    return errors


def _constant(action: Array, state: Array) -> Array:
    return action[None, None]


def _hold(state: Array) -> Array:
    return state[:, -1:]


def _mean(batches: Iterable[Vectors]) -> Array:
    """Return the mean of the valid actions, [A]."""
    total, count = np.zeros(()), 0
    for _, actions, mask in batches:
        total = total + actions[mask].sum(axis=0, dtype=np.float64)
        count += int(mask.sum())
    return total / count


def _features(state: Array) -> Array:
    """Return the K - 1 differences of successive states [B, K, S] and a constant one, [B, F]."""
    flat = np.diff(state.astype(np.float64), axis=1).reshape(len(state), -1)
    return np.concatenate([flat, np.ones((len(state), 1))], axis=1)


def _fit_ridge(batches: Iterable[Vectors]) -> Array:
    """Return the weights [F, T, A] from `_features` to the actions minus the current state."""
    gram = moment = np.zeros(())
    for state, actions, mask in batches:
        x, y = _features(state), actions - state[:, -1:]
        gram = gram + np.einsum("bf,bt,bg->tfg", x, mask, x, optimize=True)
        moment = moment + np.einsum("bf,bt,bta->tfa", x, mask, y, optimize=True)
    # The penalty is relative to each feature's own sum of squares, so that neither the units nor
    # slow joints change the result.
    diagonal = np.einsum("tff->tf", gram)
    diagonal += RIDGE * diagonal + 1e-12
    return np.linalg.solve(gram, moment).transpose(1, 0, 2)


def _predict_ridge(weights: Array, state: Array) -> Array:
    return state[:, -1:] + np.einsum("bf,fta->bta", _features(state), weights, optimize=True)
