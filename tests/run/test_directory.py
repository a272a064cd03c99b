"""The directory of a run: its paths, what is frozen at its creation, and how it is found."""

from __future__ import annotations

import inspect
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import unnamed

from atlas.errors import AtlasError, RunBusyError
from atlas.run import status
from atlas.run.directory import Run
from atlas.run.identity import frozen_identity
from atlas.run.provenance import Provenance
from atlas.run.status import State

CODE = {"commit": "0" * 40, "clean": True, "digest": "0123456789ab"}


@pytest.fixture
def provenance() -> Provenance:
    return Provenance(["optim.lr=1e-3"], ["/own"], "python train.py optim.lr=1e-3", CODE)


@pytest.fixture
def config(tmp_path) -> dict[str, Any]:
    return {
        "name": "quick",
        "outputs": str(tmp_path),
        "data": {"batch_size": 8},
        "trainer": {"steps": 24, "accumulate": 1},
        "seed": 0,
    }


@pytest.fixture
def run(config, provenance) -> Run:
    made = Run.locate(config, world_size=2)
    made.create(config, 2, provenance)
    return made


def stored(run: Run) -> dict[str, Any]:
    return json.loads(run.status_file.read_text())


def test_properties_do_not_touch_the_disk(tmp_path, monkeypatch):
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("a property has touched the disk")

    run = Run(tmp_path / "run")
    for name in ("open", "stat", "mkdir", "read_text", "glob"):
        monkeypatch.setattr(Path, name, touched)
    monkeypatch.setattr("builtins.open", touched)
    names = [name for name, _ in inspect.getmembers(Run, lambda x: isinstance(x, property))]
    for name in names:
        getattr(run, name)
    monkeypatch.undo()
    assert len(names) > 5 and not list(tmp_path.iterdir())


def test_located_by_the_identity(config, tmp_path):
    run = Run.locate(config, world_size=2)
    assert run.path.parent == tmp_path / "quick" and len(run.id) == 10
    assert Run.locate({**config, "seed": 1}, 2).id != run.id
    assert Run.locate(config, 4).id != run.id  # another effective batch
    assert not run.exists() and not list(tmp_path.iterdir())


def test_what_is_created(run, config):
    assert run.exists() and run.logs.is_dir() and run.checkpoints.is_dir()
    frozen = run.read_config()
    assert list(frozen) == ["run", *config] and {**frozen, **config} == frozen
    assert frozen["run"] == {
        "id": run.id,
        "world_size": 2,
        "overrides": ["optim.lr=1e-3"],
        "sweep": None,
        "command": "python train.py optim.lr=1e-3",
        "sys_path": ["/own"],
        "code": CODE,
    }
    assert frozen_identity(frozen) == {"trainer": {"steps": 24}, "seed": 0, "effective_batch": 16}


def test_the_first_status_word_for_word(run):
    found = stored(run)
    assert found.pop("created") <= found.pop("updated")
    assert list(found.items()) == [
        ("id", run.id),
        ("name", "quick"),
        ("state", "queued"),
        ("reason", None),
        ("step", 0),
        ("steps", 24),
        ("best", None),
        ("last", {}),
        ("restarts", 0),
        ("world_size", 2),
        ("launcher", None),
        ("host", socket.gethostname()),
        ("pid", None),
        ("job_id", None),
        ("mlflow_run_id", None),
        ("command", "python train.py optim.lr=1e-3"),
        ("git", CODE),
    ]


def test_a_run_that_exists_keeps_its_status(run, config, provenance):
    status.end(run, State.KILLED, "stopped by SIGTERM", step=7)
    before = run.status_file.read_bytes()
    run.create({**config, "outputs": "elsewhere"}, 2, provenance)
    assert run.status_file.read_bytes() == before
    assert run.read_config()["outputs"] == "elsewhere"
    run.status_file.write_text("")  # as a crash of the machine can leave it
    run.create(config, 2, provenance)
    assert (stored(run)["state"], stored(run)["step"]) == ("queued", 0)


def test_a_live_run_is_neither_created_nor_moved(run, config, provenance):
    lock = run.lock
    lock.acquire()
    for act in (lambda: run.create(config, 2, provenance), run.move_aside, run.refuse_if_live):
        with pytest.raises(RunBusyError) as refused:
            act()
        named = (run.id, os.getpid(), socket.gethostname(), run.path)
        assert unnamed(str(refused.value), *named) == []
    lock.release()
    run.refuse_if_live()


def test_moved_aside_under_the_next_free_number(run, config, provenance):
    paths = []
    for _ in range(2):
        paths.append(run.move_aside())
        run.create(config, 2, provenance)
    assert [path.name for path in paths] == [f"{run.id}.old-1", f"{run.id}.old-2"]
    assert all((path / "config.yaml").exists() for path in paths)
    assert Run(run.path.with_name("missing")).move_aside() is None


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"text", b"\xff\xfe"])
def test_a_damaged_configuration_is_named(run, content):
    run.config_file.write_bytes(content)
    with pytest.raises(AtlasError) as damaged:
        run.read_config()
    assert unnamed(str(damaged.value), run.config_file) == []


@pytest.mark.parametrize("content", [None, "", "{", "null-ish"])
def test_no_failure_or_a_torn_one_is_none(run, content):
    if content is not None:
        run.failure_file.write_text(content)
    assert run.read_failure() is None


@pytest.mark.parametrize(
    ("names", "step"),
    [([], 0), (["20", "100"], 100), (["8", "best", "9.tmp", ".10"], 8), (["00000012"], 12)],
)
def test_the_newest_step_by_the_names_of_checkpoints(tmp_path, names, step):
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert Run(tmp_path).newest_step() == step


def test_found_by_path_id_and_unique_beginning(tmp_path):
    for name in ("a/0123456789", "a/01ff456789", "b/0123456789.old-1", "b/[0]1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    found = {
        str(tmp_path / "a/01ff456789"): "a/01ff456789",
        "01f": "a/01ff456789",
        "0123456789": "a/0123456789",  # the whole id, although another begins with it
        "[0]": "b/[0]1",
    }
    for reference, path in found.items():
        assert Run.find(reference, tmp_path).path == tmp_path / path
    for reference in ("01", "ff", "*", ""):
        with pytest.raises(AtlasError) as lost:
            Run.find(reference, tmp_path)
        assert unnamed(str(lost.value), f"'{reference}'", tmp_path) == []


@pytest.mark.parametrize(
    ("text", "expected"), [(None, None), ('{"run_id": "f00"}', "f00"), ("{", None), ("{}", None)]
)
def test_the_status_repeats_the_id_of_the_mlflow_run(run, text, expected):
    if text is not None:
        run.mlflow_file.write_text(text)
    run.update_status(step=3)
    assert (stored(run)["mlflow_run_id"], stored(run)["step"]) == (expected, 3)
    assert stored(run)["state"] == "queued"  # what was not changed stays


def test_the_frozen_file_is_plain_yaml_with_a_head(run):
    text = run.config_file.read_text()
    assert text.startswith("# Frozen configuration of Atlas run ")
    assert yaml.safe_load(text) == run.read_config()
