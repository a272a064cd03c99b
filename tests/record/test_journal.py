"""The journal: complete lines, each once, whatever is killed, damaged or full."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import unnamed

from atlas.errors import AtlasError, RunBusyError
from atlas.record import journal
from atlas.record.journal import Journal, cut_torn_line, read, read_lines

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, *points: tuple[int, dict[str, float]]) -> None:
    book = Journal(path)
    for step, metrics in points:
        book.append(step, metrics)
    book.close()


def lines(path: Path) -> list[dict[str, Any]]:
    """What stands, without the time it was written at."""
    return [{k: v for k, v in line.items() if k != "time"} for line in read(path)]


def test_a_line_a_step_with_its_time(path):
    before = time.time()
    write(path, (0, {"train/loss": 0.1, "lr/rest": 1e-4}), (10, {"train/loss": 1 / 3}))
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert list(first) == ["step", "time", "train/loss", "lr/rest"]
    assert second["train/loss"] == 1 / 3  # to the last bit
    assert before <= first["time"] <= second["time"] <= time.time()


@pytest.mark.parametrize(
    ("there", "left"),
    [
        (b"", b""),
        (b'{"step": 0}\n', b'{"step": 0}\n'),
        (b'{"step": 0}\n{"step": 1', b'{"step": 0}\n'),
        (b'{"step": 0}\n{"step": 1}', b'{"step": 0}\n'),
        (b'{"step": 0', b""),
        (b'{"a": 1}\n' + b"x" * 200_000, b'{"a": 1}\n'),
        (b"x" * 65536, b""),
        (b"\n" + b"x" * 65535, b"\n"),
        (b"\n" + b"x" * 65536, b"\n"),
    ],
)
def test_a_torn_last_line_is_cut(path, there, left):
    path.write_bytes(there)
    cut_torn_line(path)
    assert path.read_bytes() == left


def test_reading_leaves_a_torn_line_for_later_and_goes_on_from_an_offset(path):
    write(path, (0, {"a": 1.0}), (1, {"a": 2.0}))
    offset = path.read_bytes().index(b"\n") + 1
    with open(path, "ab") as file:
        file.write(b'{"step": 2')
    assert [line["step"] for line in read(path)] == [0, 1]
    assert [line["step"] for line in read(path, offset)] == [1]
    assert list(read(path.with_name("none"))) == []
    write(path, (2, {"a": 3.0}))  # the next writer cuts it
    assert [line["step"] for line in read(path)] == [0, 1, 2]


DAMAGED = [b'{"step": 1, "a', b"\0\0\0", b"\xff\xfe", b"[1]", b"{}", b"", b'{"step": "1"}']


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_line_is_skipped_and_reported_once(path, damaged, caplog):
    path.write_bytes(b'{"step": 0}\n' + damaged + b'\n{"step": 2}\n')
    with caplog.at_level(logging.WARNING, "atlas.record.journal"):
        assert [line["step"] for line in read(path)] == [0, 2]
        assert [line["step"] for line in read(path)] == [0, 2]
    assert len(caplog.records) == 1 and str(path) in caplog.text


@pytest.mark.parametrize("damaged", DAMAGED)
def test_an_offset_passes_a_damaged_last_line(path, damaged):
    path.write_bytes(b'{"step": 0}\n' + damaged + b"\n")
    found = list(read_lines(path))
    assert [line.entry for line in found] == [{"step": 0}, None]
    assert [line.end for line in found] == [12, path.stat().st_size]
    assert list(read_lines(path, found[-1].end)) == []


# (what stands, what is logged again from a step on, what is added, and the step, the key and both
# values of what differs: that alone is warned of)
LOSS, OTHER = {"train/loss": 0.5}, {"train/loss": 0.25}
VAL = {"val/loss": 0.7, "val/time_s": 1.5}
REPLAYS = {
    "the same": ([(0, LOSS), (1, OTHER)], 0, [(0, LOSS), (1, OTHER)], [], ()),
    "and then more": ([(0, LOSS), (1, OTHER)], 1, [(1, OTHER), (2, LOSS)], [(2, LOSS)], ()),
    "a difference": (
        [(0, LOSS), (1, LOSS)],
        0,
        [(0, LOSS), (1, OTHER)],
        [],
        (1, "train/loss", 0.25, 0.5),
    ),
    "the last bit": (
        [(0, {"a": 0.1})],
        0,
        [(0, {"a": 0.1 + 2**-56})],
        [],
        (0, "a", 0.1 + 2**-56, 0.1),
    ),
    "not a number": ([(0, {"a": float("nan")})], 0, [(0, {"a": float("nan")})], [], ()),
    "a new key": ([(0, LOSS)], 0, [(0, {**LOSS, "b": 1.0})], [(0, {"b": 1.0})], ()),
    "timings differ": (
        [(0, {**LOSS, "samples_per_s": 9.0, "step_time_ms": 3.0, "data_wait_share": 0.1})],
        0,
        [(0, {**LOSS, "samples_per_s": 8.0, "step_time_ms": 4.0, "data_wait_share": 0.2})],
        [],
        (),
    ),
    "train and val of a step": ([(5, VAL), (5, LOSS)], 5, [(5, VAL), (5, LOSS)], [], ()),
    "val differs": (
        [(5, VAL), (5, LOSS)],
        5,
        [(5, {"val/loss": 0.8}), (5, LOSS)],
        [],
        (5, "val/loss", 0.8, 0.7),
    ),
    "killed between val and train": ([(5, VAL)], 5, [(5, VAL), (5, LOSS)], [(5, LOSS)], ()),
    "killed before val": ([(5, LOSS)], 5, [(5, VAL), (5, LOSS)], [(5, VAL)], ()),
    "another log interval": ([(0, LOSS), (4, LOSS)], 0, [(2, OTHER), (4, LOSS)], [(2, OTHER)], ()),
    "nothing past the checkpoint": ([(0, LOSS)], 1, [(1, OTHER)], [(1, OTHER)], ()),
}


@pytest.mark.parametrize("case", REPLAYS)
def test_replay(path, caplog, case):
    standing, start, again, added, difference = REPLAYS[case]
    write(path, *standing)
    before = path.read_bytes()
    book = Journal(path)
    book.replay_from(start)
    with caplog.at_level(logging.WARNING, "atlas.record.journal"):
        for step, metrics in again:
            book.append(step, metrics)
    book.close()
    assert path.read_bytes().startswith(before)  # what stands is never touched
    assert lines(path)[len(standing) :] == [{"step": s, **metrics} for s, metrics in added]
    assert len(caplog.records) == bool(difference)
    for record in caplog.records:
        assert unnamed(record.getMessage(), *difference, "trainer.deterministic") == []


def test_replay_twice_adds_nothing(path):
    points = [(step, {"train/loss": step / 7, "step_time_ms": 1.0}) for step in range(20)]
    write(path, *points[:13])
    for start, stop in ((5, 16), (10, 20)):
        book = Journal(path)
        book.replay_from(start)
        for step, metrics in points[start:stop]:
            book.append(step, {**metrics, "step_time_ms": random.random()})
        book.close()
    assert [(line["step"], line["train/loss"]) for line in lines(path)] == [
        (step, metrics["train/loss"]) for step, metrics in points
    ]


def test_lines_are_kept_back_for_a_second_and_no_longer(path, monkeypatch):
    book = Journal(path)
    book.append(0, {"a": 1.0})
    assert path.read_bytes() == b""
    book.flush()
    assert len(lines(path)) == 1
    book.append(1, {"a": 1.0})
    monkeypatch.setattr(journal, "FLUSH_S", 0.0)
    book.append(2, {"a": 1.0})
    assert len(lines(path)) == 3
    book.close()


def test_who_may_not_write_does_not(path):
    def refuse() -> None:
        raise RunBusyError("taken over")

    book = Journal(path, before_write=refuse)
    book.append(0, {"a": 1.0})
    with pytest.raises(RunBusyError):
        book.flush()
    with pytest.raises(RunBusyError):
        book.close()
    assert path.read_bytes() == b""


WRITE = """
import sys
from pathlib import Path
from atlas.record import journal
path = Path(sys.argv[1])
book = journal.Journal(path)
stands = [line["step"] for line in journal.read(path)]
start = max(0, len(stands) - 50)
book.replay_from(start)
print("go", flush=True)
for step in range(start, 10**9):
    book.append(step, {"train/loss": step / 3, "pad": "x" * 200})
    if step % 37 == 0:
        book.flush()
"""


def test_killed_writers_leave_complete_lines_each_once(path):
    chance = random.Random(1)
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITE, str(path)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert child.stdout and child.stdout.readline() == b"go\n"
        time.sleep(chance.uniform(0.005, 0.05))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        for number, line in enumerate(lines(path)):
            assert line == {"step": number, "train/loss": number / 3, "pad": "x" * 200}
    assert number > 300
    cut_torn_line(path)
    assert path.read_bytes().endswith(b"\n")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_no_line_and_doubles_none(small_disk):
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 50_000)
    path = small_disk / "metrics.jsonl"
    book = Journal(path)
    with pytest.raises(AtlasError) as raised:
        for step in range(10_000):
            book.append(step, {"train/loss": step / 3, "pad": "x" * 50})
            if step % 17 == 0:
                book.flush()
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert unnamed(str(raised.value), path, "0.0 MB") == []
    stood = path.read_bytes()
    assert stood.endswith(b"\n") and 0 < len(lines(path)) < step + 1  # not even half a line
    filler.unlink()
    book.close()  # writes what was kept
    assert [line["step"] for line in lines(path)] == list(range(step + 1))
    assert path.read_bytes().startswith(stood)
