"""The names of a run in MLflow: of the run itself, its tags and its keys."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import platform
import posixpath
import re
from collections.abc import Mapping
from typing import Any

from atlas.config.dotted import flatten
from atlas.config.secrets import mask_uris
from atlas.run.directory import Run
from atlas.run.identity import frozen_identity, is_excluded
from atlas.run.status import State, Status
from atlas.version import __version__


def run_name(config: Mapping[str, Any]) -> str:
    """Return the id and the overrides that the id hashes: `4f2a… lr=0.001 seed=2`."""
    short = []
    for override in config["run"]["overrides"]:
        key, _, value = str(override).lstrip("+~").partition("=")
        if not is_excluded(key):
            short.append(f"{key.rpartition('.')[2]}={value}" if value else key)
    return mask_uris(" ".join([str(config["run"]["id"]), *short]))[:200]


def tags(run: Run, config: Mapping[str, Any], status: Status) -> dict[str, str]:
    """Return everything about a run that its id does not hash."""
    head = config["run"]
    code = status.git or head.get("code") or {}
    said = {
        **marks(config, status),
        "atlas.directory": run.path,
        "atlas.commit": code.get("commit"),
        "atlas.clean": code.get("clean"),
        "atlas.digest": code.get("digest"),
        "atlas.host": status.host,
        "atlas.launcher": status.launcher,
        "atlas.job_id": status.job_id,
        "atlas.world_size": status.world_size,
        "atlas.restarts": status.restarts,
        "atlas.command": status.command,
        "atlas.overrides": " ".join(map(str, head["overrides"])),
        **{f"atlas.{name}": version for name, version in _versions().items()},
        "mlflow.source.name": status.command,
        "mlflow.source.type": "LOCAL",
        "mlflow.user": _user(),
        "mlflow.source.git.commit": code.get("commit"),
    }
    excluded = _excluded(config)
    said.update({f"config.{key}": value for key, value in excluded.items()})
    known = {key: str(value) for key, value in said.items() if value is not None}
    return {**known, **_state_tags(run.judge_state(), status)}


def marks(config: Mapping[str, Any], status: Status) -> dict[str, str]:
    """Return the tags by which the MLflow run of a run is found.

    The id alone would also find the run of a colleague who typed the same command, on the same
    server, and an earlier run that `fresh=true` moved aside.
    """
    return {
        "atlas.run_id": str(config["run"]["id"]),
        "atlas.created": str(status.created),
    }


def valid_key(key: str) -> str:
    """Return `key` as MLflow accepts it: `lr/a[0]` becomes `lr/a.0`, other characters `_`."""
    key = re.sub(r"\[([^\[\]]*)\]", r".\1", key)
    key = re.sub(r"[^/\w.\- :]", "_", key)
    key = posixpath.normpath(key).lstrip("/")  # MLflow treats keys as paths
    key = re.sub(r"^\.+", "_", key)
    return key[:250] or "_"


def _state_tags(state: State | None, status: Status) -> dict[str, str]:
    return {"atlas.state": str(state), "atlas.reason": str(status.reason or "")}


def _excluded(config: Mapping[str, Any]) -> dict[str, Any]:
    hashed = flatten(frozen_identity(config))
    return {
        key: value
        for key, value in flatten({k: v for k, v in config.items() if k != "run"}).items()
        if key not in hashed and value is not None
    }


def _versions() -> dict[str, str]:
    found = {"version": __version__, "python": platform.python_version()}
    for name in ("torch", "mlflow"):  # read, not imported
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _user() -> str | None:
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        return getpass.getuser()
    return None
