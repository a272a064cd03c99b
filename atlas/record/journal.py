"""`metrics.jsonl`: the first and complete record of a run's metrics.

MLflow, the report and the table of a sweep are made from it. All of them read it with the functions
of this module, so a line that is torn or damaged means the same everywhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from atlas.errors import AtlasError
from atlas.system.files import describe_write_error

log = logging.getLogger(__name__)

FLUSH_S = 1.0
# Measured, not computed: two runs of the same steps differ in these.
TIMINGS = frozenset({"time", "samples_per_s", "step_time_ms", "data_wait_share", "val/time_s"})

_reported: set[tuple[Path, int]] = set()  # damaged lines that this process has warned of


class Journal:
    """Appends a line per logged step; what the file already has is compared, not written again.

    A run that resumes from a checkpoint takes again the steps that it had logged after that
    checkpoint. Their values are in the file, and may be in MLflow, so they are never removed: a
    value that comes again is compared with the first one, which also shows whether the run is
    reproducible.

    Lines are held in memory for at most `FLUSH_S` seconds. `before_write` is called before every
    write, and raises if this process may no longer write.
    """

    def __init__(self, path: Path, before_write: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self._before_write = before_write
        self._lines: list[dict[str, Any]] = []
        self._flushed = time.monotonic()
        self._recorded: dict[int, dict[str, Any]] = {}
        self._differences = 0
        cut_torn_line(path)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def replay_from(self, step: int) -> None:
        """Load what was recorded at `step` and later, to compare the resumed run with it."""
        self._recorded = {}
        for line in read(self.path):
            if line["step"] >= step:
                self._recorded.setdefault(line["step"], {}).update(line)

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` of `step`; `flush` writes them, or the first call a second later."""
        new = self._new(step, metrics) if self._recorded else metrics
        if new:
            self._lines.append({"step": step, "time": time.time(), **new})
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self, sync: bool = False) -> None:
        """Write all lines; with `sync`, wait until they are on the disk."""
        if self._lines:
            self._before_write()
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            try:
                write_all(self._fd, text.encode())
            except OSError as error:
                raise AtlasError(describe_write_error(self.path, error)) from error
            self._lines.clear()
        if sync:
            os.fsync(self._fd)
        self._flushed = time.monotonic()

    def _report_difference(self, step: int, key: str, now: Any, before: Any) -> None:
        """Warn of the first difference and count the others."""
        self._differences += 1
        if self._differences == 1:
            log.warning(
                "step %d: %s is %r and was %r before the restart; this run is not reproducible "
                "bit by bit (see trainer.deterministic, and the number of ranks)",
                step,
                key,
                now,
                before,
            )

    def close(self) -> None:
        """Flush and close the file."""
        if self._differences > 1:
            log.warning("%d values differ from those before the restart", self._differences)
        try:
            self.flush()
        finally:
            os.close(self._fd)

    def _new(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        recorded = self._recorded.get(step, {})
        if step > max(self._recorded):
            self._recorded = {}
        for key, value in metrics.items():
            if key in recorded and key not in TIMINGS and not _same(recorded[key], value):
                self._report_difference(step, key, value, recorded[key])
        left = {key: value for key, value in metrics.items() if key not in recorded}
        return {} if left.keys() <= TIMINGS else left


class Line(NamedTuple):
    """A complete line of a journal, and the offset of the byte behind it.

    `entry` is None where the line is damaged. It has an `end` all the same, so that a reader who
    keeps the offset passes the line instead of meeting it again.
    """

    entry: dict[str, Any] | None
    end: int


def read(path: Path, offset: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the entries from byte `offset` on; damaged lines are skipped and reported once."""
    return (line.entry for line in read_lines(path, offset) if line.entry is not None)


def read_lines(path: Path, offset: int = 0) -> Iterator[Line]:
    """Yield every complete line from byte `offset` on; a torn last line is left for later.

    A line that a damaged disk left unreadable must stop neither the run nor what follows it, so it
    is yielded without an entry.
    """
    for raw, end in read_raw(path, offset):
        yield Line(parse(path, raw, end), end)


def read_raw(path: Path, offset: int = 0) -> Iterator[tuple[bytes, int]]:
    """Yield every complete line, not parsed, with the offset behind it."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(offset)
        for raw in file:
            if raw.endswith(b"\n"):  # the last line may be torn, or not yet written to its end
                offset += len(raw)
                yield raw, offset


def parse(path: Path, raw: bytes, end: int) -> dict[str, Any] | None:
    """Return the entry in a line of `path`; None, with one warning, if the line is damaged."""
    with contextlib.suppress(ValueError):
        entry = json.loads(raw)
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            return entry
    if (path, end) not in _reported:
        _reported.add((path, end))
        log.warning("%s: skipped a damaged line that ends at byte %d: %.80r", path, end, raw)
    return None


def size(path: Path) -> int:
    """Return the size of `path` in bytes; 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def count_lines(path: Path) -> int:
    """Return how many complete lines `path` has; 0 if it does not exist."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def cut_torn_line(path: Path) -> None:
    """Remove what a killed writer left behind the last complete line."""
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
    """Write all of `data`, or nothing.

    A full disk can accept part of the data. That part is cut off again: half a line would be merged
    with the next one, and the same lines can be written in full when there is space.
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
