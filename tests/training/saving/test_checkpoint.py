"""Checkpoints: complete or not there, damage is noticed, and nothing in them is code."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import unnamed
from torch import nn

from atlas.errors import AtlasError
from atlas.training.saving.checkpoint import Checkpoints, averaged, load_weights


def state(step: int, frozen: bool = False) -> dict[str, Any]:
    """The state of a small training after `step` updates."""
    return {
        "format": 1,
        "step": step,
        "best": {"metric": "val/loss", "value": 0.5, "step": step},
        "model": {"head.weight": torch.full((4, 3), float(step)), "head.bias": torch.arange(4.0)},
        "frozen": frozen,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
        "ema": None,
        "spec": {"mean": [0.0, 1.0], "words": ["red", "ball"]},
    }


def saved(folder: Path, *steps: int, keep: int = 9, best: int | None = None) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, state(step), best)
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(checkpoints: Checkpoints) -> int | None:
    found = checkpoints.latest()
    if found is not None:
        assert torch.equal(found["model"]["head.weight"], torch.full((4, 3), float(found["step"])))
    return found and found["step"]


def test_what_was_saved_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None and checkpoints.best() is None
    assert checkpoints.save(7, state(7), None) == tmp_path / "00000007"
    read, wrote = checkpoints.latest(), state(7)
    assert read is not None and torch.equal(
        read["model"].pop("head.weight"), wrote["model"].pop("head.weight")
    )
    assert torch.equal(read["model"].pop("head.bias"), wrote["model"].pop("head.bias"))
    assert read == wrote


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    assert Checkpoints(tmp_path / "none").latest() is None


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 20)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip(file: Path) -> None:
    """One bit in the middle, in the numbers of a tensor or beside them."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def remove(file: Path) -> None:
    file.unlink()


DAMAGE = [truncate, empty, flip, remove]


@pytest.mark.parametrize("file", ["state.pt", "meta.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_the_one_before_taken(tmp_path, caplog, file, damage):
    checkpoints = saved(tmp_path, 1, 2, 3)
    damage(tmp_path / "00000003" / file)
    with caplog.at_level(logging.WARNING, "atlas"):
        assert newest(checkpoints) == 2
    (told,) = caplog.messages
    assert unnamed(told, tmp_path / "00000003") == []
    damage(tmp_path / "00000002" / file)
    damage(tmp_path / "00000001" / file)
    assert newest(checkpoints) is None


def test_every_byte_counts(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    file = tmp_path / "00000002" / "state.pt"
    whole = file.read_bytes()
    for at in random.Random(0).sample(range(len(whole)), 40):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert newest(checkpoints) == 1
    file.write_bytes(whole)
    assert newest(checkpoints) == 2


def test_repair_sets_damaged_ones_aside_so_that_good_ones_stay(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3, 4, keep=3)
    flip(tmp_path / "00000003" / "state.pt")
    remove(tmp_path / "00000004" / "meta.json")
    checkpoints.repair()
    assert names(tmp_path) == ["00000002", "damaged-00000003", "damaged-00000004"]
    for step in (3, 4):  # taken again; a second time of damage finds the name in use
        checkpoints.save(step, state(step), None)
    flip(tmp_path / "00000004" / "state.pt")
    checkpoints.repair()
    assert newest(checkpoints) == 3
    assert [path.name for path in checkpoints.steps()] == ["00000002", "00000003"]
    before = names(tmp_path)
    checkpoints.repair()
    assert names(tmp_path) == before


def test_repair_puts_back_what_was_being_replaced(tmp_path):
    checkpoints = saved(tmp_path, 1)
    (tmp_path / "00000001").rename(tmp_path / ".old-00000001")  # a kill between the two renames
    assert checkpoints.latest() is None
    checkpoints.repair()
    assert newest(checkpoints) == 1


def test_repair_clears_away_what_a_kill_left_half_done(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "00000002", tmp_path / ".tmp-00000003")
    shutil.copytree(tmp_path / "00000001", tmp_path / ".old-00000000")
    (tmp_path / ".old-00000000" / "meta.json").unlink()
    checkpoints.repair()
    assert names(tmp_path) == ["00000001", "00000002"]  # a checkpoint can be gigabytes


@pytest.mark.parametrize("repaired", [True, False])
def test_an_old_folder_that_a_kill_left_is_not_in_the_way(tmp_path, repaired):
    checkpoints = saved(tmp_path, 1, keep=1)
    # Killed when 1 had been replaced and the one before it was being removed.
    shutil.copytree(tmp_path / "00000001", tmp_path / ".old-00000001")
    (tmp_path / ".old-00000001" / "meta.json").unlink()
    if repaired:
        checkpoints.repair()
    checkpoints.save(2, state(2), None)
    assert [path.name for path in checkpoints.steps()] == ["00000002"] and newest(checkpoints) == 2


@pytest.mark.parametrize(
    ("keep", "bests", "left"),
    [
        (1, [None] * 4, ["00000004"]),
        (2, [None] * 4, ["00000003", "00000004"]),
        (9, [None] * 4, ["00000001", "00000002", "00000003", "00000004"]),
        (1, [1, 1, 1, 1], ["00000001", "00000004", "best"]),
        (2, [1, 2, 2, 2], ["00000002", "00000003", "00000004", "best"]),
        (1, [1, 2, 3, 4], ["00000004", "best"]),
        (2, [None, None, 3, 3], ["00000003", "00000004", "best"]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, bests, left):
    checkpoints = Checkpoints(tmp_path, keep)
    for step, best in enumerate(bests, start=1):
        checkpoints.save(step, state(step), best)
    assert names(tmp_path) == left
    assert newest(checkpoints) == 4
    found = checkpoints.best()
    assert found is not None and found["step"] == (bests[-1] or 4)


def test_best_is_a_link_that_stays_valid_when_the_run_moves(tmp_path):
    saved(tmp_path / "run", 1, 2, best=1)
    (tmp_path / "run").rename(tmp_path / "run.old-1")
    found = Checkpoints(tmp_path / "run.old-1").best()
    assert found is not None and found["step"] == 1
    assert os.readlink(tmp_path / "run.old-1" / "best") == "00000001"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_best_gives_the_newest(tmp_path, damage):
    checkpoints = saved(tmp_path, 1, 2, best=1)
    damage(tmp_path / "00000001" / "state.pt")
    found = checkpoints.best()
    assert found is not None and found["step"] == 2


def test_best_can_point_to_what_is_there_only(tmp_path):
    checkpoints = saved(tmp_path, 2)
    checkpoints.point_best(1)
    checkpoints.point_best(None)
    assert names(tmp_path) == ["00000002"]


def test_the_same_step_again_replaces_it(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    other = state(2)
    other["best"]["value"] = 0.25
    checkpoints.save(2, other, None)
    found = checkpoints.latest()
    assert found is not None and found["best"]["value"] == 0.25
    assert names(tmp_path) == ["00000001", "00000002"]


def test_frozen_tensors_are_stored_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    frozen = {"vision.weight": torch.randn(300, 300)}
    checkpoints.save_frozen(frozen)
    file = tmp_path / "frozen" / "state.pt"
    inode, size = file.stat().st_ino, file.stat().st_size
    for step in (1, 2, 3):
        checkpoints.save(step, state(step, frozen=True), None)
        checkpoints.save_frozen(frozen)
    assert file.stat().st_ino == inode
    sizes = [path.joinpath("state.pt").stat().st_size for path in checkpoints.steps()]
    assert max(sizes) < 10_000 < 360_000 < size
    found = checkpoints.latest()
    assert found is not None and torch.equal(
        found["model"]["vision.weight"], frozen["vision.weight"]
    )
    assert set(found["model"]) == {"vision.weight", "head.weight", "head.bias"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_frozen_tensors_are_an_error_that_names_them(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_frozen({"vision.weight": torch.ones(50)})
    checkpoints.save(1, state(1, frozen=True), None)
    damage(tmp_path / "frozen" / "state.pt")
    with pytest.raises(AtlasError) as raised:
        checkpoints.latest()
    assert unnamed(str(raised.value), tmp_path / "frozen", tmp_path / "00000001") == []
    checkpoints.save_frozen({"vision.weight": torch.ones(50)})  # they are a function of the seed
    assert checkpoints.latest() is not None


def test_another_model_is_an_error_that_lists_the_tensors():
    model = nn.ModuleDict({"head": nn.Linear(3, 4), "extra": nn.Linear(2, 2, bias=False)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = {"head.weight": torch.zeros(4, 5), "head.bias": torch.zeros(4), "old.x": torch.ones(1)}
    with pytest.raises(AtlasError) as raised:
        load_weights(model, other, "outputs/a/b")
    text = str(raised.value)
    assert unnamed(text, "outputs/a/b", "extra.weight", "old.x", "head.weight") == []
    (sizes,) = [line for line in text.splitlines() if "head.weight" in line]
    assert unnamed(sizes, "(4, 5)", "(4, 3)") == []
    assert "head.bias" not in text
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_many_tensors_that_differ_are_counted():
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(20))
    with pytest.raises(AtlasError) as raised:
        load_weights(layers, {}, "here")
    text = str(raised.value)
    assert text.count(".weight") + text.count(".bias") == 20 and unnamed(text, 20) == []


def test_averaged_weights_where_there_are_some():
    assert averaged({"model": {"a": 1, "b": 2}, "ema": None}) == {"a": 1, "b": 2}
    assert averaged({"model": {"a": 1, "b": 2}, "ema": {"a": 3}}) == {"a": 3, "b": 2}


def test_nothing_in_a_checkpoint_is_code(tmp_path):
    path = saved(tmp_path, 1).steps()[0] / "state.pt"
    assert torch.load(path, weights_only=True)["step"] == 1
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        wanted = [
            argument
            for code, argument, _ in pickletools.genops(archive.read(pickled))
            if code.name in ("GLOBAL", "STACK_GLOBAL", "INST")
        ]
    assert {str(name).split(".")[0].split()[0] for name in wanted} <= {"torch", "collections"}


def test_a_state_with_an_object_in_it_cannot_be_read_back(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {**state(1), "spec": Path("a")}, None)
    with pytest.raises(pickle.UnpicklingError):
        checkpoints.latest()


def test_a_full_disk_leaves_the_one_before(tmp_path):
    limit = 20_000
    checkpoints = saved(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(AtlasError) as raised:
            checkpoints.save(2, {**state(2), "big": torch.ones(limit)}, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert re.search(rf"{tmp_path}/\S*00000002\S*/state.pt.* \d+\.\d MB", str(raised.value))
    assert names(tmp_path) == ["00000001"] and newest(checkpoints) == 1


def save_for_ever(folder: Path, start: int, tell: Any) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    for step in range(start, 10**8):
        for _ in range(1 + step % 2):  # every other one is replaced, too
            checkpoints.save(
                step, {**state(step), "pad": torch.zeros(20_000)}, step - step % 5 or None
            )
        tell.send(step)


@pytest.mark.timeout(60)
def test_killed_while_saving_it_loads_all_the_same(tmp_path):
    fork = multiprocessing.get_context("fork")  # torch is there already
    chance = random.Random(0)
    told = 0
    for _ in range(10):
        mine, theirs = fork.Pipe(duplex=False)
        child = fork.Process(target=save_for_ever, args=(tmp_path, told + 1, theirs))
        child.start()
        theirs.close()
        told = mine.recv()
        time.sleep(chance.uniform(0.0, 0.03))
        child.kill()
        child.join()
        try:
            while True:
                told = mine.recv()
        except EOFError:
            pass
        checkpoints = Checkpoints(tmp_path, keep=2)
        found = newest(checkpoints)  # for a reader beside the run
        assert found is not None and found >= told - 1
        checkpoints.repair()  # for the process that goes on
        found = newest(checkpoints)
        assert found is not None and told <= found <= told + 1
        best = checkpoints.best()
        assert best is not None and best["step"] <= found
        told = found
    assert told >= 10
    json.loads((checkpoints.steps()[-1] / "meta.json").read_text())
