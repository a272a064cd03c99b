"""The place of a run in an MLflow store."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from atlas.config.dotted import flatten
from atlas.config.secrets import mask_uris
from atlas.errors import AtlasError
from atlas.record.shipping.cursor import Cursor, points
from atlas.record.shipping.log import reason, say
from atlas.record.shipping.mlflow_sweep import ENDED, SweepRun, sweep_of
from atlas.record.shipping.tags import marks, run_name, tags, valid_key
from atlas.run.directory import Run
from atlas.run.identity import frozen_identity
from atlas.run.status import Status
from atlas.system.files import atomic_path, locked

PARENT = "mlflow.parentRunId"  # the tag by which MLflow's pages nest runs


class Store:
    """The place of one run in an MLflow store: its experiment and its MLflow run."""

    def __init__(self, uri: str, artifacts: str | None) -> None:
        self._artifacts = artifacts
        if uri.startswith("sqlite:///"):
            create_sqlite(Path(uri.removeprefix("sqlite:///")))
        self._client = MlflowClient(tracking_uri=uri)
        self._id = ""

    def open(self, run: Run, config: Mapping[str, Any], cursor: Cursor, is_running: bool) -> None:
        """Find the run's MLflow run or create it, and write its params and tags.

        In another MLflow run than the cursor names, nothing of the journal has been sent.
        """
        status = run.read_status()
        found = self._recorded(cursor) or self._found_or_created(config, status)
        self._id = found.info.run_id
        if cursor.run_id != self._id:
            cursor.rewind()
            cursor.uploaded = {}
        cursor.run_id, cursor.experiment_id = self._id, found.info.experiment_id
        self._describe(found, frozen_identity(config), tags(run, config, status))
        if is_running and found.info.status != "RUNNING":
            self._client.update_run(self._id, status="RUNNING")
        if sweep := sweep_of(run, config):
            parent = SweepRun(self._client, sweep, found.info.experiment_id).id
            if found.data.tags.get(PARENT) != parent:
                self._client.set_tag(self._id, PARENT, parent)

    def log(self, batch: list[Metric]) -> list[tuple[Metric, str]]:
        """Send at most 1000 points; return those that MLflow refuses for good, and why.

        MLflow refuses a batch as a whole, so a refused one is halved until the points that are at
        fault are alone. Raise if the store is the problem and not the points.
        """
        if not batch:
            return []
        try:
            self._client.log_batch(self._id, metrics=batch, synchronous=True)
            return []
        except MlflowException as error:
            if not self._refuses(error):
                raise
            if len(batch) > 1:
                half = len(batch) // 2
                return self.log(batch[:half]) + self.log(batch[half:])
            self._check_active()
            return [(batch[0], reason(error))]

    def upload_config(self, run: Run, cursor: Cursor) -> None:
        """Upload the frozen configuration without credentials, unless this version was uploaded."""
        version = _version(run.config_file)
        if cursor.uploaded.get("config.yaml") != version:
            self._client.log_text(self._id, mask_uris(run.config_file.read_text()), "config.yaml")
            cursor.uploaded["config.yaml"] = version

    def upload(self, path: Path, cursor: Cursor) -> None:
        """Upload a file or a directory if it exists, unless this version of it was uploaded."""
        if not path.exists() or cursor.uploaded.get(path.name) == (version := _version(path)):
            return
        if path.is_dir():
            self._client.log_artifacts(self._id, str(path.resolve()), path.name)
        else:
            self._client.log_artifact(self._id, str(path))
        cursor.uploaded[path.name] = version

    def close(self, run: Run, config: Mapping[str, Any]) -> None:
        """Write the state of the run; one that will be resumed (preempted) stays RUNNING."""
        status, state = run.read_status(), run.judge_state()
        self._set_tags(tags(run, config, status))  # all: some are known only after the start
        if state in ENDED:
            end = max(status.updated or 0.0, _last_written(run))
            self._client.set_terminated(self._id, ENDED[state], end_time=int(end * 1000))
        if sweep := sweep_of(run, config):
            found = self._client.get_run(self._id)
            SweepRun(self._client, sweep, found.info.experiment_id).summarise()

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, self._artifacts))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self._client.get_experiment_by_name(name)  # another run was faster
        if found is None or found.lifecycle_stage == "deleted":
            raise AtlasError(
                f"the experiment '{name}' was deleted in MLflow; restore it there, "
                "or give the run another `name`"
            )
        return str(found.experiment_id)

    def _recorded(self, cursor: Cursor) -> MlflowRun | None:
        """Return the MLflow run that mlflow.json names, if the store still has it."""
        if not cursor.run_id:
            return None
        try:
            found = self._client.get_run(cursor.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return _active(found)

    def _found_or_created(self, config: Mapping[str, Any], status: Status) -> MlflowRun:
        experiment = self._experiment(str(config["name"]))
        return self._tagged(experiment, config, status) or self._client.create_run(
            experiment,
            start_time=int((status.created or time.time()) * 1000),
            tags=marks(config, status),
            run_name=run_name(config),
        )

    def _tagged(
        self, experiment: str, config: Mapping[str, Any], status: Status
    ) -> MlflowRun | None:
        """Return the MLflow run of a shipper that was killed before it wrote mlflow.json.

        A request that timed out may have created one too. Of two, the empty one is deleted.
        """
        marked = " and ".join(f"tags.`{k}` = '{v}'" for k, v in marks(config, status).items())
        found = sorted(
            self._client.search_runs([experiment], marked),
            key=lambda each: (-len(each.data.metrics), each.info.run_id),
        )
        for extra in found[1:]:
            if not extra.data.metrics:
                self._client.delete_run(extra.info.run_id)
        return found[0] if found else None

    def _describe(
        self, found: MlflowRun, identity: Mapping[str, Any], tags: Mapping[str, str]
    ) -> None:
        """Write params that are missing (an existing one can't change) and tags that changed."""
        params = {valid_key(key): str(value)[:6000] for key, value in flatten(identity).items()}
        missing = [Param(k, v) for k, v in params.items() if k not in found.data.params]
        for at in range(0, len(missing), 100):
            self._log_params(missing[at : at + 100])
        self._set_tags({k: v for k, v in tags.items() if found.data.tags.get(k) != v})

    def _log_params(self, params: list[Param]) -> None:
        try:
            self._client.log_batch(self._id, params=params)
        except MlflowException as error:
            if not self._refuses(error):
                raise
            if len(params) == 1:
                say(f"MLflow refused the param {params[0].key}: {reason(error)}")
                return
            for param in params:
                self._log_params([param])

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        entries = [RunTag(valid_key(k), mask_uris(v)[:5000]) for k, v in tags.items()]
        for at in range(0, len(entries), 100):
            self._client.log_batch(self._id, tags=entries[at : at + 100])

    def _check_active(self) -> None:
        """Raise if the store refuses the whole MLflow run and not the point."""
        _active(self._client.get_run(self._id))

    def _refuses(self, error: MlflowException) -> bool:
        """Return whether sending the same again would be refused again."""
        if error.error_code == "INVALID_PARAMETER_VALUE":
            return True
        rejected = re.search(
            r"error code (400|413|422) ", str(error)
        )  # from a proxy in front of MLflow
        return bool(rejected)


def create_sqlite(path: Path) -> None:
    """Create an MLflow store at `path` unless it exists.

    MLflow's migrations survive neither a second process nor a kill. So one process at a time
    creates the store, and under a temporary name, which it loses when it is complete.
    """
    if path.exists() and path.stat().st_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        if path.exists() and path.stat().st_size:
            return
        with atomic_path(path, f".{path.name}.new") as new:
            MlflowClient(tracking_uri=f"sqlite:///{new}").search_experiments(max_results=1)


def metrics(line: Mapping[str, Any]) -> list[Metric]:
    """Return a line of the journal as points of MLflow; two keys never become one."""
    if not isinstance(line.get("step"), int) or not isinstance(line.get("time"), int | float):
        return []
    named: dict[str, float] = {}
    for key, value in points(line).items():
        name = valid_key(key)
        while name in named:
            name += "_"
        named[name] = value
    timestamp = int(line["time"] * 1000)
    return [Metric(name, value, timestamp, line["step"]) for name, value in named.items()]


def _active(found: MlflowRun) -> MlflowRun:
    if found.info.lifecycle_stage == "deleted":
        raise AtlasError(
            f"MLflow run {found.info.run_id} was deleted in MLflow; restore it there, or remove "
            "the run's mlflow.json to send everything to a new one"
        )
    return found


def _version(path: Path) -> str:
    """Return a text that changes when the file, or a file in the directory, is written again."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return " ".join(f"{file.stat().st_mtime_ns}" for file in files if file.is_file())


def _last_written(run: Run) -> float:
    return run.journal_file.stat().st_mtime if run.journal_file.exists() else 0.0
