"""`metrics.jsonl`: the first and complete record of a run's metrics; everything else follows it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from atlas.errors import AtlasError

log = logging.getLogger(__name__)

FLUSH_S = 1.0
# Measured, not computed: two runs of the same steps differ in these.
TIMINGS = frozenset({"time", "samples_per_s", "step_time_ms", "data_wait_share", "val/time_s"})


class Journal:
    """Appends one line a logged step; what already stands is compared and not written again.

    Lines are kept back for at most `FLUSH_S` seconds. `before_write` is called ahead of every write
    and raises where this process may not write any more.
    """

    def __init__(self, path: Path, before_write: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self._before_write = before_write
        self._lines: list[dict[str, Any]] = []
        self._flushed = time.monotonic()
        self._standing: dict[int, dict[str, Any]] = {}
        self._differences = 0
        cut_torn_line(path)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def replay_from(self, step: int) -> None:
        """Remember what stands at `step` and later, to compare a resumed run with it."""
        self._standing = {}
        for line in read(self.path):
            if line["step"] >= step:
                self._standing.setdefault(line["step"], {}).update(line)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` of `step`; on disk after `flush`, or within a second by a later call."""
        new = self._new(step, metrics) if self._standing else metrics
        if new:
            self._lines.append({"step": step, "time": time.time(), **new})
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self, sync: bool = False) -> None:
        """Hand all lines to the operating system; with `sync`, to the disk."""
        if self._lines:
            self._before_write()
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            try:
                write_all(self._fd, text.encode())
            except OSError as error:
                free = shutil.disk_usage(self.path.parent).free / 1e6
                raise AtlasError(
                    f"{self.path} could not be written ({error}); {free:.1f} MB are free there"
                ) from error
            self._lines.clear()
        if sync:
            os.fsync(self._fd)
        self._flushed = time.monotonic()

    def _tell_difference(self, step: int, key: str, now: Any, before: Any) -> None:
        """Warn of the first difference; the others are counted."""
        self._differences += 1
        if self._differences == 1:
            log.warning(
                "step %d: %s is %r now and was %r before the restart; this run is not reproducible "
                "bit by bit (see trainer.deterministic, and the number of ranks)",
                step,
                key,
                now,
                before,
            )

    def close(self) -> None:
        """Flush and close."""
        if self._differences > 1:
            log.warning("%d values differed from before the restart", self._differences)
        try:
            self.flush()
        finally:
            os.close(self._fd)

    def _new(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        stands = self._standing.get(step, {})
        if step > max(self._standing):
            self._standing = {}
        for key, value in metrics.items():
            if key in stands and key not in TIMINGS and not _same(stands[key], value):
                self._tell_difference(step, key, value, stands[key])
        left = {key: value for key, value in metrics.items() if key not in stands}
        return {} if left.keys() <= TIMINGS else left


def read(path: Path, offset: int = 0) -> Iterator[dict[str, Any]]:
    """The complete lines from byte `offset` on; a torn last line is left for later.

    What a damaged disk has made of a line must not keep a run from going on: it is left out, and told.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if line.endswith(b"\n"):
                entry = None
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                if isinstance(entry, dict) and "step" in entry:
                    yield entry
                else:
                    log.warning("%s: a line is damaged and left out: %.80r", path, line)


def cut_torn_line(path: Path) -> None:
    """Remove what a killed writer left after the last complete line."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, or nothing that a reader would take for a line.

    A full disk can take part of the data: that part is cut off again, so the same lines can be
    written once there is room.
    """
    start = os.fstat(fd).st_size
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        os.ftruncate(fd, start)
        raise


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)  # NaN is the same as NaN here
