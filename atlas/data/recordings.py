"""A folder of robot recordings in LeRobot's format v2.1: what its meta files and tables say.

`meta/info.json` names the features and where things are, `meta/episodes.jsonl` has a line an
episode, `meta/tasks.jsonl` a line an instruction; each episode has a parquet file with a row a
frame and, for each camera, a video with a frame for each row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atlas.errors import ConfigError

VERSIONS = ("v2.0", "v2.1")  # the same files but for statistics, which are computed here anyway


@dataclass(frozen=True)
class Table:
    """An episode's rows: state [F, S], action [F, A] or None, both float32, and task [F]."""

    state: np.ndarray
    action: np.ndarray | None
    task: np.ndarray

    @property
    def has_commands(self) -> bool:
        """Whether the actions are something else than the states of their rows."""
        return self.action is not None and not np.array_equal(self.action, self.state)


@dataclass(frozen=True)
class Recordings:
    """The meta files of the folder `root`; see `open_recordings`."""

    root: Path
    info: dict[str, Any]
    lengths: dict[int, int]  # rows of each episode, by its index
    tasks: dict[int, str]

    @property
    def cameras(self) -> list[str]:
        """The keys of the features that are videos."""
        features = self.info["features"].items()
        return [key for key, value in features if value.get("dtype") == "video"]

    @property
    def vectors(self) -> dict[str, int]:
        """The keys of the features that are vectors of floats, with their sizes."""
        return {
            key: int(value["shape"][0])
            for key, value in self.info["features"].items()
            if value.get("dtype") in ("float32", "float64") and len(value["shape"]) == 1
        }

    def table(self, episode: int) -> Path:
        """The episode's parquet file, whether it is there or not."""
        return self.root / self.info["data_path"].format(**self._place(episode))

    def video(self, episode: int, camera: str) -> Path:
        """The episode's video of one camera, whether it is there or not."""
        place = self._place(episode)
        return self.root / self.info["video_path"].format(video_key=camera, **place)

    def files(self, episode: int, cameras: list[str]) -> list[Path]:
        """All that is read of an episode."""
        return [self.table(episode), *(self.video(episode, camera) for camera in cameras)]

    def _place(self, episode: int) -> dict[str, int]:
        chunk = episode // int(self.info["chunks_size"])
        return {"episode_chunk": chunk, "episode_index": episode}

    def read(self, episode: int, state_key: str, action_key: str | None) -> Table:
        """The episode's rows.

        Raises ConfigError naming the file where it is damaged, has another number of rows than
        the meta files say, or holds a value that is not finite (with its row).
        """
        path = self.table(episode)
        keys = [key for key in (state_key, action_key) if key is not None]
        columns = _read_columns(path, [*keys, "task_index"])
        task = np.asarray(columns["task_index"].to_numpy(), np.int64)
        if len(task) != self.lengths[episode]:
            raise ConfigError(
                f"{path}: has {len(task)} rows, meta/episodes.jsonl says "
                f"length={self.lengths[episode]}; copy both anew"
            )
        vectors = [_vectors(path, key, columns[key], self.vectors[key]) for key in keys]
        problems: list[str] = []
        for key, values in zip(keys, vectors, strict=True):
            problems += _bad_row(path, key, values)
        if unknown := sorted(set(task.tolist()) - set(self.tasks)):
            problems.append(f"{path}: task_index={unknown[0]} is not in meta/tasks.jsonl; add it")
        if problems:
            raise ConfigError(problems)
        return Table(vectors[0], vectors[1] if action_key else None, task)


def open_recordings(root: Path) -> Recordings:
    """Read the meta files under `root`; raises ConfigError with all that is wrong with them."""
    if not root.is_dir():
        raise ConfigError(f"data.root={root}: no such folder; give the one that holds meta/")
    info = _read_info(root)
    problems: list[str] = []
    episodes = _read_lines(root / "meta/episodes.jsonl", ("episode_index", "length"), problems)
    tasks = _read_lines(root / "meta/tasks.jsonl", ("task_index", "task"), problems)
    if problems:
        raise ConfigError(problems)
    lengths = {int(index): int(length) for index, length in sorted(episodes)}
    return Recordings(root, info, lengths, {int(index): str(task) for index, task in tasks})


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta/info.json"
    try:
        info: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"data.root={root}: has no meta/info.json, so it is no LeRobot folder; "
            "give the one that holds meta/, data/ and videos/"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error}); copy it anew") from error
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise ConfigError(
            f"{path}: codebase_version={version} is not supported, only {' and '.join(VERSIONS)} "
            "(a file an episode) are; take the data set's v2.1 revision or convert it"
        )
    needed = ("features", "fps", "chunks_size", "data_path", "video_path")
    if absent := [key for key in needed if not info.get(key)]:
        raise ConfigError(f"{path}: lacks {', '.join(absent)}; copy it anew")
    return info


def _read_lines(path: Path, keys: tuple[str, str], problems: list[str]) -> list[tuple[Any, Any]]:
    """The two values of each line of a .jsonl file; what is wrong goes to `problems`."""
    rows = []
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); copy it anew")
        return []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                row = json.loads(line)
                rows.append((row[keys[0]], row[keys[1]]))
        except (ValueError, KeyError, TypeError):
            problems.append(f"{path}, line {number}: is not JSON with {keys[0]} and {keys[1]}")
    return rows


def _read_columns(path: Path, keys: list[str]) -> dict[str, Any]:
    """The columns `keys` of a parquet file, as pyarrow arrays."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if absent := sorted(set(keys) - set(file.schema_arrow.names)):
                raise ConfigError(f"{path}: has no column {', '.join(absent)}; copy it anew")
            table = file.read(columns=keys)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read ({reason}); copy it anew") from error
    return {key: table.column(key) for key in keys}


def _vectors(path: Path, key: str, column: Any, size: int) -> np.ndarray:
    """A column of lists (or, where `size` is 1, of numbers) as float32 [rows, size]."""
    is_list = hasattr(column.type, "value_type")
    flat = (column.combine_chunks().flatten() if is_list else column).to_numpy(zero_copy_only=False)
    if flat.size != len(column) * size:
        raise ConfigError(
            f"{path}: {key} has {flat.size} numbers in {len(column)} rows, meta/info.json "
            f"says {size} a row; correct one of them"
        )
    return flat.reshape(len(column), size).astype(np.float32)


def _bad_row(path: Path, key: str, vectors: np.ndarray) -> list[str]:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if not bad.size:
        return []
    return [
        f"{path}, row {bad[0]}: {key} is NaN or infinite ({bad.size} such rows); "
        "mend the table or take the episode out of the folder"
    ]
