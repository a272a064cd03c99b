"""Checks that need the model and the data, made in a child process before a run is queued.

A wrong module path or a batch that does not fit the model would otherwise end a job after hours in
the queue. The launcher itself does not import torch, so a child process builds the model.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atlas.config.dotted import without
from atlas.errors import ConfigError
from atlas.system.files import digest_of_json, digest_of_parts, write_json
from atlas.version import ROOT

LIMIT_S = 600.0  # a child that takes longer is killed, and its configurations are not checked
# The part of a configuration that decides whether a model can be built and fed.
SECTIONS = ("model", "data", "optim")
WITHOUT = ("data.workers", "optim.lr", "optim.scale_lr", "optim.base_batch_size")
MOST_FILES = 2000  # of a folder that is not a project, such as a home, only so many are read
LIBRARIES = ("torch", "hydra-core", "omegaconf", "numpy", "transformers")


def preflight(configs: Sequence[Mapping[str, Any]], world_size: int) -> list[str]:
    """Raise `ConfigError` with everything that is wrong; return what could not be checked here.

    Configurations that are alike in what matters are checked once. A check that passed is stored
    below `outputs` and not repeated until the configuration or the code changes.
    """
    code = code_digest([ROOT / "atlas", *_user_folders()])
    distinct = {_digest(code, config): config for config in configs}
    found = {digest: _load(config, digest) for digest, config in distinct.items()}
    missing = [digest for digest, report in found.items() if report is None]
    if missing:
        reports = _ask_child([distinct[digest] for digest in missing], world_size)
        found.update(zip(missing, reports, strict=True))
    problems = [text for report in found.values() if report for text in report["problems"]]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    for digest in missing:
        _store(distinct[digest], digest, found[digest])
    notes = [text for report in found.values() if report for text in report["unchecked"]]
    return list(dict.fromkeys(notes))


def code_digest(folders: Sequence[Path]) -> str:
    """Return a digest of every Python file below `folders`; in git, of those that it does not ignore."""
    paths = (path for folder in folders for path in _sources(folder))
    return digest_of_parts(
        part for path in paths for part in (str(path).encode(), path.read_bytes())
    )


def _sources(folder: Path) -> list[Path]:
    listing = ["ls-files", "-co", "--exclude-standard", "-z", "--", "*.py"]
    command = ["git", "-C", str(folder), *listing]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return sorted(itertools.islice(folder.rglob("*.py"), MOST_FILES))
    names = done.stdout.decode().split("\0")
    return [path for name in sorted(set(names)) if name and (path := folder / name).is_file()]


def _user_folders() -> list[Path]:
    """Return the folders on `sys.path` with the user's own modules: neither Python's nor Atlas's."""
    installed = [Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]
    folders = [Path(entry).resolve() for entry in sys.path if entry and Path(entry).is_dir()]
    return [
        folder
        for folder in folders
        if folder not in (ROOT, ROOT / "launchers" / "plugins")
        and not any(folder.is_relative_to(root) for root in installed)
    ]


def _digest(code: str, config: Mapping[str, Any]) -> str:
    kept = without({section: config[section] for section in SECTIONS}, WITHOUT)
    if sharding := config["cluster"].get("sharding"):
        kept["sharding"] = sharding
    versions = [sys.version, *(_version(name) for name in LIBRARIES)]
    return digest_of_json([code, versions, kept])[:20]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _file(config: Mapping[str, Any], digest: str) -> Path:
    return Path(config["outputs"]) / ".preflight" / f"{digest}.json"


def _load(config: Mapping[str, Any], digest: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(_file(config, digest).read_text()))
    except (OSError, ValueError):
        return None


def _store(config: Mapping[str, Any], digest: str, report: Mapping[str, Any] | None) -> None:
    file = _file(config, digest)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, report)


def _ask_child(configs: Sequence[Mapping[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Return a report for each of `configs`: `{"problems": [...], "unchecked": [...]}`."""
    question = {"sys_path": sys.path, "world_size": world_size, "configs": list(configs)}
    # A login node's GPU, if it has one, is not the one that the run will use.
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "atlas.training.dry_run.preflight"],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            timeout=LIMIT_S,
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return _all_unchecked(configs, f"building the model took longer than {LIMIT_S:.0f} s")
    except ValueError:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return _all_unchecked(configs, f"the process that builds the model ended early: {last}")
    return list(answer)


def _all_unchecked(configs: Sequence[Mapping[str, Any]], why: str) -> list[dict[str, Any]]:
    return [{"problems": [], "unchecked": [f"model and data: {why}"]} for _ in configs]
