"""How many frames a second recordings are read at: decoded, and from the cache of decoded frames.

python benchmarks/reading.py [--root FOLDER] [--size 224 224] [--batches 200]

Without --root, a folder of random clips is generated. Prints frames per second of decoding everything
once (by one and by two processes), and of reading batches of 8 from the cache in order and at random,
in the training's own process and by one and two workers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import ROOT, heading

sys.path.insert(0, str(ROOT))

from atlas.data.arrays import open_array
from atlas.data.lerobot.dataset import LeRobot
from atlas.data.lerobot.video import FrameCache, Video
from atlas.training.feeding.workers import answers

BATCH = 8
EPISODES, FRAMES, FPS = 8, 120, 30  # of the generated folder
SIDE = (480, 640)


class Batches:
    """What a stream asks a worker for: a batch by the ids of its samples."""

    def __init__(self, data: LeRobot) -> None:
        self.data = data

    def __getitem__(self, ids: Any) -> torch.Tensor:
        images: torch.Tensor = self.data.batch(ids)["images"]
        return images


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="a folder of recordings (default: one is generated)")
    parser.add_argument("--size", type=int, nargs=2, default=[224, 224], help="height and width")
    parser.add_argument("--batches", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(arguments.root) if arguments.root else generate(Path(scratch) / "made")
        print(heading("Reading recordings"))
        data = opened(root, arguments.size, Path(scratch) / "once")
        videos = [video for videos in data._videos for video in videos]
        views = len(data.cameras or [])
        print(
            f"{len(data)} samples, {views} cameras, {arguments.size[0]}x{arguments.size[1]}, {codec(videos[0])}"
        )
        print(f"\n{'frames per second':<34}{'in order':>12}{'at random':>12}")
        tell("straight from the video, 1 process", *straight(videos, arguments.size))
        for processes in (1, 2):
            rate = decode(root, arguments.size, Path(scratch) / str(processes), processes)
            tell(f"decoded into the cache, {processes} process" + "es" * (processes > 1), rate)
        data.prepare()
        for workers in (0, 1, 2):
            rates = [
                read(data, order, arguments.batches, workers) for order in (in_order, at_random)
            ]
            where = "no worker" if not workers else f"{workers} worker" + "s" * (workers > 1)
            tell(f"from the cache, {where}", *rates)


def opened(root: Path, size: list[int], cache: Path) -> LeRobot:
    """The training split, its frames to be kept in `cache`."""
    return LeRobot(root, image_size=size, val_episodes=1, cache_dir=cache)


def straight(videos: list[Video], size: list[int]) -> tuple[float, float]:
    """Frames per second of one video, in order and by seeking, without a cache."""
    video = videos[0]
    began = time.perf_counter()
    count = sum(1 for _ in video.decode(*size))
    ordered = count / (time.perf_counter() - began)
    rng, began, count = np.random.default_rng(0), time.perf_counter(), 0
    while time.perf_counter() - began < 3.0:
        # A start of 0 would mean the whole file.
        start = video.start + float(rng.integers(1, video.frames - 1)) / video.fps
        next(Video(video.path, 1, video.fps, start).decode(*size))
        count += 1
    return ordered, count / (time.perf_counter() - began)


def decode(root: Path, size: list[int], cache: Path, processes: int) -> float:
    """Frames per second of filling an empty cache by so many processes."""
    data = opened(root, size, cache)
    videos = [video for videos in data._videos for video in videos]
    fork = multiprocessing.get_context("fork")
    fill: Callable[..., None] = FrameCache(cache, *size).fill
    workers = [fork.Process(target=fill, args=(videos,)) for _ in range(processes)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(video.frames for video in videos) / (time.perf_counter() - began)


def read(
    data: LeRobot, order: Callable[[int, int], Iterator[Any]], batches: int, workers: int
) -> float:
    """Frames per second of so many batches from the cache, which the kernel has in memory."""
    source, requests = Batches(data), list(order(len(data), batches))
    open_array.cache_clear()
    source[np.arange(min(64, len(data)))]  # maps are opened
    answered: Any = map(source.__getitem__, requests)
    if workers:
        answered = answers(source, lambda: requests, workers, torch.device("cpu"))
        next(answered)  # the workers have read what they need once
    count, began = 0, time.perf_counter()
    for images in answered:
        count += images.shape[0] * images.shape[1]
    return count / (time.perf_counter() - began)


def in_order(length: int, batches: int) -> Iterator[Any]:
    """Ids of neighbouring frames."""
    for batch in range(batches):
        yield (np.arange(BATCH) + batch * BATCH) % length


def at_random(length: int, batches: int) -> Iterator[Any]:
    """Ids as training draws them."""
    rng = np.random.default_rng(1)
    for _ in range(batches):
        yield rng.integers(0, length, BATCH)


def tell(what: str, ordered: float, random: float | None = None) -> None:
    """One line of the table."""
    print(
        f"{what:<34}{ordered:12,.0f}" + ("" if random is None else f"{random:12,.0f}"), flush=True
    )


def codec(video: Video) -> str:
    """The codec and size of a video file."""
    import av

    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        return f"{stream.codec_context.name} {stream.height}x{stream.width}"


def generate(root: Path) -> Path:
    """A folder of format v2.1 with one camera and states that move, of noise that is hard to pack."""
    import pyarrow
    import pyarrow.parquet

    meta = root / "meta"
    meta.mkdir(parents=True)
    vector, video = {"dtype": "float32", "shape": [7]}, {"dtype": "video", "shape": [*SIDE, 3]}
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "chunks_size": 1000,
        "features": {"observation.state": vector, "action": vector, "top": video},
        "data_path": "data/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (meta / "info.json").write_text(json.dumps(info))
    (meta / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "generated"}) + "\n")
    lines = [json.dumps({"episode_index": e, "length": FRAMES}) + "\n" for e in range(EPISODES)]
    (meta / "episodes.jsonl").write_text("".join(lines))
    for episode in range(EPISODES):
        rng = np.random.default_rng(episode)
        states = np.cumsum(rng.normal(size=(FRAMES, 7)), axis=0).astype("f4")
        columns = {"observation.state": list(states), "action": list(states + 1)}
        table = pyarrow.table({**columns, "task_index": np.zeros(FRAMES, np.int64)})
        (root / "data").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, root / f"data/episode_{episode:06d}.parquet")
        write_clip(root / f"videos/top/episode_{episode:06d}.mp4", rng)
    return root


def write_clip(path: Path, rng: np.random.Generator) -> None:
    """A clip in AV1, as LeRobot writes it, where the encoder is there, else MPEG-4."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    has_av1 = "libsvtav1" in av.codecs_available
    options = {"g": "2", "crf": "30", "preset": "12"} if has_av1 else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1" if has_av1 else "mpeg4", FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *SIDE, "yuv420p"
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        for frame in range(FRAMES):
            image = np.roll(coarse.repeat(40, 0).repeat(40, 1), 3 * frame, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    os.environ.setdefault("SVT_LOG", "1")
    main()
