"""The cursor: how far the journal has been sent, also after what a kill or a user left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atlas.record.shipping.cursor import Cursor, Shipped, points
from atlas.run.directory import Run

LINE = b'{"step": 0, "time": 1.5, "a": 1.0, "b": 2.0}\n'
URI = "http://host:5000"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "demo" / "0123456789")
    run.path.mkdir(parents=True)
    return run


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"step": 3, "time": 1.5, "a": 1, "b": 0.5}, {"a": 1.0, "b": 0.5}),
        ({"step": 3, "a": None, "b": "text", "c": [1], "d": True}, {"d": 1.0}),
        ({"step": 3, "a": float("inf")}, {"a": float("inf")}),
        ({}, {}),
    ],
)
def test_points(line: dict[str, Any], expected: dict[str, float]) -> None:
    assert points(line) == expected


def test_a_cursor_is_what_was_saved(run: Run) -> None:
    cursor = Cursor(uri=URI, run_id="abc", offset=10, shipped=3, uploaded={"config.yaml": "7"})
    cursor.save(run)
    assert cursor.updated > 0 and Cursor.load(run) == cursor
    assert [path.name for path in run.path.iterdir()] == ["mlflow.json"]


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "null", '"text"'], ids=["missing", "empty", "torn", *"abc"]
)
def test_an_unreadable_file_is_a_cursor_at_the_beginning(run: Run, text: str | None) -> None:
    if text is not None:
        run.mlflow_file.write_text(text)
    assert Cursor.load(run) == Cursor()


def test_a_file_of_another_version_keeps_what_both_know(run: Run) -> None:
    run.mlflow_file.write_text(json.dumps({"offset": 7, "colour": "red"}))
    assert Cursor.load(run) == Cursor(offset=7)


# What is in mlflow.json, the address now, whether all is sent again: and the offset to start from.
STARTS = {
    "the same store": ({"uri": URI, "offset": 90}, URI, False, 90),
    "another store": ({"uri": URI, "offset": 90}, "http://other:5000", False, 0),
    "sent again": ({"uri": URI, "offset": 90}, URI, True, 0),
    "a journal that was started again": ({"uri": URI, "offset": 91}, URI, False, 0),
    "nothing sent": ({}, URI, False, 0),
}


@pytest.mark.parametrize("case", STARTS)
def test_where_a_sync_starts(run: Run, case: str) -> None:
    stored, uri, again, offset = STARTS[case]
    run.journal_file.write_bytes(2 * LINE)
    assert run.journal_file.stat().st_size == 90
    Cursor(**stored, shipped=4, refused=1, run_id="abc", error="down").save(run)
    cursor = Cursor.at(run, uri, again)
    assert (cursor.uri, cursor.offset, cursor.error) == (uri, offset, None)
    assert (cursor.shipped, cursor.refused) == ((4, 1) if offset else (0, 0))
    assert cursor.run_id == ("abc" if stored.get("uri") == uri else None)


@pytest.mark.parametrize(
    ("journal", "offset", "left"),
    [
        (b"", 0, 0),
        (None, 0, 0),
        (2 * LINE, 0, 4),
        (2 * LINE, len(LINE), 2),
        (2 * LINE, 2 * len(LINE), 0),
        (LINE + LINE[:-1], 0, 2),  # torn
        (LINE + b"damaged\n" + LINE, 0, 4),
    ],
)
def test_points_left(run: Run, journal: bytes | None, offset: int, left: int) -> None:
    if journal is not None:
        run.journal_file.write_bytes(journal)
    assert Cursor(offset=offset).points_left(run) == left


@pytest.mark.parametrize(
    ("offset", "error", "is_complete"),
    [(len(LINE), None, True), (0, None, False), (len(LINE), "down", False)],
)
def test_a_result_is_complete_if_nothing_is_missing_or_failed(
    run: Run, offset: int, error: str | None, is_complete: bool
) -> None:
    run.journal_file.write_bytes(LINE)
    cursor = Cursor(uri=URI, run_id="abc", offset=offset, error=error)
    shipped = Shipped.of(run, cursor, sent=1234, refused=0)
    assert shipped.is_complete is is_complete
    assert run.id in str(shipped) and "1,234" in str(shipped) and URI in str(shipped)
