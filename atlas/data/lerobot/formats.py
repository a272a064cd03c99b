"""LeRobot's formats v2.1 and v3.0: from a folder's meta files to its episodes.

v2.1 has one parquet file for each episode, and one video for each episode and camera;
`meta/episodes.jsonl` has one line for each episode, `meta/tasks.jsonl` one for each instruction.
v3.0 stores many episodes in a parquet file and in a video; `meta/episodes/**/*.parquet` holds the
file of each episode and the second at which it starts in the video, `meta/tasks.parquet` the
instructions. In both formats `meta/info.json` holds the features and the templates of the paths.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atlas.data.lerobot.recordings import Clip, Episode, Recordings, read_columns, videos
from atlas.errors import ConfigError

# v2.0 differs from v2.1 only in its statistics, which are not read but computed here.
FILE_PER_EPISODE = ("v2.0", "v2.1")
SHARED_FILES = ("v3.0",)


def open_recordings(root: Path) -> Recordings:
    """Read the meta files under `root`; raise ConfigError with all their problems."""
    if not root.is_dir():
        raise ConfigError(f"data.root={root}: no such folder; give the one that holds meta/")
    info = _read_info(root)
    return (_open_v2 if info["codebase_version"] in FILE_PER_EPISODE else _open_v3)(root, info)


def _open_v2(root: Path, info: dict[str, Any]) -> Recordings:
    problems: list[str] = []
    episodes_file, tasks_file = "meta/episodes.jsonl", "meta/tasks.jsonl"
    lengths = _read_lines(root / episodes_file, {"episode_index": int, "length": int}, problems)
    tasks = _read_lines(root / tasks_file, {"task_index": int, "task": str}, problems)
    if problems:
        raise ConfigError(problems)

    def episode(index: int, length: int) -> Episode:
        chunk = index // int(info["chunks_size"])
        place = {"episode_chunk": chunk, "episode_index": index}
        clips = {
            camera: Clip(_path(root, info, "video_path", video_key=camera, **place))
            for camera in videos(info)
        }
        return Episode(index, length, _path(root, info, "data_path", **place), clips)

    return Recordings(
        root,
        info,
        {index: episode(index, length) for index, length in sorted(lengths)},
        dict(tasks),
        episodes_file,
        tasks_file,
    )


def _open_v3(root: Path, info: dict[str, Any]) -> Recordings:
    episodes_file, tasks_file = "meta/episodes", "meta/tasks.parquet"
    files = sorted((root / episodes_file).glob("**/*.parquet"))
    if not files:
        raise ConfigError(f"{root / episodes_file}: has no parquet file; copy it again")
    problems: list[str] = []
    episodes: dict[int, Episode] = {}
    for file in files:
        try:
            episodes.update(_read_episodes(root, info, file))
        except ConfigError as error:
            problems += error.problems
    try:
        tasks = _read_tasks(root / tasks_file)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Recordings(root, info, dict(sorted(episodes.items())), tasks, episodes_file, tasks_file)


def _read_episodes(root: Path, info: dict[str, Any], file: Path) -> dict[int, Episode]:
    """Read the episodes in one file under meta/episodes/."""
    cameras = videos(info)
    keys = ["episode_index", "length", "dataset_from_index", "dataset_to_index"]
    places = ["data", *(f"videos/{camera}" for camera in cameras)]
    keys += [f"{place}/{part}" for place in places for part in ("chunk_index", "file_index")]
    keys += [f"videos/{camera}/from_timestamp" for camera in cameras]
    columns = {key: column.to_pylist() for key, column in read_columns(file, keys).items()}
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return {int(row["episode_index"]): _episode(root, info, file, row) for row in rows}


def _episode(root: Path, info: dict[str, Any], file: Path, row: dict[str, Any]) -> Episode:
    index, length = int(row["episode_index"]), int(row["length"])
    if row["dataset_to_index"] - row["dataset_from_index"] != length:
        raise ConfigError(
            f"{file}: episode {index} has length={length}, but its rows are "
            f"{row['dataset_from_index']} to {row['dataset_to_index']}; copy it again"
        )

    def path(template: str, place: str) -> Path:
        # The columns' names contain "/", which the keys of a template cannot.
        parts = {part: int(row[f"{place}/{part}"]) for part in ("chunk_index", "file_index")}
        return _path(root, info, template, video_key=place.partition("/")[2], **parts)

    clips = {
        camera: Clip(
            path("video_path", f"videos/{camera}"),
            float(row[f"videos/{camera}/from_timestamp"]),
        )
        for camera in videos(info)
    }
    return Episode(index, length, path("data_path", "data"), clips, shared=True)


def _path(root: Path, info: dict[str, Any], key: str, **parts: Any) -> Path:
    """Return the path that the template `key` of meta/info.json gives for these `parts`."""
    try:
        return root / str(info[key]).format(**parts)
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{root / 'meta/info.json'}: {key}={info[key]} cannot be filled in with "
            f"{', '.join(parts)}; copy it again"
        ) from error


def _read_tasks(path: Path) -> dict[int, str]:
    """Read the instructions by number; their column is the index of a pandas frame."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read ({reason}); copy it again") from error
    # The second is pandas' name for an index without a name.
    names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not names or "task_index" not in table.column_names:
        raise ConfigError(
            f"{path}: has the columns {', '.join(table.column_names)}, but needs task_index and "
            "task (or the index of a pandas frame); copy it again"
        )
    numbers, tasks = table.column("task_index").to_pylist(), table.column(names[0]).to_pylist()
    return {int(number): str(task) for number, task in zip(numbers, tasks)}


def _read_info(root: Path) -> dict[str, Any]:
    path = root / "meta/info.json"
    try:
        info: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"data.root={root}: has no meta/info.json, so it is not a LeRobot folder; "
            "give the one that holds meta/, data/ and videos/"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error}); copy it again") from error
    if not isinstance(info, dict):
        raise ConfigError(f"{path}: is JSON without keys; copy it again")
    version = info.get("codebase_version")
    if version not in (known := (*FILE_PER_EPISODE, *SHARED_FILES)):
        raise ConfigError(
            f"{path}: codebase_version={version} is not supported, only {', '.join(known)} are; "
            "use a revision of the data set in one of these formats, or convert it"
        )
    needed = ["features", "fps", "data_path", "video_path"]
    needed += ["chunks_size"] if version in FILE_PER_EPISODE else []
    if missing := [key for key in needed if not info.get(key)]:
        raise ConfigError(f"{path}: has no {', '.join(missing)}; copy it again")
    return info


def _read_lines(
    path: Path, kinds: dict[str, Callable[[Any], Any]], problems: list[str]
) -> list[tuple[Any, ...]]:
    """Read the values of the keys of `kinds` in each line of a .jsonl file.

    Appends to `problems` instead of raising.
    """
    rows = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); copy it again")
        return []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                row = json.loads(line)
                rows.append(tuple(kind(row[key]) for key, kind in kinds.items()))
        except (ValueError, KeyError, TypeError):
            problems.append(
                f"{path}, line {number}: is not JSON with {' and '.join(kinds)}; copy it again"
            )
    if not rows and not problems:
        problems.append(f"{path}: is empty; copy it again")
    return rows
