"""The terminal: output whose reader can go away, and tables."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Mapping
from typing import Any

_NO_READER = (errno.EPIPE, errno.EIO)


class _Raw(io.FileIO):
    """A descriptor that is redirected to /dev/null when its reader is gone."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _NO_READER:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(data)


def ignore_closed_output() -> None:
    """Drop what is printed after the reader of stdout or stderr is gone, instead of raising.

    A run does not end because its terminal was closed. SIGHUP, which the terminal sends too, is
    handled with the other signals that stop a run.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        kind = type(getattr(stream, "buffer", None))
        if kind in (io.BufferedWriter, io.FileIO):  # FileIO under python -u
            stream.flush()
            raw = _Raw(stream.fileno(), "w", closefd=False)
            tolerant = io.TextIOWrapper(
                raw if kind is io.FileIO else io.BufferedWriter(raw),  # type: ignore[arg-type]
                stream.encoding,
                stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, tolerant)


def table(rows: Mapping[str, str]) -> str:
    """Return `rows` as lines with aligned values."""
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items())
