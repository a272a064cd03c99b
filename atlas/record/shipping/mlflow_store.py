"""The place of a run in an MLflow store; the only module that imports mlflow."""

from __future__ import annotations

import os
import posixpath
import re
import sys
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
from atlas.record.shipping.tags import marks, run_name, tags
from atlas.record.sweep import FOLDER, Sweep
from atlas.run.directory import Run
from atlas.run.status import State, Status
from atlas.run.summary import local_time
from atlas.system.files import atomic_path, guarded, locked

PARENT = "mlflow.parentRunId"  # what MLflow's own pages nest runs by
SWEEP = "atlas.sweep_id"
ENDED = {State.FINISHED: "FINISHED", State.FAILED: "FAILED", State.KILLED: "KILLED"}


class Store:
    """The place of one run in an MLflow store: its experiment and its MLflow run."""

    def __init__(self, uri: str, artifacts: str | None) -> None:
        self._artifacts = artifacts
        if uri.startswith("sqlite:///"):
            create_sqlite(Path(uri.removeprefix("sqlite:///")))
        self._client = MlflowClient(tracking_uri=uri)
        self._id = ""

    def open(self, run: Run, config: Mapping[str, Any], cursor: Cursor, live: bool) -> None:
        """Find the run's MLflow run or create it, and say in it what the run is."""
        status = run.read_status()
        found = self._recorded(cursor) or self._found_or_created(config, status)
        self._id = found.info.run_id
        if cursor.run_id != self._id:
            cursor.offset = cursor.shipped = cursor.refused = 0
            cursor.uploaded = {}
        cursor.run_id, cursor.experiment_id = self._id, found.info.experiment_id
        self._describe(found, run.read_identity(), tags(run, config, status))
        if live and found.info.status != "RUNNING":
            self._client.update_run(self._id, status="RUNNING")
        if sweep := sweep_of(run, config):
            parent = self._parent(sweep, found.info.experiment_id)
            if found.data.tags.get(PARENT) != parent:
                self._client.set_tag(self._id, PARENT, parent)

    def log(self, batch: list[Metric]) -> list[tuple[Metric, str]]:
        """Send at most 1000 points; returns those that MLflow refuses for good, and why.

        Raises when the store is the problem and not the points.
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
        """The frozen configuration, less credentials, where it is not there already."""
        version = _version(run.config_file)
        if cursor.uploaded.get("config.yaml") != version:
            self._client.log_text(self._id, mask_uris(run.config_file.read_text()), "config.yaml")
            cursor.uploaded["config.yaml"] = version

    def upload(self, path: Path, cursor: Cursor) -> None:
        """A file or a directory, where it exists and this version of it is not there already."""
        if not path.exists() or cursor.uploaded.get(path.name) == (version := _version(path)):
            return
        if path.is_dir():
            self._client.log_artifacts(self._id, str(path.resolve()), path.name)
        else:
            self._client.log_artifact(self._id, str(path))
        cursor.uploaded[path.name] = version

    def close(self, run: Run, config: Mapping[str, Any]) -> None:
        """Record the state that the run is in; one that can go on (preempted) stays RUNNING."""
        status, state = run.read_status(), run.judge_state()
        self._set_tags(tags(run, config, status))  # all: some are known only since the run started
        if state in ENDED:
            end = max((status.updated or 0.0), _last_written(run))
            self._client.set_terminated(self._id, ENDED[state], end_time=int(end * 1000))
        if sweep := sweep_of(run, config):
            found = self._client.get_run(self._id)
            self._summarise(sweep, self._parent(sweep, found.info.experiment_id))

    def _parent(self, sweep: Sweep, experiment: str) -> str:
        """The MLflow run that stands for a whole sweep; made by the first of its runs."""
        with guarded(sweep.file.parent):
            mark = f"tags.`{SWEEP}` = '{sweep.id}'"
            for found in self._client.search_runs([experiment], mark, max_results=1):
                return str(found.info.run_id)
            swept = sorted(
                {text.partition("=")[0] for own in sweep.members.values() for text in own}
            )
            name = f"sweep {sweep.id} {' '.join(swept)}"[:200]
            made = self._client.create_run(experiment, tags={SWEEP: sweep.id}, run_name=name)
            return str(made.info.run_id)

    def _summarise(self, sweep: Sweep, parent: str) -> None:
        """The sweep's table, how many of its runs stand how, and the best of them."""
        states, scores = sweep.states(), sweep.scores()
        now = int(time.time() * 1000)
        counts = {f"runs/{state}": float(number) for state, number in states.items()}
        entries = [Metric(key, value, now, 0) for key, value in counts.items()]
        tags = [RunTag("atlas.objective", sweep.objective)]
        if scores:
            best = min(scores, key=lambda run: scores[run])
            key = valid_key(f"best/{sweep.objective.removeprefix('-')}")
            entries.append(Metric(key, scores[best], now, 0))
            tags += [
                RunTag("atlas.best_run", best),
                RunTag("atlas.best_overrides", " ".join(sweep.members[best])),
            ]
        self._client.log_batch(parent, metrics=entries, tags=tags)
        self._client.log_text(parent, sweep.table() + "\n", "sweep.txt")
        going = sum(n for state, n in states.items() if state not in ENDED)
        self._client.update_run(parent, status="RUNNING" if going else "FINISHED")

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
        """The MLflow run that mlflow.json names, if the store still has it."""
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
        """The MLflow run of a shipper that was killed before it had written mlflow.json.

        Should a request have created a second one after its time-out, the empty one is deleted.
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
        """Params that are not there yet (one that is can't change) and tags that are new."""
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
        """Raise where not the point but the whole MLflow run is what the store refuses."""
        _active(self._client.get_run(self._id))

    def _refuses(self, error: MlflowException) -> bool:
        """Whether sending the same again would be refused again."""
        if error.error_code == "INVALID_PARAMETER_VALUE":
            return True
        rejected = re.search(r"error code (400|413|422) ", str(error))  # not from MLflow itself
        return bool(rejected)


def sweep_of(run: Run, config: Mapping[str, Any]) -> Sweep | None:
    """The sweep that `run` was started by, if it was."""
    name = config["run"].get("sweep")
    file = run.path.parent / FOLDER / f"{name}.json"
    return Sweep.read(file) if name and file.exists() else None


def tracking_uri(run: Run, config: Mapping[str, Any]) -> str:
    """Where the run is tracked: its configuration, the environment, what it used, the default.

    What it used counts for a server only, so that `atlas sync` finds it in a shell without the
    environment of the job.
    """
    used = Cursor.load(run).uri
    uri = config["tracking"].get("uri") or os.environ.get("MLFLOW_TRACKING_URI")
    uri = uri or (used if used.startswith("http") else None)
    if not uri:
        return f"sqlite:///{outputs(run) / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return str(uri)


def artifact_root(run: Run, uri: str, config: Mapping[str, Any]) -> str | None:
    """The artifact location of a new experiment; None leaves it to the server."""
    root = config["tracking"].get("artifact_root")
    if root is None and uri.startswith("sqlite:///"):
        root = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    if root is None:
        return None
    if "://" in str(root):
        return str(root)
    return Path(root).absolute().as_uri()


def outputs(run: Run) -> Path:
    """The directory that `<name>/<id>` is in."""
    return run.path.parent.parent


def create_sqlite(path: Path) -> None:
    """Make a new store of MLflow's at `path`, unless there is one.

    MLflow's migrations neither stand a second process beside them nor a kill: one process at a time
    makes the store under another name, and it gets its own once it is complete.
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
    """A line of the journal as MLflow's points; two keys never become one."""
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


def valid_key(key: str) -> str:
    """`key` as MLflow takes it: `lr/a[0]` becomes `lr/a.0`, other strange characters `_`."""
    key = re.sub(r"\[([^\[\]]*)\]", r".\1", key)
    key = re.sub(r"[^/\w.\- :]", "_", key)
    key = posixpath.normpath(key).lstrip("/")  # MLflow takes keys for paths
    key = re.sub(r"^\.+", "_", key)
    return key[:250] or "_"


def reason(error: BaseException) -> str:
    """An error of MLflow's, its server's or its database's in a few words, without credentials."""
    text = str(error)
    code = re.search(r"failed with error code (\d+)|too many (\d+) error responses", text)
    if code:
        return f"it answers with HTTP status {code[1] or code[2]}"
    short = re.search(r"\[Errno -?\d+\] ([^'\")\]]+)|(Read timed out)|(database is locked)", text)
    if short:
        return str(next(filter(None, short.groups())))
    first = text.strip().partition("\n")[0] or type(error).__name__
    return mask_uris(first if len(first) <= 300 else f"{first[:300]} …")


def say(text: str) -> None:
    """A line with the time, for sync.log or a terminal."""
    print(f"{local_time(time.time())} {mask_uris(text)}", file=sys.stderr, flush=True)


def _active(found: MlflowRun) -> MlflowRun:
    if found.info.lifecycle_stage == "deleted":
        raise AtlasError(
            f"MLflow run {found.info.run_id} was deleted in MLflow; restore it there, or remove "
            "the run's mlflow.json to send everything to a new one"
        )
    return found


def _version(path: Path) -> str:
    """What changes when the file, or a file in the directory, is written anew."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return " ".join(f"{file.stat().st_mtime_ns}" for file in files if file.is_file())


def _last_written(run: Run) -> float:
    return run.journal_file.stat().st_mtime if run.journal_file.exists() else 0.0
