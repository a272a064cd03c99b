"""How much of a run's journal has been sent to MLflow."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from atlas.record import journal
from atlas.run.directory import Run
from atlas.system.files import write_json


@dataclass
class Cursor:
    """`mlflow.json`: where the points of a run go, and how far they have been sent.

    Only the shipper writes it, after every batch that MLflow has confirmed. A kill between the two
    leaves a cursor that is behind the store, never one that is ahead of it: the next shipper sends
    that batch again, and MLflow stores the same key, step, value and timestamp once.
    """

    uri: str = ""  # without credentials
    run_id: str | None = None
    experiment_id: str | None = None
    offset: int = 0  # bytes of metrics.jsonl that are in MLflow
    shipped: int = 0  # points in them
    refused: int = 0  # points among them that MLflow does not accept
    refusal: str | None = None  # why, for the last of those
    error: str | None = None  # why nothing can be sent at the moment
    updated: float = 0.0  # when this was written, in seconds since 1970
    uploaded: dict[str, str] = field(default_factory=dict)  # artifact: the version that was sent

    @classmethod
    def load(cls, run: Run) -> Cursor:
        """Return the cursor of `run`: one at the beginning if the file is missing or unreadable."""
        try:
            stored = json.loads(run.mlflow_file.read_text())
            return cls(**{f.name: stored[f.name] for f in fields(cls) if f.name in stored})
        except (FileNotFoundError, ValueError, TypeError):
            return cls()

    @classmethod
    def at(cls, run: Run, uri: str, again: bool) -> Cursor:
        """Return the cursor to send `run` to the store `uri` with.

        It is at the beginning for another store, for a journal that is shorter than what was sent
        (the run was started again in this directory), and with `again`.
        """
        cursor = cls.load(run)
        if cursor.uri != uri:
            cursor = cls(uri=uri)
        if again or cursor.offset > journal.size(run.journal_file):
            cursor.rewind()
        cursor.error = None
        return cursor

    def rewind(self) -> None:
        """Go back to the first line."""
        self.offset = self.shipped = self.refused = 0

    def points_left(self, run: Run) -> int:
        """Return how many points of the journal have not been sent."""
        return sum(len(points(line)) for line in journal.read(run.journal_file, self.offset))

    def save(self, run: Run) -> None:
        """Replace `mlflow.json`, atomically."""
        self.updated = round(time.time(), 3)
        write_json(run.mlflow_file, asdict(self))


@dataclass(frozen=True)
class Shipped:
    """What one sync of a run did: how much it sent, how much is missing, and why."""

    run: str  # its id
    sent: int
    left: int
    refused: int
    error: str | None
    run_id: str | None
    uri: str

    @classmethod
    def of(cls, run: Run, cursor: Cursor, sent: int, refused: int) -> Shipped:
        """Return the result of a sync that ends at `cursor`."""
        left = cursor.points_left(run)
        return cls(run.id, sent, left, refused, cursor.error, cursor.run_id, cursor.uri)

    @property
    def is_complete(self) -> bool:
        """Whether MLflow has all that it accepts."""
        return not (self.error or self.left)

    def __str__(self) -> str:
        text = (
            f"run {self.run}: {self.sent:,} points sent to MLflow run {self.run_id} at {self.uri}"
        )
        if self.refused:
            text += f"; {self.refused:,} were refused for good"
        if not self.is_complete:
            text += f"; {self.left:,} are missing: {self.error}"
        return text


def points(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics in a line of the journal: its numbers, without step and time."""
    return {
        key: float(value)
        for key, value in line.items()
        if key not in ("step", "time") and isinstance(value, int | float)
    }
