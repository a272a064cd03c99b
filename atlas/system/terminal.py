"""Output that may lose its reader: a terminal that is closed, or `head` that has seen enough."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Mapping
from typing import Any

GONE = (errno.EPIPE, errno.EIO)


class _Raw(io.FileIO):
    """A descriptor that is turned to /dev/null once nobody reads it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return super().write(data)


def outlive() -> None:
    """From now on a reader that goes away ends nothing: what is printed for it is dropped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        kind = type(getattr(stream, "buffer", None))
        if kind in (io.BufferedWriter, io.FileIO):  # the latter under python -u
            stream.flush()
            raw = _Raw(stream.fileno(), "w", closefd=False)
            lenient = io.TextIOWrapper(
                raw if kind is io.FileIO else io.BufferedWriter(raw),  # type: ignore[arg-type]
                stream.encoding,
                stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, lenient)


def table(rows: Mapping[str, str]) -> str:
    """Return `rows` as lines with aligned values."""
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items())
