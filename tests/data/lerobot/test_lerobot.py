"""The reader of LeRobot folders, on tiny folders made here and, where it is there, a real one."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import unnamed
from torch import nn

av = pytest.importorskip("av", reason="av is not installed (extra vla)")
pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra vla)")

from robot import (  # noqa: E402
    FPS,
    LENGTHS,
    TASKS,
    columns,
    cut,
    edit_info,
    grey,
    open_split,
    states,
    unlink,
    write_folder,
    write_table,
    write_v3,
    write_video,
)

from atlas.data.arrays import open_array  # noqa: E402
from atlas.data.augment import Augment  # noqa: E402
from atlas.data.lerobot.dataset import LeRobot  # noqa: E402
from atlas.data.lerobot.video import Video  # noqa: E402
from atlas.errors import ConfigError  # noqa: E402
from atlas.training.build import doubts  # noqa: E402
from atlas.training.parts import Parts  # noqa: E402

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("made") / "robot")


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own to spoil, and an empty frame cache beside it."""
    monkeypatch.setenv("ATLAS_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(made, tmp_path / "robot")


@pytest.mark.parametrize(
    ("index", "episode", "past", "future", "valid"),
    [
        (0, 0, [0, 0, 0], [0, 1, 2, 3], 4),
        (1, 0, [0, 0, 1], [1, 2, 3, 4], 4),
        (5, 0, [3, 4, 5], [5, 6, 7, 8], 4),
        (6, 0, [4, 5, 6], [6, 7, 8, 8], 3),
        (8, 0, [6, 7, 8], [8, 8, 8, 8], 1),
        (9, 1, [0, 0, 0], [0, 1, 2, 3], 4),
        (15, 1, [4, 5, 6], [6, 6, 6, 6], 1),
        (-1, 1, [4, 5, 6], [6, 6, 6, 6], 1),
    ],
)
def test_sample(
    root: Path, index: int, episode: int, past: list[int], future: list[int], valid: int
) -> None:
    sample = open_split(root)[index]
    rows = states(episode, LENGTHS[episode])
    assert sample["state"].dtype == sample["actions"].dtype == torch.float32
    np.testing.assert_array_equal(sample["state"], rows[past])
    np.testing.assert_array_equal(sample["actions"], rows[future] + np.float32(0.5))
    assert sample["action_mask"].tolist() == [i < valid for i in range(4)]
    assert sample["instruction"] == TASKS[episode]
    assert sample["images"].shape == (2, 3, 12, 16)
    assert sample["images"].dtype == torch.uint8
    for view, darker in ((0, 0), (1, 6)):
        expected = grey(episode, past[-1]) - darker
        assert abs(sample["images"][view].float() - expected).max() < 4, "another frame or camera"


def test_batch_is_the_samples_collated(root: Path) -> None:
    data = open_split(root, cameras=["hand"])
    ids = [11, 0, 0, 8]
    batch = data.batch(ids, seeds=[1, 2, 3, 4])
    assert batch["images"].shape == (4, 1, 3, 12, 16)
    for position, index in enumerate(ids):
        for key, value in data[index].items():
            assert (
                batch[key][position] == value
                if key == "instruction"
                else torch.equal(batch[key][position], value)
            )
    with pytest.raises(IndexError):
        data[len(data)]


@pytest.mark.parametrize(
    ("lead", "options", "offset", "samples", "first"),
    [
        (0.5, {}, 0, 16, 0.5),
        (0.0, {}, 1, 14, 1.0),
        (0.5, {"action_key": None}, 1, 14, 1.0),
        (0.0, {"action_offset": 0}, 0, 16, 0.0),
        (0.5, {"action_offset": 2}, 2, 12, 2.5),
    ],
)
def test_first_target(
    tmp_path: Path, lead: float, options: dict[str, Any], offset: int, samples: int, first: float
) -> None:
    data = open_split(write_folder(tmp_path / "robot", lead=lead), **options)
    assert (data.action_offset, len(data)) == (offset, samples)
    _, actions, mask = data._rows.vectors(data._rows.samples)
    assert actions[0, 0, 0] == first
    assert mask[:, 0].all(), "a sample without a target"


@pytest.mark.parametrize(
    ("val_episodes", "train", "val"), [(1, [0, 1], [2]), (2, [0], [1, 2]), (0, [0, 1, 2], None)]
)
def test_split_is_by_episode(
    root: Path, val_episodes: int, train: list[int], val: list[int] | None
) -> None:
    assert open_split(root, val_episodes=val_episodes).episodes == train
    if val is None:
        with pytest.raises(ConfigError) as raised:
            open_split(root, "val", val_episodes=val_episodes)
        assert (
            unnamed(str(raised.value), "data.val_episodes=0", 3, f"data.root={root}", "val") == []
        )
    else:
        assert open_split(root, "val", val_episodes=val_episodes).episodes == val


def test_missing_episodes_are_counted_and_left_out(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "videos/hand/000-000001.mp4").unlink()
    with caplog.at_level(logging.WARNING, logger="atlas"):
        train, val = open_split(root), open_split(root, "val")
    assert (train.episodes, val.episodes, train.missing) == ([0], [2], [1])
    (told,) = caplog.messages
    assert unnamed(told, 1, 3, 1, root / "videos/hand/000-000001.mp4") == []
    assert open_split(root, cameras=["top"]).episodes == [0, 1], "what is not read may be missing"
    with pytest.raises(ConfigError) as raised:
        open_split(root, on_missing="error")
    wanted = (root / "videos/hand/000-000001.mp4", "data.on_missing=skip")
    assert unnamed(str(raised.value), *wanted) == []


def untouched(root: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("edit", "options", "named"),
    [
        (unlink("meta/info.json"), {}, ["data.root=ROOT", "meta/info.json"]),
        (cut("meta/info.json", 0.5), {}, ["ROOT/meta/info.json", "JSON"]),
        (
            edit_info(codebase_version="v1.6"),
            {},
            ["ROOT/meta/info.json", "codebase_version=v1.6", "v2.1", "v3.0"],
        ),
        (edit_info(fps=None), {}, ["ROOT/meta/info.json", "fps"]),
        (
            lambda root: (root / "meta/info.json").write_text("[]"),
            {},
            ["ROOT/meta/info.json", "JSON"],
        ),
        (
            edit_info(data_path="data/{episode}.parquet"),
            {},
            ["ROOT/meta/info.json", "data_path=data/{episode}.parquet", "episode_index"],
        ),
        (untouched, {"cameras": ["hnad"]}, ["data.cameras", "hnad", "'hand'", "hand, top"]),
        (untouched, {"cameras": []}, ["data.cameras", "hand, top"]),
        (untouched, {"cameras": "top"}, ["data.cameras=top", "[top]"]),
        (
            untouched,
            {"state_key": "observation.stat", "action_key": "top"},
            ["data.state_key=observation.stat", "'observation.state'", "data.action_key=top"],
        ),
        (
            untouched,
            {"horizon": 0, "image_size": [64], "split": "vall", "on_missing": "no"},
            ["data.horizon=0", "data.image_size=[64]", "data.split=vall", "data.on_missing=no"],
        ),
        (untouched, {"val_episodes": 3}, ["data.val_episodes=3", 3, "data.root=ROOT", "train"]),
        (untouched, {"action_offset": 9}, ["data.action_offset=9", "train", 9]),
    ],
)
def test_what_is_wrong_is_named(
    root: Path, edit: Callable[[Path], None], options: dict[str, Any], named: list[Any]
) -> None:
    edit(root)
    with pytest.raises(ConfigError) as raised:
        open_split(root, **options).prepare()
    assert unnamed(str(raised.value).replace(str(root), "ROOT"), *named) == []


def test_relative_targets_need_states_of_their_size(root: Path) -> None:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(features=features | {"action": {"dtype": "float32", "shape": [2]}})(root)
    for episode, length in enumerate(LENGTHS):
        table = columns(episode, length)
        write_table(root, episode, table | {"action": table["action"][:, :2]})
    with pytest.raises(ConfigError) as raised:
        open_split(root)
    sizes = ("action", 2, "observation.state", 3)
    assert unnamed(str(raised.value), "data.relative=true", *sizes, "data.relative=false") == []
    train, val = open_split(root, relative=False), open_split(root, "val", relative=False)
    assert (train.spec["state_dim"], train.spec["action_dim"]) == (3, 2)
    assert list(val.baselines(train)) == ["mean_action"]


def test_missing_package_is_named_with_its_command(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError) as raised:
        open_split(root)
    assert unnamed(str(raised.value), "data=lerobot", "av", "pip install -e '.[vla]'") == []


def test_importing_loads_neither_pyarrow_nor_av() -> None:
    code = "import sys, atlas.data.lerobot.dataset; print([m for m in ('av', 'pyarrow') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=True
    )
    assert out.stdout.split() == [b"[]"]


@pytest.mark.parametrize("files", [(0, 0, 0), (0, 0, 1), (1, 0, 0)])
@pytest.mark.parametrize("task_column", ["task", "__index_level_0__"])
def test_v3_gives_the_samples_of_v2(
    root: Path, tmp_path: Path, files: tuple[int, ...], task_column: str
) -> None:
    other = write_v3(tmp_path / "v3", files=files, task_column=task_column)
    for split in ("train", "val"):
        old, new = open_split(root, split), open_split(other, split)
        assert (len(old), old.episodes, old.spec) == (len(new), new.episodes, new.spec)
        ids = list(range(len(old)))
        a, b = old.batch(ids), new.batch(ids)
        for key in ("state", "actions", "action_mask"):
            assert torch.equal(a[key], b[key]), key
        assert a["instruction"] == b["instruction"]
        far = (a["images"].int() - b["images"].int()).abs().max()
        assert far < 5, "encoded in another file, a frame may differ by the codec, not by a frame"


def test_a_stretch_of_a_video_is_found_from_the_key_frame_before(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    greys = [3 * n for n in range(80)]
    write_video(path, greys)
    read = 0

    class Counting(Video):
        def _from_start(self, container: Any, stream: Any) -> Any:
            nonlocal read
            for frame in super()._from_start(container, stream):
                read += 1
                yield frame

    frames = np.stack(list(Counting(path, 5, FPS, start=7.0).decode(6, 8)))
    assert abs(frames.mean((1, 2, 3)) - greys[70:75]).max() < 4
    assert read == 5
    with av.open(str(path)) as container:
        container.seek(
            int(7.0 / container.streams.video[0].time_base), stream=container.streams.video[0]
        )
        assert next(container.decode(video=0)).time > 5, "decoded from a key frame nearby"


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"length": 9}, ["episode 2", "length=9", 16, 24]),
        ({"length": 9, "dataset_to_index": 25}, [8, "episode 2", "length=9"]),
        ({"videos/top/from_timestamp": 0.5}, [3, "0.5 s", 8]),
        ({"data/file_index": 7}, [1, 3, 2, "file-007.parquet", "data.on_missing=skip"]),
    ],
)
def test_what_is_wrong_with_v3_is_named(
    root: Path, tmp_path: Path, row: dict[str, Any], named: list[Any]
) -> None:
    other = write_v3(tmp_path / "v3", **row)
    with pytest.raises(ConfigError) as raised:
        open_split(other, "val", on_missing="error").prepare()
    assert unnamed(str(raised.value), *named) == []


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("nowhere", {}, ["meta/"]),
        ("lab/recordings", {}, ["data.revision=TAG_OR_COMMIT"]),
        (
            "lab/recordings",
            {"revision": "v3.0"},
            ["hf download lab/recordings", "--revision v3.0", "no network", "data.root=FOLDER"],
        ),
    ],
)
def test_hub_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, Any],
    named: list[str],
) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as raised:
        LeRobot(name, **options)
    assert unnamed(str(raised.value), f"data.root={name}", *named) == []


def test_a_hub_name_is_read_from_the_hubs_own_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(root)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    data = LeRobot("lab/recordings", revision="abc", val_episodes=1)
    assert len(data) == 16
    assert asked == {"name": "lab/recordings", "repo_type": "dataset", "revision": "abc"}
    with pytest.raises(ConfigError) as raised:
        LeRobot(root, revision="abc")
    wanted = ("data.revision=abc", f"data.root={root}", "data.revision=null")
    assert unnamed(str(raised.value), *wanted) == []


@pytest.mark.parametrize(("interval", "step"), [(None, 1), (0.1, 1), (0.2, 2), (0.3, 3)])
def test_chunks_by_time(root: Path, interval: float | None, step: int) -> None:
    data = open_split(root, interval=interval)
    _, actions, mask = data._rows.vectors(data._rows.samples[:1])
    assert actions[0, :, 0].tolist() == [min(step * k, 8) + 0.5 for k in range(4)]
    assert mask[0].tolist() == [step * k < 9 for k in range(4)]
    assert data.spec["interval"] == pytest.approx(step / FPS)
    follow = open_split(root, interval=interval, action_key=None)
    assert follow.action_offset == step


def test_an_interval_is_a_number_of_frames(root: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        open_split(root, interval=0.25)
    assert unnamed(str(raised.value), "data.interval=0.25", 2.5, FPS, 0.2) == []


def test_percentiles(root: Path) -> None:
    data = open_split(root, normalization="percentile")
    found = data.spec["statistics"]
    rows = np.concatenate([states(0, 9), states(1, 7)]).astype("f8")
    low, high = np.percentile(rows, [1, 99], axis=0)
    np.testing.assert_allclose(found["state"]["q01"], low, atol=1e-6)
    np.testing.assert_allclose(found["state"]["mean"], (low + high) / 2, atol=1e-6)
    np.testing.assert_allclose(found["state"]["std"][:2], (high - low)[:2] / 2, rtol=1e-6)
    assert found["state"]["std"][2] > 0
    assert data.spec["normalization"] == "percentile"


def test_augmentation_is_of_the_seed_alone(root: Path) -> None:
    data = open_split(root, augment={"crop": 0.2, "colour": 0.3})
    plain = open_split(root).batch([0, 5, 9])["images"]
    first = data.batch([0, 5, 9], [11, 12, 13])["images"]
    assert first.dtype == torch.uint8
    assert first.shape == plain.shape
    assert torch.equal(first[1:2], data.batch([5], [12])["images"]), "whatever the batch"
    assert not torch.equal(first[:, 0], plain[:, 0])
    assert torch.equal(first[:, 1], plain[:, 1]), "a camera on the hand is left as it is"
    assert torch.equal(data.batch([0, 5, 9])["images"], plain), "without seeds nothing is changed"
    both = open_split(root, augment={"colour": 0.3, "except_for": []})
    changed = both.batch([0], [11])["images"]
    assert not torch.equal(changed[0, 1], plain[0, 1])
    assert (data.augments, open_split(root).augments) == (True, False)


@pytest.mark.parametrize(
    ("augment", "named"),
    [
        ({"crop": 0.95}, ["data.augment.crop=0.95", 0, 0.9]),
        ({"color": 0.1}, ["data.augment.color", "colour", "colour"]),
        ({"except_for": "wrist"}, ["data.augment.except_for=wrist", "[wrist]"]),
    ],
)
def test_augmentations_that_cannot_be(
    root: Path, augment: dict[str, Any], named: list[Any]
) -> None:
    with pytest.raises(ConfigError) as raised:
        open_split(root, augment=augment)
    assert unnamed(str(raised.value), *named) == []


def test_a_crop_shows_a_part_of_the_image() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 32, 64)[None, None] * 3
    seen = [Augment(crop=0.5)(ramp, ["top"], [seed])[0, 0, 0, 0] for seed in range(50)]
    widths = [int(row[-1]) - int(row[0]) for row in seen]
    lefts = [int(row[0]) for row in seen]
    assert max(widths) <= 96
    assert min(widths) >= 92, "half of the width, scaled back"
    assert min(lefts) < 10
    assert max(lefts) > 80, "anywhere in the image"


def cached(root: Path) -> list[Path]:
    return sorted((root.parent / "cache/frames").iterdir())


def test_frames_are_decoded_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_split(root)[3]["images"]
    assert [file.suffix for file in cached(root)] == [".npy"] * 4
    monkeypatch.setattr(Video, "decode", lambda *_: pytest.fail("decoded again"))
    open_array.cache_clear()
    assert torch.equal(open_split(root)[3]["images"], first)


@pytest.mark.parametrize("keep", [0, 60, 500, -1])
def test_a_file_cut_short_is_made_again(root: Path, keep: int) -> None:
    open_split(root).prepare()
    whole = [file.read_bytes() for file in cached(root)]
    for file, content in zip(cached(root), whole, strict=True):
        file.write_bytes(content[:keep])
    open_split(root).prepare()
    assert [file.read_bytes() for file in cached(root)] == whole


def test_a_changed_video_or_size_is_decoded_anew(root: Path) -> None:
    data = open_split(root)
    before = data[0]["images"].float().mean()
    write_video(root / "videos/top/000-000000.mp4", [250] * LENGTHS[0])
    assert open_split(root)[0]["images"].float().mean() > before + 50
    assert open_split(root, image_size=[6, 8])[0]["images"].shape == (2, 3, 6, 8)


def test_several_processes_decode_at_once(root: Path) -> None:
    data = open_split(root)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=data.prepare) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [file.suffix for file in cached(root)] == [".npy"] * 4, "nothing else is left behind"
    assert all(data._cache.ready(video) for videos in data._videos for video in videos)


def test_a_folder_that_cannot_be_written_to(root: Path) -> None:
    (root.parent / "cache").write_text("a file where a folder is wanted")
    with pytest.raises(ConfigError) as raised:
        open_split(root).prepare()
    wanted = ("data.cache_dir", root.parent / "cache", "data.cache_dir=DIR")
    assert unnamed(str(raised.value), *wanted) == []


@pytest.mark.parametrize("relative", [True, False])
def test_spec(root: Path, relative: bool) -> None:
    data = open_split(root, relative=relative)
    spec = data.spec
    targets = []
    for episode in (0, 1):
        rows = states(episode, LENGTHS[episode])
        for t in range(len(rows)):
            targets.append(rows[t : t + 4] + 0.5 - relative * rows[t])
    actions, state = np.concatenate(targets), np.concatenate([states(0, 9), states(1, 7)])
    velocity = np.concatenate([np.diff(states(0, 9), axis=0), np.diff(states(1, 7), axis=0)])
    for key, expected in (("actions", actions), ("state", state), ("velocity", velocity)):
        statistics = spec["statistics"][key]
        np.testing.assert_allclose(statistics["mean"], expected.mean(0), rtol=1e-5, atol=1e-6)
        floor = 1e-3 * expected.std(0).max()  # what a joint that never moved has
        np.testing.assert_allclose(statistics["std"], np.maximum(expected.std(0), floor), rtol=1e-4)
    assert spec["vocabulary"] == ["2x", "ball", "drawer", "ish", "open", "pick", "red", "the", "up"]
    assert spec["cameras"] == ["top", "hand"]
    assert (spec["image_size"], spec["history"], spec["horizon"]) == ([12, 16], 3, 4)
    assert json.loads(json.dumps(spec)) == spec == open_split(root, "val", relative=relative).spec


def test_baselines(tmp_path: Path) -> None:
    """Actions lead the state by 0.5, and the first joint goes on by one a row."""
    root = write_folder(tmp_path / "robot", (40, 40, 40))
    train, val = open_split(root), open_split(root, "val")
    found = val.baselines(train)
    rows = states(2, 40)
    hold = np.concatenate([abs(rows[t : t + 4] + 0.5 - rows[t]) for t in range(40)]).mean()
    assert found["hold_state"] == pytest.approx(hold, rel=1e-5)
    assert found["ridge"] < 0.3 * hold, "the motion is linear in the velocities"
    assert found["mean_action"] > 10 * hold, "episodes are 100 apart"


def test_configuration_names_what_is_there(root: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    from hydra.utils import instantiate

    data = omegaconf.OmegaConf.load(REPOSITORY / "conf/data/lerobot.yaml")
    config = omegaconf.OmegaConf.create({"data": data})
    config.data.update({"root": str(root), "val_episodes": 1, "image_size": [6, 8]})
    train, val = instantiate(config.data.train), instantiate(config.data.val)
    assert (train.episodes, val.episodes) == ([0, 1], [2])
    assert train[0]["images"].shape == (2, 3, 6, 8)
    assert (train.horizon, train.history) == (8, 4)
    assert json.loads(json.dumps(train.spec)) == val.spec


def real_folder() -> Path:
    named = os.environ.get("ATLAS_G1")
    folder = Path(named) if named else REPOSITORY.parent / "shared/data/g1-pick-bottle"
    if not folder.is_dir():
        pytest.skip(f"no recordings at {folder}; ATLAS_G1 may name another folder")
    return folder


def test_real_recordings(tmp_path: Path) -> None:
    root = real_folder()
    train, val = LeRobot(root), LeRobot(root, split="val", cache_dir=tmp_path, image_size=[24, 32])
    assert (train.episodes, val.episodes) == ([1, 2, 4, 5, 7, 8], [10, 11])
    assert (len(train), len(val), len(train.missing)) == (2316, 711, 92)
    found = val.baselines(train)
    assert found["mean_action"] == pytest.approx(0.086, abs=0.0005)
    assert found["hold_state"] == pytest.approx(0.024, abs=0.0005)
    assert found["ridge"] == pytest.approx(0.015, abs=0.0005)
    batch = val.batch([0, 300, 710])
    assert batch["images"].shape == (3, 1, 3, 24, 32)
    assert batch["images"].float().std() > 20
    assert not torch.equal(batch["images"][0], batch["images"][1])
    assert set(batch["instruction"]) == {"Pick up the yellow bottle on the table."}


@pytest.mark.parametrize(
    "of_data, of_vision, said", [(56, 224, True), (224, 224, False), (224, 56, False)]
)
def test_frames_that_are_reduced_and_enlarged_again_are_told_of(of_data, of_vision, said):
    model = nn.Module()
    model.vision = nn.Module()
    model.vision.image_size = (of_vision, of_vision)
    parts = Parts(None, None, {"image_size": [of_data, of_data]}, model, [], None)
    sizes = {"image_size": [of_data, of_data]}
    assert bool(doubts(sizes, parts)) == said
    assert not doubts({}, parts)  # it has no such key to set
