"""The rows of episodes, put after each other, and the samples that they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from atlas.data.baselines import Block
from atlas.data.lerobot.recordings import Table, finite

BLOCK = 4096  # samples at a time where all are gone through, so that memory stays small


class Rows:
    """The tables of a split, and a sample for every row that has a target left in its episode.

    `history`: number K of states in a sample, a row apart; `ahead` [T]: how many rows after a
    sample's own its targets are, rising.

    Rows that are not finite stay, as do the samples that see them; what statistics are made of
    (`blocks`, `finite_states`, `velocities`) is without them.
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
        self.samples = rows[rows + ahead[0] < self.end]  # the row of each
        self._in_file = np.array([table.first for table in tables])
        self._past, self._ahead = np.arange(1 - history, 1), ahead
        self._finite = finite(self.states), finite(self.targets)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.samples)

    def vectors(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """State [B, K, S], absolute targets [B, T, A] and mask [B, T] of samples at `rows`."""
        past, future, valid = self._seen(rows)
        return self.states[past], self.targets[future], valid

    def blocks(self) -> Iterator[Block]:
        """What `vectors` gives of all samples that are finite, some thousands at a time."""
        for start in range(0, len(self), BLOCK):
            rows = self.samples[start : start + BLOCK]
            if (good := rows[self.good(rows)]).size:
                yield self.vectors(good)

    def good(self, rows: np.ndarray) -> np.ndarray:
        """Bool [B], whether the samples at `rows` are finite."""
        past, future, _ = self._seen(rows)
        states, targets = self._finite
        return np.asarray(states[past].all(axis=1) & targets[future].all(axis=1))

    def bad_rows(self, row: int) -> list[int]:
        """The rows, by their number in the file, that make the sample at `row` not finite."""
        past, future, _ = self._seen(np.array([row]))
        states, targets = self._finite
        bad = np.union1d(past[~states[past]], future[~targets[future]])
        return [self.in_file(int(b)) for b in bad]

    def in_file(self, row: int) -> int:
        """The number that `row` has in the file that it is of, from 0."""
        return int(self._in_file[self.episode[row]] + row - self.begin[row])

    @property
    def finite_states(self) -> np.ndarray:
        """[*, S], of the rows whose state is finite."""
        return self.states[self._finite[0]]

    @property
    def velocities(self) -> np.ndarray:
        """Each finite state less that of the row before it, of rows that have one: [*, S]."""
        good = self._finite[0]
        pairs = (self.begin[1:] == self.begin[:-1]) & good[1:] & good[:-1]
        return np.diff(self.states, axis=0)[pairs]

    def _seen(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows of a sample's states [B, K] and targets [B, T], and which of these are valid."""
        past = np.maximum(rows[:, None] + self._past, self.begin[rows, None])
        future, end = rows[:, None] + self._ahead, self.end[rows, None]
        # Past the end the last target again: any finite value would do, the mask leaves it out.
        return past, np.minimum(future, end - 1), future < end
