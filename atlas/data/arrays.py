"""Arrays on disk that are made once, by whichever process is first, and mapped by all others."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def cache_folder(name: str) -> Path:
    """$ATLAS_CACHE/<name>, or ~/.cache/atlas/<name>."""
    return (Path(os.environ.get("ATLAS_CACHE", "~/.cache/atlas")) / name).expanduser()


def is_ready(file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether the whole array is in `file`; one cut short is not."""
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return array.dtype == dtype and array.shape == shape


def write_array(
    file: Path, shape: tuple[int, ...], dtype: np.dtype[Any], parts: Iterable[Array]
) -> None:
    """Write `parts`, which put after each other are the array; under its name only once complete.

    Raises OSError where it cannot be written, and whatever making a part raises.
    """
    temporary = file.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    try:
        # Written in order, not through a memory map: on a full disk that would be SIGBUS.
        with open(temporary, "wb") as out:
            np.lib.format.write_array_header_1_0(out, header)
            for part in parts:
                out.write(np.ascontiguousarray(part, dtype).tobytes())
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@lru_cache(maxsize=1024)  # below the number of open maps that a process may have
def open_array(file: Path) -> Array:
    """The array in `file`, mapped, not read."""
    array: Array = np.load(file, mmap_mode="r")
    return array


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold `path` against other processes; False where one has it and `wait` is not set.

    The lock only saves work: each process writes under a name of its own and renames.
    """
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
