"""A sweep: its file, its id, and the table of its runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from atlas.record.sweep import Sweep, score
from atlas.run.directory import Run
from atlas.run.provenance import Provenance

CONFIG: dict[str, Any] = {
    "name": "demo",
    "seed": 1,
    "objective": "val/loss",
    "optim": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "schedule": {"warmup": 5},
    "data": {"batch_size": 8},
    "trainer": {"steps": 100, "accumulate": 1},
}


def configuration(outputs: Path, lr: float = 1e-3, **changes: Any) -> dict[str, Any]:
    optim = {**CONFIG["optim"], "lr": lr}
    return {**CONFIG, "outputs": str(outputs), "optim": optim, **changes}


def make_run(outputs: Path, lr: float, *lines: dict[str, float], **status: Any) -> Run:
    config = configuration(outputs, lr)
    run = Run.locate(config, 1)
    run.create(config, 1, Provenance.collect([f"optim.lr={lr}"]))
    run.journal_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.update_status(**status)
    return run


def sweep_over(outputs: Path, *runs: Run, **changes: Any) -> Sweep:
    members = [(run, [f"optim.lr={n}"]) for n, run in enumerate(runs)]
    return Sweep.of(configuration(outputs, **changes), ["optim.lr"], members)


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({}, True),
        ({"lr": 0.5}, True),  # what is swept
        ({"outputs": "/elsewhere"}, True),
        ({"data": {"batch_size": 16}}, True),  # of the effective batch accumulate counts too
        ({"seed": 2}, False),
        ({"schedule": {"warmup": 6}}, False),
    ],
)
def test_the_id_names_what_is_not_swept(tmp_path, changes, is_same):
    outputs = Path(changes.pop("outputs", tmp_path))
    first = sweep_over(tmp_path)
    assert (sweep_over(outputs, **changes).id == first.id) is is_same
    other = Sweep.of(configuration(tmp_path), ["optim.lr", "seed"], [])
    assert other.id != first.id


def test_a_wider_grid_is_added_to_the_file(tmp_path):
    runs = [make_run(tmp_path, lr) for lr in (0.1, 0.2, 0.3)]
    first = sweep_over(tmp_path, *runs[:2])
    first.write()
    second = sweep_over(tmp_path, runs[2], runs[0])
    second.write()
    assert first.file == second.file == tmp_path / "demo" / "sweeps" / f"{first.id}.json"
    found = Sweep.read(first.file)
    assert list(found.members) == [run.id for run in runs]
    assert found.members[runs[0].id] == ["optim.lr=1"]  # as it was typed last
    assert [run.path for run, _ in found.runs()] == [run.path for run in runs]
    assert found.objective == "val/loss"


SCORES = {
    "the smallest": ("val/loss", [0.5, 0.25, 0.75], None, 0.25),
    "the largest, as its negative": ("-val/loss", [0.5, 0.25, 0.75], None, -0.75),
    "not a number": ("val/loss", [math.nan, 0.5, math.inf], None, 0.5),
    "nothing finite": ("val/loss", [math.nan], None, None),
    "not recorded": ("val/l1", [0.5], None, None),
    "the best of the status": ("val/loss", [0.5], {"metric": "val/loss", "value": 0.125}, 0.125),
    "the best of another": ("val/loss", [0.5], {"metric": "val/l1", "value": 0.125}, 0.5),
}


@pytest.mark.parametrize("case", SCORES)
def test_score(tmp_path, case):
    objective, values, best, expected = SCORES[case]
    lines = [{"step": step, "val/loss": value} for step, value in enumerate(values)]
    assert score(make_run(tmp_path, 0.1, *lines, best=best), objective) == expected


def test_the_table_is_sorted_and_names_what_failed(tmp_path):
    last = {"val/loss": 1.0}
    good = make_run(tmp_path, 0.1, {"step": 3, "val/loss": 0.25}, state="finished", last=last)
    fair = make_run(tmp_path, 0.2, {"step": 3, "val/loss": 0.5}, state="finished", step=4)
    bad = make_run(tmp_path, 0.3, state="failed", reason="NaN in update 2")
    queued = make_run(tmp_path, 0.4)
    sweep = sweep_over(tmp_path, bad, fair, queued, good)
    header, *rows = sweep.table().splitlines()
    assert header.split()[0] == "val/loss"
    assert [row.split()[0] for row in rows[:4]] == ["0.25", "0.5", "-", "-"]
    assert [row.split()[3] for row in rows[:2]] == [good.id, fair.id]
    assert rows[1].split()[1:3] == ["finished", "4"] and rows[1].endswith("optim.lr=1")
    assert bad.id in rows[4] and "NaN in update 2" in rows[4] and str(bad.logs) in rows[5]
    assert len(rows) == 6
    assert sweep.states() == {"failed": 1, "finished": 2, "queued": 1}
    assert sweep.scores() == {good.id: 0.25, fair.id: 0.5}


def test_an_objective_that_no_run_has_is_named_with_those_that_exist(tmp_path):
    run = make_run(tmp_path, 0.1, state="finished", last={"val/loss": 1.0, "train/loss": 2.0})
    line = sweep_over(tmp_path, run, objective="val/los").table().splitlines()[-1]
    assert "objective=val/los;" in line and "train/loss, val/loss" in line


@pytest.mark.parametrize(
    ("key", "is_swept"),
    [
        ("optim.lr", True),
        ("optim", True),
        ("optim@own.place", True),
        ("optim/lr", True),
        ("optim.lr.deeper", False),
        ("nothing.there", False),
    ],
)
def test_the_id_does_not_hold_what_a_key_of_the_command_line_sweeps(tmp_path, key, is_swept):
    first, second = (Sweep.of(configuration(tmp_path, lr), [key], []) for lr in (0.1, 0.2))
    assert (first.id == second.id) is is_swept
