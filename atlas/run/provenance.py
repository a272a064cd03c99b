"""Where a run comes from: what was typed, with which modules, and the version of the code."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas.config.secrets import mask_argument
from atlas.system.files import digest, digest_of_parts
from atlas.version import ROOT


@dataclass(frozen=True)
class Provenance:
    """What the user typed, and from where: kept with the run so that it can be typed again."""

    overrides: Sequence[str]
    sys_path: Sequence[str]  # folders of the user's own modules, absolute
    line: str  # the command line, with secrets masked
    code: Mapping[str, Any]  # see `code_version`
    sweep: str | None = None  # id of the sweep that the run is part of

    @classmethod
    def collect(cls, overrides: Sequence[str], sys_path: Sequence[str] = ()) -> Provenance:
        """Return the provenance of a run that this process was started for; asks git."""
        folders = [str(Path(entry).absolute()) for entry in sys_path]
        code = code_version(Path(folders[0]) if folders else ROOT)
        if folders:
            code["atlas"] = code_version(ROOT)["digest"]
        line = shlex.join(["python", *map(mask_argument, sys.orig_argv[1:])])
        return cls(list(overrides), folders, line, code)


def code_version(folder: Path) -> dict[str, Any]:
    """Return `{"commit", "clean", "digest"}` of the repository that contains `folder`.

    `digest` tells two versions apart: it covers the commit, the uncommitted changes and the names of
    untracked files. Outside a repository it covers the Python files below `folder` instead, and
    `commit` is None.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "clean": None, "digest": _digest(_sources(folder))}
    changes = _git(folder, "status", "--porcelain") or ""
    if not changes:
        return {"commit": commit, "clean": True, "digest": _digest([commit.encode()])}
    difference = _git(folder, "diff", "HEAD") or ""
    parts = [commit.encode(), changes.encode(), difference.encode()]
    return {"commit": commit, "clean": False, "digest": _digest(parts)}


def describe_code(version: Mapping[str, Any]) -> str:
    """Return a version of the code in words: its commit, and whether there were changes to it."""
    if not version.get("commit"):
        return f"no git, {version.get('digest')}"
    commit = f"commit {version['commit'][:10]}"
    return commit if version["clean"] else f"{commit} and uncommitted changes"


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def _sources(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.py"))]


def _digest(parts: list[bytes]) -> str:
    return digest_of_parts(bytes.fromhex(digest(part)) for part in parts)[:12]
