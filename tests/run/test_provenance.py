"""Where a run comes from: git is asked when it is collected, and only then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from atlas.run import provenance as module
from atlas.run.provenance import Provenance, code_version, describe_code


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text("x = 1\n")
    return tmp_path


def git(folder: Path, *args: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *who, *args], check=True, capture_output=True)


def test_only_collect_asks_git(monkeypatch):
    asked: list[Path] = []

    def version(folder: Path) -> dict[str, str]:
        asked.append(folder)
        return {"digest": f"of {folder.name}"}

    monkeypatch.setattr(module, "code_version", version)
    Provenance([], [], "python train.py", {})
    assert not asked
    found = Provenance.collect(["a=1"], ["own"])
    assert asked == [Path("own").absolute(), module.ROOT]
    assert found.sys_path == [str(Path("own").absolute())] and found.overrides == ["a=1"]
    assert found.code == {"digest": "of own", "atlas": f"of {module.ROOT.name}"}


def test_the_command_line_hides_secrets(monkeypatch):
    secret = "tracking.uri=https://user:secret@host"
    monkeypatch.setattr(sys, "orig_argv", ["/bin/python3", "train.py", secret, "a b=1"])
    monkeypatch.setattr(module, "code_version", lambda folder: {})
    line = Provenance.collect([]).line
    assert line.startswith("python train.py ") and line.endswith(" 'a b=1'")
    assert "secret" not in line and "tracking.uri=***" in line


def test_a_version_by_commit_changes_and_files(repository):
    outside = code_version(repository)
    assert (outside["commit"], outside["clean"]) == (None, None)
    git(repository, "init")
    git(repository, "add", ".")
    git(repository, "commit", "-m", "one")
    clean = code_version(repository)
    assert clean["clean"] is True and len(clean["commit"]) == 40
    assert code_version(repository) == clean
    (repository / "model.py").write_text("x = 2\n")
    changed = code_version(repository)
    (repository / "more.py").touch()
    more = code_version(repository)
    assert changed["clean"] is more["clean"] is False
    assert clean["commit"] == changed["commit"] == more["commit"]
    assert len({found["digest"] for found in (outside, clean, changed, more)}) == 4


def test_a_version_outside_a_repository_follows_the_sources(repository):
    before = code_version(repository)
    (repository / "notes.txt").touch()
    assert code_version(repository) == before
    (repository / "model.py").write_text("x = 2\n")
    assert code_version(repository)["digest"] != before["digest"]


def test_in_words():
    assert "0123456789" in describe_code({"commit": "0123456789abcdef", "clean": True})
    changed = describe_code({"commit": "0123456789abcdef", "clean": False})
    assert "uncommitted" in changed
    assert "d1gest" in describe_code({"commit": None, "digest": "d1gest"})
