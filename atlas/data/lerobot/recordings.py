"""A folder of robot recordings: its episodes and their rows.

An episode is rows of a table and, for each camera, a section of a video with a frame for each row.
The module `formats` knows where a format stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from atlas.errors import ConfigError


@dataclass(frozen=True)
class Table:
    """The F rows of an episode: state [F, S], action [F, A] or None, both float32, and task [F].

    `first`: the number of its first row in the file, from 0.
    """

    state: np.ndarray
    action: np.ndarray | None
    task: np.ndarray
    first: int = 0

    @property
    def has_commands(self) -> bool:
        """Whether the actions differ from the states of their rows."""
        if self.action is None:
            return False
        # Only rows that are finite, because NaN is not equal to itself.
        good = finite_rows(self.action) & finite_rows(self.state)
        return not np.array_equal(self.action[good], self.state[good])


@dataclass(frozen=True)
class Clip:
    """The section of a camera's video that shows an episode: file and start in seconds."""

    path: Path
    start: float = 0.0


@dataclass(frozen=True)
class Episode:
    """The files of an episode, which may be missing; `length` is its number of rows."""

    index: int
    length: int
    table: Path
    clips: dict[str, Clip]  # by camera
    shared: bool = False  # whether the table holds other episodes too

    def files(self, cameras: list[str]) -> list[Path]:
        """Return the table and the videos of `cameras`."""
        return [self.table, *(self.clips[camera].path for camera in cameras)]


@dataclass(frozen=True)
class Recordings:
    """The content of the meta files of the folder `root`; see `formats.open_recordings`."""

    root: Path
    info: dict[str, Any]
    episodes: dict[int, Episode]
    tasks: dict[int, str]
    episodes_file: str  # the meta file that lists the episodes, for messages
    tasks_file: str  # the meta file that lists the instructions, for messages

    @property
    def cameras(self) -> list[str]:
        """The keys of all video features."""
        return videos(self.info)

    @property
    def vectors(self) -> dict[str, int]:
        """The keys of all features that are vectors of floats, with their sizes."""
        return {
            key: int(value["shape"][0])
            for key, value in self.info["features"].items()
            if value.get("dtype") in ("float32", "float64") and len(value["shape"]) == 1
        }

    def entry_names(self, key: str) -> list[str]:
        """Return the names of a vector's entries from the meta files, or numbers if missing."""
        names = self.info["features"][key].get("names")
        while isinstance(names, dict) and names:
            names = next(iter(names.values()))
        if isinstance(names, list) and len(names) == 1 and isinstance(names[0], list):
            names = names[0]
        size = self.vectors[key]
        if not isinstance(names, list) or len(names) != size:
            return [str(number) for number in range(size)]
        return [str(name) for name in names]

    def read_all(
        self, episodes: list[int], state_key: str, action_key: str | None, *, on_bad: str = "error"
    ) -> list[Table]:
        """Read the rows of `episodes`; raise ConfigError with the problems of all of them."""
        tables, problems = [], []
        for episode in episodes:
            try:
                tables.append(self.read(episode, state_key, action_key, on_bad=on_bad))
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        return tables

    def read(
        self, index: int, state_key: str, action_key: str | None, *, on_bad: str = "error"
    ) -> Table:
        """Read the rows of episode `index`.

        Raises ConfigError with file and row if the file is damaged, contradicts the meta files, or
        (unless `on_bad` is "skip") holds a value that is not finite.
        """
        episode = self.episodes[index]
        path = episode.table
        keys = [key for key in (state_key, action_key) if key is not None]
        first, columns = _rows(episode, [*dict.fromkeys(keys), "task_index"])
        task = np.asarray(columns["task_index"].to_numpy(), np.int64)
        if len(task) != episode.length:
            of = f" of episode {index}" if episode.shared else ""
            raise ConfigError(
                f"{path}: has {len(task)} rows{of}, but {self.episodes_file} says "
                f"length={episode.length}; copy both again"
            )
        vectors = [_vectors(path, first, key, columns[key], self.vectors[key]) for key in keys]
        problems: list[str] = []
        if on_bad != "skip":
            for key, values in zip(keys, vectors, strict=True):
                problems += _not_finite(path, first, key, values)
        unknown = np.flatnonzero(~np.isin(task, list(self.tasks)))
        if unknown.size:
            problems.append(
                f"{path}, row {first + unknown[0]}: task_index={task[unknown[0]]} is not in "
                f"{self.tasks_file}; add it"
            )
        if problems:
            raise ConfigError(problems)
        return Table(vectors[0], vectors[1] if action_key else None, task, first)


def finite_rows(vectors: np.ndarray) -> np.ndarray:
    """Return whether each row of [F, D] has neither NaN nor infinity, bool [F]."""
    return np.asarray(np.isfinite(vectors).all(axis=1))


def videos(info: dict[str, Any]) -> list[str]:
    """Return the keys of all video features."""
    return [key for key, value in info["features"].items() if value.get("dtype") == "video"]


def read_columns(path: Path, keys: list[str]) -> dict[str, Any]:
    """Read the columns `keys` of a parquet file, as pyarrow arrays."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if missing := sorted(set(keys) - set(file.schema_arrow.names)):
                raise ConfigError(f"{path}: has no column {', '.join(missing)}; copy it again")
            table = file.read(columns=keys)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read ({reason}); copy it again") from error
    return {key: table.column(key) for key in keys}


def _rows(episode: Episode, keys: list[str]) -> tuple[int, dict[str, Any]]:
    """Return the number of the episode's first row in its file, and the columns of its rows."""
    if not episode.shared:
        return 0, read_columns(episode.table, keys)
    columns = _shared_columns(episode.table, (*keys, "episode_index"), _changed(episode.table))
    of_episode = np.flatnonzero(columns["episode_index"].to_numpy() == episode.index)
    first = int(of_episode[0]) if of_episode.size else 0
    if of_episode.size and of_episode[-1] - first + 1 != of_episode.size:
        raise ConfigError(
            f"{episode.table}: the rows of episode {episode.index} are not contiguous; "
            "copy it again"
        )
    return first, {key: columns[key].slice(first, of_episode.size) for key in keys}


@lru_cache(maxsize=1)  # the episodes of a file are read one after another
def _shared_columns(path: Path, keys: tuple[str, ...], changed: int) -> dict[str, Any]:
    return read_columns(path, list(keys))


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); copy it again") from error


def _vectors(path: Path, first: int, key: str, column: Any, size: int) -> np.ndarray:
    """Return a column of lists (or of numbers, if `size` is 1) as float32 [rows, size]."""
    is_list = hasattr(column.type, "value_type")  # of pyarrow's kinds of lists only
    lengths = _lengths(column) if is_list else np.ones(len(column), np.int64)
    wrong = np.flatnonzero(lengths != size)
    if wrong.size:
        raise ConfigError(
            f"{path}, row {first + wrong[0]}: {key} has {lengths[wrong[0]]} numbers, but "
            f"meta/info.json says {size} ({wrong.size} such rows); correct one of the two files"
        )
    flat = (column.combine_chunks().flatten() if is_list else column).to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), size).astype(np.float32)


def _lengths(column: Any) -> np.ndarray:
    """Return how many numbers each list of a column has; a list that is null has 0."""
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(column).to_numpy()
    return np.nan_to_num(lengths).astype(np.int64)


def _not_finite(path: Path, first: int, key: str, vectors: np.ndarray) -> list[str]:
    bad = np.flatnonzero(~finite_rows(vectors))
    if not bad.size:
        return []
    return [
        f"{path}, row {first + bad[0]}: {key} is NaN or infinite ({bad.size} such rows); repair the "
        "table, or leave out the samples that include such rows: data.on_bad=skip"
    ]
