"""What of a run's journal is in MLflow."""

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
    """`mlflow.json`: where a run's points go and how far they got. Written by the shipper alone."""

    uri: str = ""  # without credentials
    run_id: str | None = None
    experiment_id: str | None = None
    offset: int = 0  # bytes of metrics.jsonl that are in MLflow
    shipped: int = 0  # points in them
    refused: int = 0  # points among them that MLflow would not take
    refusal: str | None = None  # why, for the last of those
    error: str | None = None  # why nothing can be sent at the moment
    updated: float = 0.0  # when this was written, in seconds since 1970
    uploaded: dict[str, str] = field(default_factory=dict)  # artifact: the version that is there

    @classmethod
    def load(cls, run: Run) -> Cursor:
        """What is recorded; an empty cursor where there is none, or none that can be read."""
        try:
            stored = json.loads(run.mlflow_file.read_text())
            return cls(**{f.name: stored[f.name] for f in fields(cls) if f.name in stored})
        except (FileNotFoundError, ValueError, TypeError):
            return cls()

    def save(self, run: Run) -> None:
        """Replace `mlflow.json`, atomically."""
        self.updated = round(time.time(), 3)
        write_json(run.mlflow_file, asdict(self))


def points(line: Mapping[str, Any]) -> dict[str, float]:
    """What of a journal's line is a metric: its numbers, less step and time."""
    return {
        key: float(value)
        for key, value in line.items()
        if key not in ("step", "time") and isinstance(value, int | float)
    }


def points_left(run: Run, cursor: Cursor) -> int:
    """How many points of the journal are not in MLflow."""
    return sum(len(points(line)) for line in journal.read(run.journal_file, cursor.offset))
