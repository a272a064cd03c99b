"""Tiny folders of recordings in LeRobot's formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="av is not installed (extra vla)")
pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra vla)")
parquet = pytest.importorskip("pyarrow.parquet")

from atlas.data.lerobot.dataset import LeRobot  # noqa: E402

HEIGHT, WIDTH, FPS = 48, 64, 10
LENGTHS = (9, 7, 8)
TASKS = ("Pick up the red-ish Ball!", "Open the drawer 2x")


def grey(episode: int, frame: int) -> int:
    """What all pixels of a frame are, so that a frame can be told by them."""
    return (20 + 60 * episode + 12 * frame) % 240


def states(episode: int, length: int) -> np.ndarray:
    """A joint that tells episode and row, one that moves smoothly, and one that does not move."""
    rows = np.arange(length)
    return np.stack([100.0 * episode + rows, np.sin(rows + episode), 0 * rows], 1).astype("f4")


def write_video(path: Path, greys: list[int], fps: int = FPS, **options: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 10_000_000  # so that a grey stays what it was
        for value in greys:
            image = np.full((HEIGHT, WIDTH, 3), value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_table(root: Path, episode: int, columns: dict[str, Any]) -> None:
    path = root / f"data/chunk-00{episode // 2}/episode_{episode:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {key: list(value) if value.ndim > 1 else value for key, value in columns.items()}
    parquet.write_table(pyarrow.table(arrays), path)


def columns(episode: int, length: int, lead: float = 0.5) -> dict[str, np.ndarray]:
    """State, an action that is the state plus `lead`, and the row's task."""
    state = states(episode, length)
    task = np.full(length, episode % len(TASKS))
    return {"observation.state": state, "action": state + np.float32(lead), "task_index": task}


def write_folder(root: Path, lengths: tuple[int, ...] = LENGTHS, lead: float = 0.5) -> Path:
    """A folder of format v2.1 with a camera "top" and a camera "hand" (darker by 6)."""
    (root / "meta").mkdir(parents=True)
    vector = {"dtype": "float32", "shape": [3]}
    video = {"dtype": "video", "shape": [HEIGHT, WIDTH, 3]}
    features = {"observation.state": vector, "action": vector, "top": video, "hand": video}
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "chunks_size": 2,
        "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/{episode_chunk:03d}-{episode_index:06d}.mp4",
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
    (root / "meta/tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    episodes = [{"episode_index": i, "length": n} for i, n in enumerate(lengths)]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(e) + "\n" for e in episodes))
    for episode, length in enumerate(lengths):
        write_table(root, episode, columns(episode, length, lead))
        for camera, darker in (("top", 0), ("hand", 6)):
            greys = [grey(episode, frame) - darker for frame in range(length)]
            write_video(root / f"videos/{camera}/{episode // 2:03d}-{episode:06d}.mp4", greys)
    return root


def write_v3(
    root: Path,
    lengths: tuple[int, ...] = LENGTHS,
    files: tuple[int, ...] = (0, 0, 1),
    task_column: str = "__index_level_0__",
    **row: Any,
) -> Path:
    """The same recordings as `write_folder`'s in format v3.0, episode i in file `files[i]`.

    `row` replaces columns of the last episode's row under meta/episodes.
    """
    write_folder(root, lengths)
    for gone in ("data", "videos", "meta/episodes.jsonl", "meta/tasks.jsonl"):
        path = root / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    edit_info(
        codebase_version="v3.0",
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )(root)
    tasks = {"task_index": list(range(len(TASKS))), task_column: list(TASKS)}
    parquet.write_table(pyarrow.table(tasks), root / "meta/tasks.parquet")
    rows = []
    for file in sorted(set(files)):
        inside = [e for e in range(len(lengths)) if files[e] == file]
        write_shared_table(root, file, inside, lengths)
        for camera, darker in (("top", 0), ("hand", 6)):
            greys = [grey(e, f) - darker for e in inside for f in range(lengths[e])]
            write_video(root / f"videos/{camera}/chunk-000/file-{file:03d}.mp4", greys)
        frame = 0
        for e in inside:
            first, start = sum(lengths[:e]), frame / FPS
            frame += lengths[e]
            place = {"chunk_index": 0, "file_index": file}
            found = {"episode_index": e, "length": lengths[e], "tasks": [TASKS[e % 2]]}
            found |= {"dataset_from_index": first, "dataset_to_index": first + lengths[e]}
            for key in ("data", "videos/top", "videos/hand"):
                found |= {f"{key}/{part}": value for part, value in place.items()}
            for key in ("videos/top", "videos/hand"):
                found |= {f"{key}/from_timestamp": start, f"{key}/to_timestamp": frame / FPS}
            rows.append(found)
    rows[-1] |= row
    for number, found in enumerate(rows):  # a file of meta/episodes each
        path = root / f"meta/episodes/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist([found]), path)
    return root


def write_shared_table(root: Path, file: int, episodes: list[int], lengths: Any) -> None:
    path = root / f"data/chunk-000/file-{file:03d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = [columns(e, lengths[e]) | {"episode_index": np.full(lengths[e], e)} for e in episodes]
    joined = {key: np.concatenate([table[key] for table in tables]) for key in tables[0]}
    arrays = {key: list(value) if value.ndim > 1 else value for key, value in joined.items()}
    parquet.write_table(pyarrow.table(arrays), path)


def open_split(root: Path, split: str = "train", **options: Any) -> LeRobot:
    chosen: dict[str, Any] = {
        "history": 3,
        "horizon": 4,
        "val_episodes": 1,
        "image_size": [12, 16],
    } | options
    return LeRobot(root, split=split, **chosen)


def unlink(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: int(keep * len(content))])

    return edit


def edit_info(**changes: Any) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / "meta/info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit
