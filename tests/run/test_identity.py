"""The id of a run: what it depends on, and what it does not."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atlas.config.schema import EXCLUDED
from atlas.run.identity import effective_batch, identity, is_excluded, run_id

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = {
    "name": "golden",
    "seed": 0,
    "outputs": "outputs",
    "init_from": None,
    "resume": None,
    "fresh": False,
    "dry_run": False,
    "objective": "val/loss",
    "trainer": {
        "steps": 100,
        "accumulate": 4,
        "log_interval": 10,
        "log_samples": False,
        "save_interval": 50,
        "save_minutes": None,
        "keep": 2,
        "max_time": None,
        "progress": "auto",
        "clip_norm": 1.0,
        "ema": None,
        "val_interval": "auto",
        "precision": "fp32",
    },
    "optim": {"lr": 1e-3, "lr_multipliers": {"vision": 0, "head": 0.5}, "betas": [0.9, 0.95]},
    "schedule": {"_target_": "atlas.schedule.Cosine", "warmup": 10, "floor": 0.0},
    "data": {"batch_size": 8, "workers": 0, "root": "/data/a", "train": {"_target_": "own.Points"}},
    "model": {"_target_": "own.Net", "width": 16, "weights": None},
    "cluster": {"_target_": "launchers.local.LocalLauncher", "nodes": 1},
    "tracking": {"kind": "none", "uri": None},
}
# Runs that exist are found by this: if it changes, every one of them starts anew.
GOLDEN = "5a80303f7b"


def changed(**changes: Any) -> dict[str, Any]:
    """CONFIG with dotted keys (`__` for the dot) set."""
    config = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = config
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return config


def ident(config: dict[str, Any], world_size: int = 1) -> str:
    return run_id(identity(config, world_size))


def turned(node: Any) -> Any:
    """The same mapping with its keys in reverse order, at every level."""
    if isinstance(node, dict):
        return {key: turned(node[key]) for key in reversed(node)}
    return node


def test_golden_id():
    assert ident(CONFIG) == GOLDEN


def test_another_process_gives_the_same_id():
    code = f"from atlas.run.identity import *; print(run_id(identity({CONFIG!r}, 1)))"
    for hash_seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == GOLDEN


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"outputs": "/elsewhere"},
        {"objective": "val/success"},
        {"resume": "abc"},
        {"fresh": True},
        {"dry_run": True},
        {"cluster__nodes": 4},
        {"cluster__own": "partition"},
        {"tracking__kind": "mlflow"},
        {"data__workers": 4},
        {"trainer__log_interval": 1},
        {"trainer__log_samples": True},
        {"trainer__save_interval": None},
        {"trainer__save_minutes": 3},
        {"trainer__keep": 9},
        {"trainer__max_time": 30},
        {"trainer__progress": False},
        {"run": {"command": "python train.py"}},
        # the same numbers
        {"trainer__steps": 100.0},
        {"trainer__clip_norm": 1},
        {"schedule__floor": 0},
        {"optim__betas": (0.9, 0.95)},
        # a key that an upgrade brings defaults to null
        {"trainer__new_key": None},
        {"model__new": {"part": {"key": None}}},
        {"brand_new": None},
        {"model__empty": {}},
    ],
    ids=str,
)
def test_same_id(change):
    assert ident(changed(**change)) == GOLDEN


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"init_from": "0123456789"},
        {"trainer__steps": 101},
        {"trainer__ema": 0.999},
        {"trainer__clip_norm": None},
        {"trainer__clip_norm": 1.5},
        {"trainer__precision": "bf16"},
        {"optim__lr": 1.0000001e-3},
        {"optim__lr_multipliers": {"vision": 0, "head": 0.6}},
        {"optim__betas": [0.95, 0.9]},
        {"schedule__warmup": 11},
        {"data__root": "/data/b"},
        {"data__own": 3},
        {"model__width": 17},
        {"model__weights": "/weights.pt"},
        {"model__nodes": 1},
        {"own_section": {"key": 1}},
        {"data__batch_size": 16},
        # text is not the number it looks like, and false is not 0
        {"trainer__steps": "100"},
        {"optim__lr_multipliers": {"vision": False, "head": 0.5}},
    ],
    ids=str,
)
def test_another_id(change):
    assert ident(changed(**change)) != GOLDEN


def test_order_of_keys_does_not_matter():
    config = turned(CONFIG)
    assert list(config) != list(CONFIG) and ident(config) == GOLDEN


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulate", "same"),
    [
        (8, 1, 4, True),
        (8, 4, 1, True),
        (8, 2, 2, True),
        (32, 1, 1, True),
        (1, 8, 4, True),
        (8, 2, 4, False),
        (8, 8, 4, False),
        (8, 1, 3, False),
    ],
)
def test_only_the_effective_batch_counts(batch_size, world_size, accumulate, same):
    config = changed(data__batch_size=batch_size, trainer__accumulate=accumulate)
    assert effective_batch(config, world_size) == batch_size * world_size * accumulate
    assert (ident(config, world_size) == GOLDEN) is same


def test_identity_leaves_the_configuration_alone():
    config = copy.deepcopy(CONFIG)
    identity(config, 1)
    assert config == CONFIG


@pytest.mark.parametrize(
    ("key", "excluded"),
    [
        ("name", True),
        ("cluster", True),
        ("cluster.nodes", True),
        ("tracking.kind", True),
        ("data.workers", True),
        ("data", False),
        ("data.root", False),
        ("trainer", False),
        ("trainer.steps", False),
        ("model.cluster", False),
        ("names", False),
    ],
)
def test_is_excluded(key, excluded):
    assert is_excluded(key) is excluded


def test_what_changes_the_result_is_not_excluded():
    assert not EXCLUDED & {"seed", "init_from", "data", "model", "optim", "schedule", "trainer"}
