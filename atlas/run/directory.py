"""A run: its directory and the files in it."""

from __future__ import annotations

import contextlib
import glob
import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from atlas.errors import AtlasError, RunBusyError
from atlas.run.identity import identity, run_id
from atlas.run.lock import Lock
from atlas.run.provenance import Provenance
from atlas.run.status import State, Status
from atlas.system.files import guarded, write_json, write_text


class Run:
    """One run, found by its directory.

    Properties are paths; what reads or writes a file is a method.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    @property
    def id(self) -> str:
        """The id, which is the name of the directory."""
        return self.path.name

    @property
    def config_file(self) -> Path:
        """The frozen configuration."""
        return self.path / "config.yaml"

    @property
    def status_file(self) -> Path:
        """The status; `atlas.run.status` has its fields."""
        return self.path / "status.json"

    @property
    def journal_file(self) -> Path:
        """The metrics, one line a step."""
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        """The sample ids of every update, if `trainer.log_samples` is on."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, each named by its number of updates."""
        return self.path / "checkpoints"

    def newest_step(self) -> int:
        """Return the number of updates in the newest checkpoint by its name, 0 without one."""
        return max(
            (int(p.name) for p in self.checkpoints.glob("[0-9]*") if p.name.isdigit()), default=0
        )

    @property
    def logs(self) -> Path:
        """The folder of logs: one a rank, and the failure record."""
        return self.path / "logs"

    @property
    def failure_file(self) -> Path:
        """The record that the first rank to fail in the last attempt wrote."""
        return self.logs / "failure.json"

    def read_failure(self) -> dict[str, Any] | None:
        """Return the record in `failure_file`, None if no rank has failed."""
        try:
            return dict(json.loads(self.failure_file.read_text()))
        except (FileNotFoundError, ValueError):
            return None

    @property
    def report_file(self) -> Path:
        """The figure that `atlas report` draws."""
        return self.path / "report.png"

    @property
    def evaluation_file(self) -> Path:
        """The results of `atlas evaluate`."""
        return self.path / "evaluation.json"

    @property
    def evaluation_picture(self) -> Path:
        """The figure of `atlas evaluate`."""
        return self.path / "evaluation.png"

    @property
    def mlflow_file(self) -> Path:
        """The MLflow run, and how much of the journal has been sent to it."""
        return self.path / "mlflow.json"

    @property
    def lock(self) -> Lock:
        """A new handle on the lock: release the one that you acquired."""
        return Lock(self.path / "lock.json")

    def exists(self) -> bool:
        """Return whether the run has been created."""
        return self.config_file.exists()

    def read_config(self) -> dict[str, Any]:
        """Return the frozen configuration as plain values; `run` is the head that Atlas added.

        Parsing takes milliseconds: read it once a process and pass it on. Raise `AtlasError` if the
        file is damaged.
        """
        try:
            with open(self.config_file) as file:
                found = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (yaml.YAMLError, UnicodeDecodeError):
            found = None
        if not isinstance(found, dict):
            raise AtlasError(
                f"{self.config_file} is damaged: it holds no configuration; the command that "
                "started the run writes it again"
            )
        return found

    def read_status(self) -> Status:
        """Return a snapshot of `status.json`; `Status()` if it is missing or a crash emptied it."""
        stored = self._stored_status()
        try:
            return Status.parse(stored)
        except ValueError as error:
            raise AtlasError(
                f"{self.status_file}: {error}; a newer Atlas may have written it"
            ) from error

    def judge_state(self) -> State | None:
        """Return the state as judged now: `running` without a live lock holder means killed."""
        recorded = self.read_status().state
        if recorded is State.RUNNING and self.lock.live_holder() is None:
            return State.KILLED
        return recorded

    def update_status(self, **changes: Any) -> None:
        """Write `changes` into `status.json`, atomically; the verbs are in `atlas.run.status`."""
        status = {**self._stored_status(), **changes, "updated": round(time.time(), 3)}
        with contextlib.suppress(FileNotFoundError, ValueError):  # missing or torn
            status["mlflow_run_id"] = json.loads(self.mlflow_file.read_text()).get("run_id")
        write_json(self.status_file, status)

    def _stored_status(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.status_file.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return {}

    @classmethod
    def locate(cls, config: Mapping[str, Any], world_size: int) -> Run:
        """Return the run of a resolved `config`, without a look at the disk."""
        name = run_id(identity(config, world_size))
        return cls(Path(config["outputs"]) / str(config["name"]) / name)

    @classmethod
    def find(cls, reference: str, outputs: str | Path) -> Run:
        """Return the run that `reference` names: a directory, an id, or its unique beginning.

        Raise `AtlasError` if it names no run below `outputs`, or several.
        """
        if (Path(reference) / "config.yaml").exists():
            return cls(reference)
        found = sorted(Path(outputs).glob(f"*/{glob.escape(reference)}*/config.yaml"))
        exact = [path for path in found if path.parent.name == reference]
        if len(exact or found) == 1:
            return cls((exact or found)[0].parent)
        what = "no run" if not found else f"{len(found)} runs"
        raise AtlasError(
            f"'{reference}' names {what} below {outputs}; give a run's directory or its whole id"
            + "".join(f"\n  {path.parent}" for path in found[:10])
        )

    def create(self, config: Mapping[str, Any], world_size: int, provenance: Provenance) -> None:
        """Create the directory, freeze `config` in it and write the first status.

        A run that exists keeps its status; only its frozen configuration is replaced, which can
        differ in what the id does not hash. Raise `RunBusyError` if a live process writes the run.
        """
        with guarded(self.path.parent):
            self.refuse_if_live()
            self.logs.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            write_text(self.config_file, self._frozen(config, world_size, provenance))
            if not self._stored_status():
                self.update_status(**self._first_status(config, world_size, provenance))

    def refuse_if_live(self) -> None:
        """Raise `RunBusyError` if another live process writes this run."""
        holder = self.lock.live_holder()
        if holder:
            raise RunBusyError(
                f"run {self.id} is already running: process {holder.pid} on {holder.host}"
                + (f", job {holder.job_id}" if holder.job_id else "")
                + f" ({self.path})"
            )

    def move_aside(self) -> Path | None:
        """Rename the directory to `<id>.old-N`, without deleting anything; return the new path."""
        with guarded(self.path.parent):
            if not self.path.exists():
                return None
            self.refuse_if_live()
            number = 1
            while (aside := self.path.with_name(f"{self.id}.old-{number}")).exists():
                number += 1
            self.path.rename(aside)
        return aside

    def _frozen(self, config: Mapping[str, Any], world_size: int, provenance: Provenance) -> str:
        head = {
            "id": self.id,
            "world_size": world_size,
            "overrides": list(provenance.overrides),
            "sweep": provenance.sweep,
            "command": provenance.line,
            "sys_path": list(provenance.sys_path),
            "code": dict(provenance.code),
        }
        body = {"run": head, **{k: v for k, v in config.items() if k != "run"}}
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        text = yaml.dump(body, Dumper=dumper, sort_keys=False, allow_unicode=True, width=100)
        return f"# Frozen configuration of Atlas run {self.id}; read it, do not edit it.\n{text}"

    def _first_status(
        self, config: Mapping[str, Any], world_size: int, provenance: Provenance
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": config["name"],
            "state": State.QUEUED,
            "reason": None,
            "step": 0,
            "steps": config["trainer"]["steps"],
            "best": None,
            "last": {},
            "restarts": 0,
            "world_size": world_size,
            "launcher": None,
            "host": socket.gethostname(),
            "pid": None,
            "job_id": None,
            "mlflow_run_id": None,
            "created": round(time.time(), 3),
            "command": provenance.line,
            "git": dict(provenance.code),
        }
