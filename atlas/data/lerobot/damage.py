"""Damage that a few bytes of a recorded file show: the file is missing, empty or truncated."""

from __future__ import annotations

import stat
from functools import cache
from pathlib import Path
from typing import BinaryIO

MISSING = "is missing"
TRUNCATED = "is truncated"
POINTER = b"version https://git-lfs"  # start of the placeholder that a clone without git-lfs has


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a parquet or mp4 file ("is empty"), None if nothing is found.

    Only a few bytes are read, so wrong bytes in the middle of a file are not found.
    """
    try:
        found = path.stat()
    except OSError:
        return MISSING
    if not stat.S_ISREG(found.st_mode):
        return MISSING
    return _find_damage(path, found.st_size, found.st_mtime_ns)


@cache  # both splits ask for every file, and several episodes can share a file
def _find_damage(path: Path, size: int, changed: int) -> str | None:
    if not size:
        return "is empty"
    check = {".parquet": _check_parquet, ".mp4": _check_mp4}.get(path.suffix)
    try:
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                return "is a pointer of git-lfs"
            return check(file, path, size) if check else None
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _check_parquet(file: BinaryIO, path: Path, size: int) -> str | None:
    import pyarrow
    import pyarrow.parquet

    # A parquet file ends with its table of contents and one of these two words.
    file.seek(max(size - 4, 0))
    if file.read(4) not in (b"PAR1", b"PARE"):
        return TRUNCATED
    try:
        return None if pyarrow.parquet.read_metadata(path).num_rows else "has no rows"
    except (pyarrow.ArrowException, OSError):
        return None  # other damage: the error of reading the file describes it better


def _check_mp4(file: BinaryIO, path: Path, size: int) -> str | None:
    # An mp4 file is a sequence of boxes. Each starts with its length and kind; the frames are in
    # the box "mdat", their index in "moov".
    position, kinds = 0, set()
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if position == 0 and kind != b"ftyp":
            return None  # not an mp4 file at all: the error of decoding it describes it better
        if length == 1:  # the length does not fit into four bytes
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:  # the box reaches to the end of the file
            length = size - position
        if length < 8:
            break
        kinds.add(kind)
        position += length
    complete = position <= size and {b"moov", b"mdat"} <= kinds
    return None if complete else TRUNCATED
