"""The concatenated rows of episodes, and the samples that they contain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from atlas.data.baselines import Vectors
from atlas.data.lerobot.recordings import Table, finite_rows

SAMPLES = 4096  # samples in a batch of `batches`, so that memory stays small


class Rows:
    """The tables of a split, with a sample for every row that has an action in its episode.

    `history`: number K of states in a sample, one row apart; `ahead` [T]: the offsets in rows from
    a sample to its actions, ascending.

    Rows that are not finite are kept, as are the samples that include them; everything that
    statistics are computed from (`batches`, `finite_states`, `velocities`) leaves them out.
    """

    def __init__(self, tables: Sequence[Table], history: int, ahead: np.ndarray) -> None:
        self.lengths = np.array([len(table.state) for table in tables])
        ends = np.cumsum(self.lengths)
        self.states = np.concatenate([table.state for table in tables])
        targets = [table.state if table.action is None else table.action for table in tables]
        self.targets = np.concatenate(targets)
        self.task = np.concatenate([table.task for table in tables])
        self.episode = np.repeat(np.arange(len(tables)), self.lengths)
        self.begin = np.repeat(ends - self.lengths, self.lengths)
        self.end = np.repeat(ends, self.lengths)
        rows = np.arange(ends[-1])
        self.samples = rows[rows + ahead[0] < self.end]  # the row of each sample
        self._first_in_file = np.array([table.first for table in tables])
        self._past, self._ahead = np.arange(1 - history, 1), ahead
        self._finite = finite_rows(self.states), finite_rows(self.targets)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    def vectors(self, rows: np.ndarray) -> Vectors:
        """Return states [B, K, S], absolute actions [B, T, A] and masks [B, T] of samples."""
        past, future, valid = self._window(rows)
        return self.states[past], self.targets[future], valid

    def batches(self) -> Iterator[Vectors]:
        """Yield `vectors` of all finite samples, in batches."""
        for start in range(0, len(self), SAMPLES):
            rows = self.samples[start : start + SAMPLES]
            if (finite := rows[self.are_finite(rows)]).size:
                yield self.vectors(finite)

    def are_finite(self, rows: np.ndarray) -> np.ndarray:
        """Return whether the sample at each row is finite, bool [B]."""
        past, future, _ = self._window(rows)
        states, targets = self._finite
        return np.asarray(states[past].all(axis=1) & targets[future].all(axis=1))

    def bad_rows(self, row: int) -> list[int]:
        """Return the rows of the sample at `row` that are not finite, by their number in the file."""
        past, future, _ = self._window(np.array([row]))
        states, targets = self._finite
        bad = np.union1d(past[~states[past]], future[~targets[future]])
        return [self.in_file(int(b)) for b in bad]

    def in_file(self, row: int) -> int:
        """Return the number of `row` in its file, from 0."""
        return int(self._first_in_file[self.episode[row]] + row - self.begin[row])

    @property
    def finite_states(self) -> np.ndarray:
        """[*, S], all finite states."""
        return self.states[self._finite[0]]

    @property
    def velocities(self) -> np.ndarray:
        """[*, S], each finite state minus the finite state of the row before it."""
        finite = self._finite[0]
        pairs = (self.begin[1:] == self.begin[:-1]) & finite[1:] & finite[:-1]
        return np.diff(self.states, axis=0)[pairs]

    def _window(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the rows of the samples' states [B, K] and actions [B, T], and their mask [B, T]."""
        past = np.maximum(rows[:, None] + self._past, self.begin[rows, None])
        future, end = rows[:, None] + self._ahead, self.end[rows, None]
        # Past the episode's end, the last action is repeated. The mask excludes it, so its value
        # does not matter as long as it is finite.
        return past, np.minimum(future, end - 1), future < end
