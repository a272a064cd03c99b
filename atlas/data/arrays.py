"""Arrays on disk that are made once, by whichever process is first, and mapped by all others."""

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
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    # Written in order, not through a memory map: on a full disk that would be SIGBUS.
    with atomic_file(file, sync=True) as out:
        np.lib.format.write_array_header_1_0(out, header)
        for part in parts:
            out.write(np.ascontiguousarray(part, dtype).tobytes())


@lru_cache(maxsize=1024)  # below the number of open maps that a process may have
def open_array(file: Path) -> Array:
    """The array in `file`, mapped, not read."""
    array: Array = np.load(file, mmap_mode="r")
    return array
