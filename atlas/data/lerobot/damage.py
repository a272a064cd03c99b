"""What can be told of a recorded file without reading it: that it is not there, or not whole."""

from __future__ import annotations

import stat
from functools import cache
from pathlib import Path
from typing import BinaryIO

ABSENT = "is not there"
CUT = "is cut short"
POINTER = b"version https://git-lfs"  # what a clone without git-lfs has in place of a file


def damage(path: Path) -> str | None:
    """What is wrong with a parquet or mp4 file, as the end of a sentence; None if nothing is seen.

    A few bytes are read: a file cut short is found, one with wrong bytes in its middle is not.
    """
    try:
        found = path.stat()
    except OSError:
        return ABSENT
    if not stat.S_ISREG(found.st_mode):
        return ABSENT
    return _damage(path, found.st_size, found.st_mtime_ns)


@cache  # both splits ask for every file, and many episodes can be in one
def _damage(path: Path, size: int, changed: int) -> str | None:
    if not size:
        return "is empty"
    check = {".parquet": _parquet, ".mp4": _mp4}.get(path.suffix)
    try:
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                return "is a pointer of git-lfs"
            return check(file, path, size) if check else None
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _parquet(file: BinaryIO, path: Path, size: int) -> str | None:
    """The table of contents is the end of the file, and after it stands a word."""
    import pyarrow
    import pyarrow.parquet

    file.seek(max(size - 4, 0))
    if file.read(4) not in (b"PAR1", b"PARE"):
        return CUT
    try:
        return None if pyarrow.parquet.read_metadata(path).num_rows else "has no rows"
    except (pyarrow.ArrowException, OSError):
        return None  # damaged in another way: reading it says in which


def _mp4(file: BinaryIO, path: Path, size: int) -> str | None:
    """A file is boxes, each with its length and kind ahead; frames are in one, an index in one."""
    place, kinds = 0, set()
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if place == 0 and kind != b"ftyp":
            return None  # something else by the name of mp4: decoding it says what
        if length == 1:  # does not fit into four bytes
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:  # up to the end of the file
            length = size - place
        if length < 8:
            break
        kinds.add(kind)
        place += length
    whole = place <= size and {b"moov", b"mdat"} <= kinds
    return None if whole else CUT
