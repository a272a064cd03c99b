"""Video frames, decoded once and kept on disk: one file for each episode and camera, resized.

To decode a random frame of a compressed video takes several milliseconds, to read it from a file
that the kernel has in memory a few microseconds. Workers, ranks, runs and sweeps share the files.
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
LOG_EVERY = 10.0  # seconds between two lines about decoding
REMEDY = "copy it again, or delete it and set data.on_missing=skip, which leaves its episodes out"


class VideoError(Exception):
    """A video cannot be used; the message starts with its path."""


@dataclass(frozen=True)
class Video:
    """A section of a video file: `frames` frames from second `start`, at `fps` frames/s."""

    path: Path
    frames: int  # the number of rows of its table
    fps: float
    start: float = 0.0

    def decode(self, height: int, width: int) -> Iterator[np.ndarray]:
        """Yield the frames in order, each uint8 [3, height, width].

        Raises VideoError, with the second if known, if the video cannot be decoded, has too few
        frames or another frame rate.
        """
        import av

        count, at = 0, ""
        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                self._check_rate(stream.average_rate)
                stream.thread_type = "AUTO"
                frames = self._check_frames(self._from_start(container, stream))
                at = f" from about {self.start:g} s on"
                for frame in islice(frames, self.frames):
                    # AREA averages all pixels that become one; the other filters would alias.
                    small = frame.reformat(width, height, format="rgb24", interpolation="AREA")
                    yield small.to_ndarray().transpose(2, 0, 1)
                    count += 1
                    # Packets are decoded ahead of the frames, so the damage is at or after this.
                    at = f" from about {self.start + count / self.fps:g} s on"
        except (av.FFmpegError, IndexError) as error:
            raise VideoError(f"{self.path}: cannot be decoded{at} ({error}); {REMEDY}") from error
        if count < self.frames:
            raise VideoError(
                f"{self.path}: has {count} frames{self._where}, but its table {self.frames} rows; "
                "copy both again"
            )

    @property
    def _where(self) -> str:
        return f" from {self.start:g} s on" if self.start else ""

    def _from_start(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield the decoded frames from `start`; decoding begins at the key frame before it."""
        if not self.start:
            yield from container.decode(stream)
            return
        container.seek(int(self.start / stream.time_base), stream=stream)
        first = self.start - 0.5 / self.fps  # times in the file are rounded to its time base
        for frame in container.decode(stream):
            if frame.time is None:
                raise VideoError(
                    f"{self.path}: its frames have no times, which are needed to find an episode; "
                    "encode it again"
                )
            if frame.time >= first:
                yield frame

    def _check_frames(self, frames: Iterator[Any]) -> Iterator[Any]:
        """Yield the frames; raise VideoError for a damaged or missing frame.

        Decoders conceal damage and leave frames out without an error.
        """
        # An episode's start inside a file is exact; the first frame of a file need not be at 0.
        before = self.start - 1 / self.fps if self.start else None
        for frame in frames:
            if frame.is_corrupt:
                at = "" if frame.time is None else f" at {frame.time:g} s"
                raise VideoError(f"{self.path}: the frame{at} is damaged; {REMEDY}")
            # Frame i belongs to row i, so after a gap all frames would belong to wrong rows.
            gap = 0.0 if None in (before, frame.time) else frame.time - before
            if gap > 1.5 / self.fps:
                raise VideoError(
                    f"{self.path}: has no frame between {before:g} and {frame.time:g} s; encode "
                    "it again with a frame for every row of its table"
                )
            before = frame.time
            yield frame

    def _check_rate(self, rate: object) -> None:
        # Frame i belongs to row i, and with another rate that would be wrong without any error.
        if rate is not None and abs(float(rate) / self.fps - 1) > 0.01:  # type: ignore[arg-type]
            raise VideoError(
                f"{self.path}: has {float(rate):g} frames/s, but meta/info.json says "  # type: ignore[arg-type]
                f"fps={self.fps:g}; encode it again with a frame for every row of its table"
            )


@dataclass(frozen=True)
class FrameCache:
    """The frames of videos as files of uint8 [frames, 3, height, width] in `directory`.

    A file's name is a digest of the video's path, size, modification time and section, and of the
    image size. So a file of that name is correct or incomplete, and an incomplete one is written
    again.
    """

    directory: Path
    height: int
    width: int

    def file(self, video: Video) -> Path:
        """Return the file of the frames of `video`, whether it exists or not."""
        stat = video.path.stat()
        path = str(video.path.resolve())
        key: list[Any] = [path, stat.st_size, stat.st_mtime_ns, self.height, self.width]
        if video.start:  # only then, so that the names of existing files stay valid
            key += [video.start, video.frames]
        return self.directory / f"{video.path.stem}-{digest_of_json(key)[:16]}.npy"

    def ready(self, video: Video) -> bool:
        """Return whether all frames of `video` are on disk; a truncated file is not ready."""
        return is_ready(self.file(video), self._shape(video), PIXEL)

    def fill(self, videos: Sequence[Video]) -> None:
        """Decode the videos that are not ready yet; several processes can do so at the same time.

        Raises ConfigError that names every video that cannot be used.
        """
        todo = [video for video in videos if not self.ready(video)]
        if not todo:
            return
        self._make_directory()
        progress = _Progress(len(todo), f"{self.height}x{self.width} into {self.directory}")
        problems: list[str] = []
        # First decode what no other process is decoding, so that processes share the work. Then
        # wait for the rest.
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
            "set data.cache_dir=DIR to a writable folder with enough space"
        )

    def _fill_one(self, video: Video, wait: bool, progress: _Progress, problems: list[str]) -> bool:
        """Return whether the video is done; False if another process is decoding it."""
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
    """Logs the progress of decoding every LOG_EVERY seconds, and the time that it took."""

    def __init__(self, videos: int, where: str) -> None:
        self.videos, self.done, self.frames = videos, 0, 0
        self.start = self.logged = time.monotonic()
        logger.info("decoding %d videos at %s, once", videos, where)

    def add(self, video: Video) -> None:
        self.done += 1
        self.frames += video.frames
        if time.monotonic() - self.logged > LOG_EVERY:
            self.logged = time.monotonic()
            logger.info("decoded %d of %d videos", self.done, self.videos)

    def end(self) -> None:
        seconds = time.monotonic() - self.start
        logger.info("decoded %d videos, %d frames, in %.1f s", self.done, self.frames, seconds)
