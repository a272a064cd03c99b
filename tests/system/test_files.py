"""Atomic writes, locks between processes, and digests that names on disk hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from atlas.system import files

# Holds the lock of the file argv[1] until its input ends.
HOLD = """
import sys
from pathlib import Path
from atlas.system.files import {function}
with {function}(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold() -> Iterator[Callable[[str, Path], subprocess.Popen[str]]]:
    """Start a process that holds a lock; its end releases it."""
    started: list[subprocess.Popen[str]] = []

    def start(function: str, path: Path) -> subprocess.Popen[str]:
        code = HOLD.format(function=function)
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        assert child.stdout.readline() == "held\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.communicate()


def is_free(path: Path) -> bool:
    with open(path, "a") as file:
        return files.try_lock(file)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Atomic writes


def test_a_reader_has_the_old_or_the_new_content(tmp_path):
    path = tmp_path / "status.json"
    files.write_json(path, ["a"] * 10_000)
    seen = []
    for letter in "bcdefg":
        with open(path) as before:
            files.write_json(path, [letter] * 10_000)
            seen.append(json.load(before))
    assert [s[0] for s in seen] == list("abcdef") and all(len(s) == 10_000 for s in seen)
    assert names(tmp_path) == ["status.json"]


class Full(Exception):
    pass


def fail_in_a_file(path: Path) -> None:
    with files.atomic_file(path, sync=True) as file:
        file.write(b"half of it")
        raise Full


def fail_in_a_path(path: Path) -> None:
    with files.atomic_path(path, ".fixed") as temporary:
        temporary.write_text("half of it")
        raise Full


def fail_before_the_file(path: Path) -> None:
    with files.atomic_path(path):
        raise Full


def fail_in_json(path: Path) -> None:
    files.write_json(path, {"key": object()})


@pytest.mark.parametrize(
    "write", [fail_in_a_file, fail_in_a_path, fail_before_the_file, fail_in_json]
)
def test_a_failed_write_leaves_the_old_content_and_no_temporary(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises((Full, TypeError)):
        write(path)
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="No space"), files.atomic_path(path) as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("new")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_fixed_temporary_that_a_kill_left_is_replaced(tmp_path):
    (tmp_path / ".best").symlink_to("00000001")
    with files.atomic_path(tmp_path / "best", ".best") as temporary:
        temporary.symlink_to("00000002")
    assert os.readlink(tmp_path / "best") == "00000002" and names(tmp_path) == ["best"]


def test_the_content_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    calls: list[str] = []

    def note(name: str) -> Callable[..., Any]:
        function = getattr(os, name)

        def noted(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        return noted

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, note(name))
    with files.atomic_file(tmp_path / "array", sync=True) as file:
        file.write(b"content")
    assert calls == ["fsync", "replace"]


def test_the_first_writer_creates_the_file(tmp_path):
    path = tmp_path / "failure.json"
    assert files.create_text(path, "first") and not files.create_text(path, "second")
    assert path.read_text() == "first" and names(tmp_path) == ["failure.json"]


# Locks


def test_a_lock_excludes_another_process_until_that_ends(tmp_path, hold):
    path = tmp_path / ".sync.lock"
    holder = hold("locked", path)
    assert not is_free(path)
    holder.kill()
    holder.wait()
    assert is_free(path)


def test_the_guard_of_a_folder_is_a_file_in_it(tmp_path, hold):
    hold("guarded", tmp_path / "name")
    assert not is_free(tmp_path / "name" / ".guard")


def test_work_that_another_process_has_is_not_claimed(tmp_path, hold):
    path = tmp_path / "frames.lock"
    holder = hold("locked", path)
    with files.claimed(path, wait=False) as mine:
        assert not mine
    holder.kill()
    with files.claimed(path, wait=True) as mine:
        assert mine
    assert not path.exists()


def test_work_is_claimed_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*arguments: Any) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with files.claimed(tmp_path / "frames.lock", wait=False) as mine:
        assert mine


# Digests, as `sha256sum` prints them

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def digest_of_a_written_file(data: bytes, folder: Path) -> str:
    (folder / "data").write_bytes(data)
    return files.digest_of_file(folder / "data")


def digest_while_writing(data: bytes, folder: Path) -> str:
    with open(folder / "data", "wb") as file:
        hashing = files.HashingFile(file)
        for byte in data:
            hashing.write(bytes([byte]))
    assert (folder / "data").read_bytes() == data
    return hashing.digest()


@pytest.mark.parametrize(
    "digest",
    [
        lambda data, _: files.digest(data),
        lambda data, _: files.digest(data.decode()),
        lambda data, _: files.digest_of_parts(data[i : i + 1] for i in range(len(data))),
        digest_of_a_written_file,
        digest_while_writing,
    ],
)
def test_a_digest_is_sha256(tmp_path, digest):
    assert [digest(data, tmp_path) for data in (b"abc", b"")] == [ABC, NOTHING]


def test_the_digest_of_json_does_not_depend_on_the_order_of_keys():
    expected = files.digest('{"a": [1, null], "b": "/x"}')
    assert files.digest_of_json({"b": Path("/x"), "a": (1, None)}) == expected


def test_a_hashing_file_keeps_the_reason_of_a_failed_write():
    class Broken:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    file: BinaryIO = Broken()  # type: ignore[assignment]
    hashing = files.HashingFile(file)
    with pytest.raises(OSError):
        hashing.write(b"x")
    assert hashing.error.errno == 28


def test_the_message_of_a_failed_write_has_the_free_space(tmp_path):
    path = tmp_path / "missing" / "folder" / "state.pt"
    text = files.describe_write_error(path, OSError("disk full"))
    number = text.removeprefix(f"{path} could not be written (disk full); ").split()[0]
    assert float(number) > 0
