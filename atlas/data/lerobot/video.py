"""Video frames, decoded once and kept on disk: whole episodes, resized, one file each.

A random frame of a compressed video costs several milliseconds, a row of a file that the kernel
has in memory a few microseconds; and the file is shared by workers, ranks, runs and sweeps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from atlas.data.arrays import is_ready, write_array
from atlas.errors import ConfigError
from atlas.system.files import claimed, digest_of_json

logger = logging.getLogger("atlas")

PIXEL = np.dtype(np.uint8)
LOG_EVERY = 10.0  # seconds between two lines about a long decode
REMEDY = "copy it anew, or delete it and set data.on_missing=skip, which leaves out what needs it"


class VideoError(Exception):
    """A video cannot be used; the message names it."""


@dataclass(frozen=True)
class Video:
    """A stretch of a video file: `frames` from the second `start` on, at `fps` in 1/s."""

    path: Path
    frames: int  # as many as its table has rows
    fps: float
    start: float = 0.0

    def decode(self, height: int, width: int) -> Iterator[np.ndarray]:
        """Its frames in order, each uint8 [3, height, width].

        Raises VideoError, with the second where there is one, where it cannot be decoded, lacks
        frames or runs at another rate.
        """
        import av

        count, at = 0, ""
        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                self._check_rate(stream.average_rate)
                stream.thread_type = "AUTO"
                frames = self._whole(self._from_start(container, stream))
                at = f" from about {self.start:g} s on"
                for frame in islice(frames, self.frames):
                    # AREA averages the pixels that fall together; the others would alias.
                    small = frame.reformat(width, height, format="rgb24", interpolation="AREA")
                    yield small.to_ndarray().transpose(2, 0, 1)
                    count += 1
                    # Packets are decoded ahead of the frames, so the damage is there or soon after.
                    at = f" from about {self.start + count / self.fps:g} s on"
        except (av.FFmpegError, IndexError) as error:
            raise VideoError(f"{self.path}: cannot be decoded{at} ({error}); {REMEDY}") from error
        if count < self.frames:
            raise VideoError(
                f"{self.path}: has {count} frames{self._where}, its table {self.frames} rows; "
                "copy both anew"
            )

    @property
    def _where(self) -> str:
        return f" from {self.start:g} s on" if self.start else ""

    def _from_start(self, container: Any, stream: Any) -> Iterator[Any]:
        """The decoded frames from `start` on; from the key frame before it, not from the first."""
        if not self.start:
            yield from container.decode(stream)
            return
        container.seek(int(self.start / stream.time_base), stream=stream)
        first = self.start - 0.5 / self.fps  # times are rounded to the file's time base
        for frame in container.decode(stream):
            if frame.time is None:
                raise VideoError(
                    f"{self.path}: its frames have no times, by which an episode in it is found; "
                    "encode it anew"
                )
            if frame.time >= first:
                yield frame

    def _whole(self, frames: Iterator[Any]) -> Iterator[Any]:
        """The frames as they come; what a decoder conceals or leaves out is an error here."""
        # Where an episode begins in a file is known, and that a file begins at 0 is not.
        before = self.start - 1 / self.fps if self.start else None
        for frame in frames:
            if frame.is_corrupt:
                at = "" if frame.time is None else f" at {frame.time:g} s"
                raise VideoError(f"{self.path}: the frame{at} is damaged; {REMEDY}")
            # Row i is taken to be frame i, so after a gap every frame would be another row's.
            gap = 0.0 if None in (before, frame.time) else frame.time - before
            if gap > 1.5 / self.fps:
                raise VideoError(
                    f"{self.path}: has no frame between {before:g} and {frame.time:g} s; encode "
                    "it anew with a frame for every row of its table"
                )
            before = frame.time
            yield frame

    def _check_rate(self, rate: object) -> None:
        # Row i is taken to be frame i, which another rate would break without a sign of it.
        if rate is not None and abs(float(rate) / self.fps - 1) > 0.01:  # type: ignore[arg-type]
            raise VideoError(
                f"{self.path}: runs at {float(rate):g} frames/s, meta/info.json says "  # type: ignore[arg-type]
                f"fps={self.fps:g}; encode it with a frame for every row of its table"
            )


@dataclass(frozen=True)
class FrameCache:
    """The frames of videos as files of uint8 [frames, 3, height, width] in `directory`.

    A file is named by the video's path, size, time of change and stretch and by the image size, so
    what is found under that name is right or incomplete, and what is incomplete is made again.
    """

    directory: Path
    height: int
    width: int

    def file(self, video: Video) -> Path:
        """Where the frames of `video` are, or will be."""
        stat = video.path.stat()
        path = str(video.path.resolve())
        key: list[Any] = [path, stat.st_size, stat.st_mtime_ns, self.height, self.width]
        if video.start:  # a file of many episodes; else the name is what it always was
            key += [video.start, video.frames]
        return self.directory / f"{video.path.stem}-{digest_of_json(key)[:16]}.npy"

    def ready(self, video: Video) -> bool:
        """Whether all frames of `video` are there; a file cut short is not ready."""
        return is_ready(self.file(video), self._shape(video), PIXEL)

    def fill(self, videos: Sequence[Video]) -> None:
        """Decode what is not ready yet; any number of processes may do so at once.

        Raises ConfigError naming every video that cannot be used.
        """
        todo = [video for video in videos if not self.ready(video)]
        if not todo:
            return
        self._make_directory()
        progress = _Progress(len(todo), f"{self.height}x{self.width} into {self.directory}")
        problems: list[str] = []
        # First what no other process is at, so that several share the work; then wait for theirs.
        for wait in (False, True):
            todo = [v for v in todo if not self._fill_one(v, wait, progress, problems)]
        if problems:
            raise ConfigError(problems)
        progress.end()

    def _shape(self, video: Video) -> tuple[int, int, int, int]:
        return (video.frames, 3, self.height, self.width)

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(self._unwritable(error)) from error

    def _unwritable(self, error: OSError) -> str:
        return (
            f"data.cache_dir: cannot write frames to {self.directory} ({error.strerror}); "
            "name a folder that is writable and has room: data.cache_dir=DIR"
        )

    def _fill_one(self, video: Video, wait: bool, progress: _Progress, problems: list[str]) -> bool:
        """False where another process is at it and `wait` is not set."""
        try:
            with claimed(self.file(video).with_suffix(".lock"), wait) as mine:
                if mine and not self.ready(video):
                    self._write(video)
                    progress.add(video)
                return mine
        except VideoError as error:
            problems.append(str(error))
        except OSError as error:
            raise ConfigError(self._unwritable(error)) from error
        return True

    def _write(self, video: Video) -> None:
        frames = video.decode(self.height, self.width)
        write_array(self.file(video), self._shape(video), PIXEL, frames)


class _Progress:
    """Says what is being decoded, every LOG_EVERY seconds, and how long it took."""

    def __init__(self, videos: int, where: str) -> None:
        self.videos, self.done, self.frames = videos, 0, 0
        self.start = self.said = time.monotonic()
        logger.info("decoding %d videos at %s, once", videos, where)

    def add(self, video: Video) -> None:
        self.done += 1
        self.frames += video.frames
        if time.monotonic() - self.said > LOG_EVERY:
            self.said = time.monotonic()
            logger.info("decoded %d of %d videos", self.done, self.videos)

    def end(self) -> None:
        seconds = time.monotonic() - self.start
        logger.info("decoded %d videos, %d frames, in %.1f s", self.done, self.frames, seconds)
