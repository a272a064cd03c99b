"""Where a run is tracked: the address of the store and the place of its artifacts."""

from __future__ import annotations

import os
from pathlib import Path

from atlas.config.schema import TrackingSettings
from atlas.record.shipping.cursor import Cursor
from atlas.run.directory import Run

SQLITE = "sqlite:///"


def tracking_uri(run: Run, tracking: TrackingSettings) -> str:
    """Return the store: of the configuration, the environment, the last sync, or the default.

    The store of the last sync counts only if it is a server, so that `atlas sync` finds it from a
    shell without the environment of the job.
    """
    used = Cursor.load(run).uri
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    uri = uri or (used if used.startswith("http") else None)
    if not uri:
        return f"{SQLITE}{outputs(run) / 'mlflow.db'}"
    if uri.startswith(SQLITE):
        return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"
    return uri


def artifact_root(uri: str, tracking: TrackingSettings) -> str | None:
    """Return the artifact location of a new experiment; None leaves the choice to the server."""
    root = tracking.artifact_root
    if root is None and uri.startswith(SQLITE):
        root = str(Path(uri.removeprefix(SQLITE)).parent / "mlartifacts")
    if root is None or "://" in root:
        return root
    return Path(root).absolute().as_uri()


def outputs(run: Run) -> Path:
    """Return the directory that contains `<name>/<id>`."""
    return run.path.parent.parent
