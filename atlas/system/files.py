"""Files: atomic writes, locks between processes, digests, and what a full disk is reported as.

A file that another process may read is written under a temporary name in the same folder and then
renamed, so a reader sees the old or the new content and a killed writer leaves the old one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

Bytes = bytes | bytearray | memoryview

BLOCK = 1 << 20  # bytes of a file that are read at once

# Atomic writes


@contextlib.contextmanager
def atomic_path(path: Path, name: str | None = None) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path`, or remove it after an error.

    For what is not written through a file object: a link, a file of another library. `name` is for
    a caller that is alone with `path`: what a kill left under that name is removed first. Any other
    temporary has a name of its own for every host, process and thread.
    """
    temporary = path.with_name(name or _temporary_name(path))
    if name:
        temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink()
        raise


@contextlib.contextmanager
def atomic_file(path: Path, sync: bool = False) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when it is complete.

    With `sync` its content is on the disk before the rename: after a power cut the file is the old
    one or the new one, never an empty one.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file
        if sync:
            sync_file(file)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file with `text`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Replace `path` by a file with `value` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, default=default) + "\n")


def create_text(path: Path, text: str) -> bool:
    """Create `path` with `text` unless it exists; return whether this call created it.

    Of several processes exactly one succeeds, and no reader sees half of the text.
    """
    temporary = path.with_name(_temporary_name(path))
    try:
        temporary.write_text(text)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def sync_file(file: IO[Any]) -> None:
    """Write what an open file holds to the disk, so that it survives a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Write the names in a folder to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_name(path: Path) -> str:
    # With the host: a shared file system has processes with the same number on several machines.
    return f".{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_native_id()}.tmp"


# Locks


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file against other processes; return False if another process holds it.

    The kernel releases the lock when the file is closed, also by the end of the process.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock of the file `path`, which is created if missing, and hold it."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Hold the guard file of `folder`, so that several steps in it are one to other processes."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".guard"):
        yield


@contextlib.contextmanager
def claimed(path: Path, wait: bool) -> Iterator[bool]:
    """Claim a piece of work by the file `path`; yield False if another process has it.

    With `wait` that process is waited for instead. A claim only saves work: two processes can both
    have it where the file system has no locks, or after the file was removed, so the work must be
    written atomically.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


# Digests: SHA-256 in hexadecimal. Names on disk hold them, so they must stay as they are.


def digest(data: Bytes | str) -> str:
    """Return the digest of bytes, or of a text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def digest_of_parts(parts: Iterable[Bytes]) -> str:
    """Return the digest of `parts` one after the other, of which one at a time is in memory."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def digest_of_json(value: Any) -> str:
    """Return the digest of a plain value; the order of keys does not count."""
    return digest(json.dumps(value, sort_keys=True, default=str))


def digest_of_file(path: Path) -> str:
    """Return the digest of a file's content."""
    with open(path, "rb") as file:
        return digest_of_parts(iter(lambda: file.read(BLOCK), b""))


class HashingFile:
    """A binary file that computes the digest of what is written to it.

    `error` is the last error of a write: `torch.save` raises one of its own, without the reason.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._total = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write `data` and add it to the digest."""
        self._total.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def digest(self) -> str:
        """Return the digest of everything written so far."""
        return self._total.hexdigest()


# Free space


def free_bytes(folder: Path) -> int:
    """Return how many bytes are free where `folder` is, or will be created."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def describe_write_error(path: Path, error: BaseException) -> str:
    """Return why `path` could not be written, with the free space, for an error message."""
    free = free_bytes(path.parent) / 1e6
    return f"{path} could not be written ({error}); {free:.1f} MB are free there"
