"""Features that are computed once: right, shared, gone on with, and refused where they would lie."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="av is not installed (extra vla)")
pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra vla)")

from commands import ROOT, lines, only_run, train, unnamed
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from robot import LENGTHS, write_folder

from atlas.data.arrays import open_array
from atlas.data.lerobot.dataset import LeRobot
from atlas.data.tabletop import Tabletop
from atlas.errors import ConfigError
from atlas.models.vision import VisionTransformer
from atlas.training.dry_run import preflight
from atlas.training.feeding import features
from atlas.training.feeding.features import CachedFeatures, FeatureCache

torch.set_num_threads(1)

CPU = torch.device("cpu")
KEYS = ("data.cache_features=true", "data.cache_features=false")  # what is refused, and the remedy


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("made") / "robot")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATLAS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/features"


@pytest.fixture
def data(made: Path) -> Iterator[LeRobot]:
    open_array.cache_clear()
    yield LeRobot(made, val_episodes=1, image_size=[14, 14], horizon=4)


def vision(seed: int = 0, **options: Any) -> VisionTransformer:
    torch.manual_seed(seed)
    chosen = {"image_size": [14, 14], "width": 16, "dropout": 0.1} | options
    return VisionTransformer(**chosen).requires_grad_(False)


def cache(encoder: Any = None, **computed: str) -> FeatureCache:
    known = {"precision": "fp32", "device": "cpu"} | computed
    return FeatureCache(encoder or vision(), known, contextlib.nullcontext(), CPU)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.npy"))


def test_features_are_those_of_the_images(data: LeRobot, cache_folder: Path) -> None:
    kept = cache()
    kept.fill([data])
    cached = kept.over(data)
    ids = [3, 0, 15, 9]
    batch, plain = cached.batch(ids, seeds=[1, 2, 3, 4]), data.batch(ids)
    assert "images" not in batch
    for key in ("state", "actions", "action_mask", "instruction"):
        assert np.array_equal(batch[key], plain[key]), key
    expected = vision().eval().encode(plain["images"])
    assert batch["features"].dtype == torch.float16
    torch.testing.assert_close(batch["features"].float(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(cached[-1]["features"], cached.batch([15])["features"][0])
    assert (len(cached), cached.spec, cached.episodes) == (len(data), data.spec, data.episodes)
    assert len(files(cache_folder)) == 2, "an episode each"


def test_what_is_there_is_not_computed_again(
    data: LeRobot, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache().fill([data])
    monkeypatch.setattr(VisionTransformer, "encode", lambda *_: pytest.fail("computed again"))
    other = LeRobot(made, val_episodes=1, image_size=[14, 14], horizon=2, history=1)
    cache().fill([other])  # chunks are cut otherwise, the frames are the same


def test_an_interrupted_computation_goes_on(
    data: LeRobot, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = VisionTransformer.encode, 0

    def interrupted(self: Any, images: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(VisionTransformer, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache().fill([data])
    first = files(cache_folder)
    assert len(first) == 1
    before = first[0].stat().st_mtime_ns
    cache().fill([data])
    assert len(files(cache_folder)) == 2
    assert first[0].stat().st_mtime_ns == before
    assert calls == 3
    leftovers = [path.name for path in cache_folder.glob("*/*") if path.suffix in (".tmp", ".lock")]
    assert leftovers == []


def test_a_file_cut_short_is_made_again(data: LeRobot, cache_folder: Path) -> None:
    cache().fill([data])
    whole = [file.read_bytes() for file in files(cache_folder)]
    for file, content in zip(files(cache_folder), whole, strict=True):
        file.write_bytes(content[: len(content) // 2])
    cache().fill([data])
    assert [file.read_bytes() for file in files(cache_folder)] == whole


def test_several_processes_share_the_work(data: LeRobot, cache_folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=lambda: cache().fill([data])) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    assert len(files(cache_folder)) == 2
    assert list(cache_folder.glob("*/*.tmp")) == []


@pytest.mark.parametrize(
    "other",
    [
        lambda: cache(vision(seed=1)),
        lambda: cache(vision(heads=2)),
        lambda: cache(precision="bf16"),
        lambda: cache(device="cuda"),
    ],
)
def test_other_weights_or_ways_are_another_key(other: Any) -> None:
    assert other().folder != cache().folder
    assert cache().folder == cache().folder


def test_other_pixels_are_another_file(data: LeRobot, made: Path) -> None:
    kept = cache()
    for options in ({"image_size": [7, 14]}, {"cameras": ["top"]}, {"cameras": ["hand", "top"]}):
        chosen: dict[str, Any] = {"val_episodes": 1, "image_size": [14, 14]} | options
        other = LeRobot(made, **chosen)
        mine = {block.file for block in kept._blocks(data)}
        assert mine.isdisjoint(block.file for block in kept._blocks(other)), options


def test_bfloat16_weights_have_a_digest() -> None:
    half, whole = vision().bfloat16(), vision()
    assert features.weights_digest(half) != features.weights_digest(whole)
    assert features.weights_digest(half) == features.weights_digest(vision().bfloat16())


def test_what_float16_cannot_hold_is_refused(data: LeRobot) -> None:
    huge = vision()
    huge.norm.weight.fill_(1e6)
    with pytest.raises(ConfigError) as raised:
        cache(huge).fill([data])
    assert unnamed(str(raised.value), type(huge).__name__, "65504", *KEYS) == []


def test_no_room_is_said_before(data: LeRobot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "free_bytes", lambda _: 10)
    empty = cache()
    with pytest.raises(ConfigError) as raised:
        empty.fill([data])
    assert unnamed(str(raised.value), empty.folder, "0.0 GB", "ATLAS_CACHE", *KEYS) == []
    assert not files(empty.folder.parent)


class Blind(torch.nn.Module):
    """A model whose vision cannot be kept."""

    def __init__(self, part: Any = None) -> None:
        super().__init__()
        if part is not None:
            self.vision = part


@pytest.mark.parametrize(
    ("model", "options", "named"),
    [
        (Blind(), {}, ["Blind", "`vision`"]),
        (Blind(torch.nn.Linear(2, 2)), {}, ["vision", "encode", "fingerprint"]),
        (Blind(vision().requires_grad_(True)), {}, ["optim.lr_multipliers.vision=0"]),
        (Blind(vision()), {"augment": {"crop": 0.1, "except_for": []}}, ["data.augment.crop=0"]),
        (Blind(vision()), {"augment": {"crop": 0.1, "except_for": ["hand", "top"]}}, None),
        (Blind(vision()), {}, None),
    ],
)
def test_refusals(made: Path, model: Any, options: dict[str, Any], named: list[str] | None) -> None:
    data = LeRobot(made, val_episodes=1, **options)
    if named is None:
        features.check(model, [data])
        return
    with pytest.raises(ConfigError) as raised:
        features.check(model, [data])
    (problem,) = raised.value.problems
    assert unnamed(problem, *KEYS, *named) == []


def test_refusals_of_data() -> None:
    model = Blind(vision())
    for data, named in (
        ([1, 2], "list"),
        (Tabletop(episodes=2, augment=1), "data.train.augment=0"),
    ):
        with pytest.raises(ConfigError) as raised:
            features.check(model, [data])
        (problem,) = raised.value.problems
        assert unnamed(problem, *KEYS, named) == []


def test_a_queue_refuses_before_it_submits(made: Path) -> None:
    """What `preflight` tells before a job is queued."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        changes = ["data=lerobot", f"data.root={made}", "data.val_episodes=1"]
        changes += ["data.cache_features=true", "optim.lr_multipliers.vision=0.1"]
        config: Any = OmegaConf.to_container(compose("config", changes), resolve=True)
    (problem,) = preflight.check(config, 1).problems
    assert unnamed(problem, "data.cache_features=true", "optim.lr_multipliers.vision=0") == []
    config["optim"]["lr_multipliers"]["vision"] = 0
    assert preflight.check(config, 1).problems == []


def test_the_table_top() -> None:
    data = Tabletop(episodes=4, val_episodes=2)
    encoder = vision(image_size=data.spec["image_size"], resize=[14, 14])
    kept = cache(encoder)
    kept.fill([data])
    cached = kept.over(data)
    assert isinstance(cached, CachedFeatures)
    plain = encoder.encode(data.batch([1, 30])["images"])
    torch.testing.assert_close(
        cached.batch([1, 30])["features"].float(), plain, atol=1e-3, rtol=1e-3
    )


def test_a_run_is_the_same_with_and_without(made: Path, tmp_path: Path, cache_folder: Path) -> None:
    """20 updates agree within the rounding of float16, and the next run starts from the files."""
    shared = [
        "model=vla",
        "data=lerobot",
        f"data.root={made}",
        "data.val_episodes=1",
        "trainer.steps=20",
        "schedule.warmup=2",
        "trainer.log_interval=1",
        "trainer.accumulate=1",
        "tracking=none",
        "optim.lr=1e-3",
        "cluster.device=cpu",
    ]
    where = {"ATLAS_CACHE": str(cache_folder.parent)}
    found = {}
    for name, extra in (("without", []), ("with", ["data.cache_features=true"])):
        train(*shared, f"outputs={tmp_path / name}", *extra, **where)
        found[name] = lines(only_run(tmp_path / name) / "metrics.jsonl")
    for a, b in zip(found["without"], found["with"], strict=True):
        for key in ("train/loss", "val/loss", "grad_norm"):
            assert (key in a) == (key in b)
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=3e-3), (a["step"], key)
    assert any(a.get("train/loss") != b.get("train/loss") for a, b in zip(*found.values()))
    kept = {file: file.stat().st_mtime_ns for file in files(cache_folder)}
    assert len(kept) == len(LENGTHS)
    last = train(
        *shared,
        f"outputs={tmp_path / 'next'}",
        "data.cache_features=true",
        "optim.lr=2e-3",
        **where,
    )
    assert {file: file.stat().st_mtime_ns for file in files(cache_folder)} == kept
    assert last.returncode == 0
