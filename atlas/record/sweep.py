"""A sweep: which runs it has, how they compare, and which of them failed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atlas.config.dotted import without
from atlas.record import journal
from atlas.run.directory import Run
from atlas.run.identity import identity
from atlas.run.status import State
from atlas.system.files import digest_of_json, guarded, write_json

FOLDER = "sweeps"


class Sweep:
    """The runs of one sweep, kept in `<outputs>/<name>/sweeps/<id>.json`.

    `members` are the ids of the runs, each with the overrides in which it differs from the others.
    A wider grid over the same keys is the same sweep: its runs are added to the file.
    """

    def __init__(self, file: Path, objective: str, members: Mapping[str, Sequence[str]]) -> None:
        self.file = file
        self.objective = objective
        self.members = {run: list(swept) for run, swept in members.items()}

    @property
    def id(self) -> str:
        """Ten characters: a digest of the keys and of the rest of the configuration."""
        return self.file.stem

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        keys: Sequence[str],
        members: Sequence[tuple[Run, Sequence[str]]],
    ) -> Sweep:
        """Return the sweep over `keys` that `config` belongs to."""
        # The names of the keys without their values, so that a wider grid has the same id.
        # An override of a config group, `data/augment@data.more=…`, sweeps all of that group.
        sections = [key.replace("/", ".").partition("@")[0] for key in keys]
        kept = without(identity(config, 1), [*sections, "effective_batch"])
        name = digest_of_json([sorted(keys), kept])[:10]
        file = Path(config["outputs"]) / str(config["name"]) / FOLDER / f"{name}.json"
        return cls(file, config["objective"], {run.id: swept for run, swept in members})

    @classmethod
    def read(cls, file: Path) -> Sweep:
        """Return the sweep that `file` holds."""
        data = json.loads(file.read_text())
        return cls(file, data["objective"], data["members"])

    def write(self) -> None:
        """Write the file, with the members that it has already."""
        with guarded(self.file.parent):
            if self.file.exists():
                self.members = {**self.read(self.file).members, **self.members}
            data = {"id": self.id, "objective": self.objective, "members": self.members}
            write_json(self.file, data)

    def runs(self) -> list[tuple[Run, list[str]]]:
        """Return every run with the overrides in which it differs."""
        folder = self.file.parent.parent
        return [(Run(folder / name), swept) for name, swept in self.members.items()]

    def states(self) -> dict[str, int]:
        """Return how many runs are in each state."""
        counted: dict[str, int] = {}
        for run, _ in self.runs():
            state = str(run.judge_state() or "unknown")
            counted[state] = counted.get(state, 0) + 1
        return counted

    def scores(self) -> dict[str, float]:
        """Return the objective of every run that has recorded it, by id."""
        values = {run.id: score(run, self.objective) for run, _ in self.runs()}
        return {name: value for name, value in values.items() if value is not None}

    def table(self) -> str:
        """Return all runs sorted by the objective, then every failure with error and logs."""
        rows, failures = [], []
        for run, swept in self.runs():
            state, status = run.judge_state(), run.read_status()
            value = score(run, self.objective)
            rows.append((value is None, value or 0.0, run.id, state, status, swept))
            if state is State.FAILED:
                failures.append(f"{run.id} failed: {status.reason}\n  logs {run.logs}")
        rows.sort(key=lambda row: row[:3])
        lines = [f"{self.objective:>12}  {'state':<10} {'step':>8}  {'run':<12} overrides"]
        for missing, value, name, state, status, swept in rows:
            shown = "-" if missing else f"{value:.6g}"
            said = str(state or "unknown")
            lines.append(f"{shown:>12}  {said:<10} {status.step:>8}  {name:<12} {' '.join(swept)}")
        return "\n".join([*lines, *failures, *self._unknown_objective()])

    def _unknown_objective(self) -> list[str]:
        """Return a line if runs have recorded metrics, but none of them the objective."""
        recorded = {key for run, _ in self.runs() for key in run.read_status().last}
        if not recorded or self.scores():
            return []
        return [
            f"no run has the metric of objective={self.objective}; recorded are: "
            f"{', '.join(sorted(recorded))}"
        ]


def score(run: Run, objective: str) -> float | None:
    """Return the best value of the metric `objective`, or None if the run has not recorded it.

    A smaller result is always better: `objective=-metric` names a metric of which more is better,
    and its score is the negative of the value.
    """
    best = run.read_status().best
    if best and best["metric"] == objective:
        return float(best["value"])
    sign, metric = (-1.0, objective[1:]) if objective.startswith("-") else (1.0, objective)
    values = [sign * line[metric] for line in journal.read(run.journal_file) if metric in line]
    return min(filter(math.isfinite, values), default=None)
