"""Types of arrays, and arrays on disk that one process writes and all others map."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas.system.files import atomic_file

Array = NDArray[Any]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]


def cache_folder(name: str) -> Path:
    """Return $ATLAS_CACHE/<name>, or ~/.cache/atlas/<name>."""
    return (Path(os.environ.get("ATLAS_CACHE", "~/.cache/atlas")) / name).expanduser()


def is_ready(file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Return whether `file` holds the whole array; a truncated file does not."""
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return array.dtype == dtype and array.shape == shape


def write_array(
    file: Path, shape: tuple[int, ...], dtype: np.dtype[Any], parts: Iterable[Array]
) -> None:
    """Write the concatenation of `parts`; `file` appears only once it is complete.

    Raises OSError if the file cannot be written, and any error that producing a part raises.
    """
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    # Written in order and not through a memory map: on a full disk that would be SIGBUS.
    with atomic_file(file, sync=True) as out:
        np.lib.format.write_array_header_1_0(out, header)
        for part in parts:
            out.write(np.ascontiguousarray(part, dtype).tobytes())


@lru_cache(maxsize=1024)  # below the number of maps that a process may have open
def open_array(file: Path) -> Array:
    """Return the array in `file`, memory-mapped."""
    array: Array = np.load(file, mmap_mode="r")
    return array
