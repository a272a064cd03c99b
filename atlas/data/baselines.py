"""Predictions that need no network: the mean action, holding still, and a ridge regression."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

RIDGE = 0.01  # the penalty of the ridge regression, as a share of a standardised feature's square
NAMES = ("mean_action", "hold_state", "ridge")

Array = NDArray[Any]
# State [B, K, S], targets [B, T, A] in the data's units and mask [B, T], True where valid.
Block = tuple[Array, Array, Array]
Guess = Callable[[Array], Array]  # of states [B, K, S], broadcasting to [B, T, A]


class Errors:
    """Absolute errors by horizon and joint, added up over batches."""

    def __init__(self) -> None:
        self._sum: Array = np.zeros(())
        self._count: Array = np.zeros(())

    def add(self, guessed: Array, actions: Array, mask: Array) -> None:
        """guessed broadcasts to actions [B, T, A]; mask [B, T], True where they are valid."""
        errors = np.abs(guessed.astype(np.float64) - actions) * mask[..., None]
        self._sum = self._sum + errors.sum(axis=0)
        self._count = self._count + mask.sum(axis=0)

    @property
    def mean(self) -> float:
        """Over all valid elements."""
        return float(self._sum.sum() / (self._count.sum() * self._sum.shape[-1]))

    @property
    def by_joint(self) -> Array:
        """[A], over the horizon and the samples."""
        return self._sum.sum(axis=0) / self._count.sum()

    @property
    def by_horizon(self) -> Array:
        """[T], over the joints and the samples; NaN where no sample reaches so far."""
        return self.table.mean(axis=1)

    @property
    def table(self) -> Array:
        """[T, A], over the samples."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._sum / self._count[:, None]


class Hits:
    """How often the largest entry of a guess is the discrete action that is taken."""

    def __init__(self) -> None:
        self._right: Array = np.zeros(())
        self._count: Array = np.zeros(())

    def add(self, guessed: Array, actions: Array, mask: Array) -> None:
        """As of `Errors`; actions with a 1 among zeros."""
        right = (guessed.argmax(axis=-1) == actions.argmax(axis=-1)) & mask
        self._right = self._right + right.sum(axis=0)
        self._count = self._count + mask.sum(axis=0)

    @property
    def mean(self) -> float:
        """The share of all valid actions."""
        return float(self._right.sum() / self._count.sum())

    @property
    def by_horizon(self) -> Array:
        """[T], the share over the samples; NaN where no sample reaches so far."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._right / self._count


def fit(blocks: Callable[[], Iterable[Block]], names: Iterable[str] = NAMES) -> dict[str, Guess]:
    """The baselines of `names` that make sense, fitted to the training samples in `blocks()`.

    Those that start from the current state need targets of the states' size.
    """
    state, actions, _ = next(iter(blocks()))
    same = state.shape[-1] == actions.shape[-1]
    guesses: dict[str, Guess] = {}
    for name in names:
        if name == "mean_action":
            guesses[name] = partial(_constant, _mean(blocks()))
        elif name == "hold_state" and same:
            guesses[name] = _hold
        elif name == "ridge" and same:
            guesses[name] = partial(_predict_ridge, _fit_ridge(blocks()))
    return guesses


def measure(guesses: dict[str, Guess], blocks: Iterable[Block]) -> dict[str, Errors]:
    """The errors of each of `guesses` on the samples in `blocks`."""
    errors = {name: Errors() for name in guesses}
    for state, actions, mask in blocks:
        for name, guess in guesses.items():
            errors[name].add(guess(state), actions, mask)
    return errors


def _constant(action: Array, state: Array) -> Array:
    return action[None, None]


def _hold(state: Array) -> Array:
    return state[:, -1:]


def _mean(blocks: Iterable[Block]) -> Array:
    """[A], the mean of the valid targets."""
    total, count = np.zeros(()), 0
    for _, actions, mask in blocks:
        total = total + actions[mask].sum(axis=0, dtype=np.float64)
        count += int(mask.sum())
    return total / count


def _features(state: Array) -> Array:
    """Of states [B, K, S]: the K - 1 differences between neighbours and a one, [B, F]."""
    flat = np.diff(state.astype(np.float64), axis=1).reshape(len(state), -1)
    return np.concatenate([flat, np.ones((len(state), 1))], axis=1)


def _fit_ridge(blocks: Iterable[Block]) -> Array:
    """Weights [F, T, A] from `_features` to the targets less the current state."""
    gram = moment = np.zeros(())
    for state, actions, mask in blocks:
        x, y = _features(state), actions - state[:, -1:]
        gram = gram + np.einsum("bf,bt,bg->tfg", x, mask, x, optimize=True)
        moment = moment + np.einsum("bf,bt,bta->tfa", x, mask, y, optimize=True)
    # The penalty goes with each feature's own square, so units and slow joints do not matter.
    diagonal = np.einsum("tff->tf", gram)
    diagonal += RIDGE * diagonal + 1e-12
    return np.linalg.solve(gram, moment).transpose(1, 0, 2)


def _predict_ridge(weights: Array, state: Array) -> Array:
    return state[:, -1:] + np.einsum("bf,fta->bta", _features(state), weights, optimize=True)
