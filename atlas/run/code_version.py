"""The state of the code that a run runs: git commit, and whether the tree was clean."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from atlas.system.files import digest, digest_of_parts


def code_state(folder: Path) -> dict[str, Any]:
    """`{"commit", "clean", "digest"}` of the repository that `folder` is in.

    `digest` tells two states apart: it covers the commit, the uncommitted difference and the names
    of untracked files. Outside a repository it covers the Python files below `folder` instead, and
    `commit` is None.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "clean": None, "digest": _digest(_sources(folder))}
    status = _git(folder, "status", "--porcelain") or ""
    if not status:
        return {"commit": commit, "clean": True, "digest": _digest([commit.encode()])}
    difference = _git(folder, "diff", "HEAD") or ""
    parts = [commit.encode(), status.encode(), difference.encode()]
    return {"commit": commit, "clean": False, "digest": _digest(parts)}


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
