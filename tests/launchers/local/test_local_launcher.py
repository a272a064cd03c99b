"""Sizes of the local launcher: ranks, slots and what is refused."""

from __future__ import annotations

import os

import pytest

from atlas.errors import ConfigError
from launchers.local.launcher import LocalLauncher, check_gpus


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("visible", "wanted", "device", "ranks"),
    [
        ("", "auto", "auto", 1),
        ("0,1", "auto", "auto", 2),
        ("0,1", "auto", "cuda", 2),
        ("0,1", "auto", "cpu", 1),
        ("0,1", 1, "cuda", 1),
        ("", 4, "cpu", 4),
    ],
)
def test_ranks(monkeypatch, visible, wanted, device, ranks):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    launcher = LocalLauncher(nproc_per_node=wanted, device=device)
    launcher.check()
    assert launcher.world_size == ranks


@pytest.mark.parametrize(
    ("settings", "visible", "key"),
    [
        ({"nodes": 2}, "", "cluster.nodes=2"),
        ({"device": "cuda"}, "", "cluster.device=cuda"),
        ({"nproc_per_node": 3}, "0,1", "cluster.nproc_per_node=3"),
        ({"required_gpus": 8}, "0,1", "cluster.required_gpus=8"),
    ],
)
def test_what_is_refused(monkeypatch, settings, visible, key):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=key):
        LocalLauncher(**settings).check()


@pytest.mark.parametrize(
    ("wanted", "device", "visible"),
    [(1, "cpu", ""), (8, "cpu", "0"), (8, "auto", ""), (2, "cuda", "0,1"), (1, "auto", "0,1")],
)
def test_what_fits(monkeypatch, wanted, device, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    check_gpus(wanted, device)


@pytest.mark.parametrize(
    ("settings", "visible", "at_once", "slots"),
    [
        ({"device": "cpu"}, "0,1", 3, [None] * 3),
        ({}, "", 2, [None] * 2),
        ({"nproc_per_node": 1}, "a,b,c", 9, [["a"], ["b"], ["c"]]),
        ({"nproc_per_node": 2}, "0,1,2,3,4", 9, [["0", "1"], ["2", "3"]]),
        ({}, "0,1", 9, [["0", "1"]]),
    ],
)
def test_slots(monkeypatch, settings, visible, at_once, slots):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert LocalLauncher(**settings)._slots(at_once) == slots
