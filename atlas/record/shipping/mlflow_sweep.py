"""The MLflow run of a whole sweep, of which its runs are the children."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Metric, RunTag
from mlflow.tracking import MlflowClient

from atlas.record.shipping.tags import valid_key
from atlas.record.sweep import FOLDER, Sweep
from atlas.run.directory import Run
from atlas.run.status import State
from atlas.system.files import guarded

TAG = "atlas.sweep_id"
ENDED = {State.FINISHED: "FINISHED", State.FAILED: "FAILED", State.KILLED: "KILLED"}


class SweepRun:
    """The MLflow run of a sweep in an experiment, created by the first of its runs."""

    def __init__(self, client: MlflowClient, sweep: Sweep, experiment: str) -> None:
        self._client = client
        self._sweep = sweep
        self.id = self._found_or_created(experiment)

    def summarise(self) -> None:
        """Write the table, how many runs are in each state, and the best run."""
        states = self._sweep.states()
        now = int(time.time() * 1000)
        counts = [Metric(f"runs/{state}", float(n), now, 0) for state, n in states.items()]
        best, tags = self._best(now)
        self._client.log_batch(self.id, metrics=[*counts, *best], tags=tags)
        self._client.log_text(self.id, self._sweep.table() + "\n", "sweep.txt")
        unfinished = sum(n for state, n in states.items() if state not in ENDED)
        self._client.update_run(self.id, status="RUNNING" if unfinished else "FINISHED")

    def _best(self, now: int) -> tuple[list[Metric], list[RunTag]]:
        scores = self._sweep.scores()
        tags = [RunTag("atlas.objective", self._sweep.objective)]
        if not scores:
            return [], tags
        best = min(scores, key=lambda run: scores[run])
        overrides = " ".join(self._sweep.members[best])
        tags += [RunTag("atlas.best_run", best), RunTag("atlas.best_overrides", overrides)]
        key = valid_key(f"best/{self._sweep.objective.removeprefix('-')}")
        return [Metric(key, scores[best], now, 0)], tags

    def _found_or_created(self, experiment: str) -> str:
        with guarded(self._sweep.file.parent):  # of several runs at once, one creates it
            mark = f"tags.`{TAG}` = '{self._sweep.id}'"
            for found in self._client.search_runs([experiment], mark, max_results=1):
                return str(found.info.run_id)
            overrides = (text for texts in self._sweep.members.values() for text in texts)
            keys = sorted({text.partition("=")[0] for text in overrides})
            name = f"sweep {self._sweep.id} {' '.join(keys)}"[:200]
            made = self._client.create_run(experiment, tags={TAG: self._sweep.id}, run_name=name)
            return str(made.info.run_id)


def sweep_of(run: Run, config: Mapping[str, Any]) -> Sweep | None:
    """Return the sweep that started `run`, if one did."""
    name = config["run"].get("sweep")
    file = run.path.parent / FOLDER / f"{name}.json"
    return Sweep.read(file) if name and file.exists() else None
