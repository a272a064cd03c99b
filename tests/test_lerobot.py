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

av = pytest.importorskip("av", reason="av is not installed (extra vla)")
pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra vla)")
parquet = pytest.importorskip("pyarrow.parquet")

from atlas.data.lerobot import LeRobot  # noqa: E402
from atlas.data.video import Video, open_frames  # noqa: E402
from atlas.errors import ConfigError  # noqa: E402

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]
HEIGHT, WIDTH, FPS = 48, 64, 10
LENGTHS = (9, 7, 8)
TASKS = ("Pick up the red-ish Ball!", "Open the drawer 2x")


def grey(episode: int, frame: int) -> int:
    """What all pixels of a frame are, so that a frame can be told by them."""
    return (20 + 60 * episode + 12 * frame) % 240


def states(episode: int, length: int) -> np.ndarray:
    """A joint that tells episode and row, one that moves smoothly, and one that does not move."""
    rows = np.arange(length)
    return np.stack([100.0 * episode + rows, np.sin(rows + episode), 0 * rows], 1).astype("f4")


def write_video(path: Path, greys: list[int], fps: int = FPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 10_000_000  # so that a grey stays what it was
        for value in greys:
            image = np.full((HEIGHT, WIDTH, 3), value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_table(root: Path, episode: int, columns: dict[str, Any]) -> None:
    path = root / f"data/chunk-00{episode // 2}/episode_{episode:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {key: list(value) if value.ndim > 1 else value for key, value in columns.items()}
    parquet.write_table(pyarrow.table(arrays), path)


def columns(episode: int, length: int, lead: float = 0.5) -> dict[str, np.ndarray]:
    """State, an action that is the state plus `lead`, and the row's task."""
    state = states(episode, length)
    task = np.full(length, episode % len(TASKS))
    return {"observation.state": state, "action": state + np.float32(lead), "task_index": task}


def write_folder(root: Path, lengths: tuple[int, ...] = LENGTHS, lead: float = 0.5) -> Path:
    """A folder of format v2.1 with a camera "top" and a camera "hand" (darker by 6)."""
    (root / "meta").mkdir(parents=True)
    vector = {"dtype": "float32", "shape": [3]}
    video = {"dtype": "video", "shape": [HEIGHT, WIDTH, 3]}
    features = {"observation.state": vector, "action": vector, "top": video, "hand": video}
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "chunks_size": 2,
        "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/{episode_chunk:03d}-{episode_index:06d}.mp4",
    }
    (root / "meta/info.json").write_text(json.dumps(info))
    tasks = [{"task_index": i, "task": task} for i, task in enumerate(TASKS)]
    (root / "meta/tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    episodes = [{"episode_index": i, "length": n} for i, n in enumerate(lengths)]
    (root / "meta/episodes.jsonl").write_text("".join(json.dumps(e) + "\n" for e in episodes))
    for episode, length in enumerate(lengths):
        write_table(root, episode, columns(episode, length, lead))
        for camera, darker in (("top", 0), ("hand", 6)):
            greys = [grey(episode, frame) - darker for frame in range(length)]
            write_video(root / f"videos/{camera}/{episode // 2:03d}-{episode:06d}.mp4", greys)
    return root


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("made") / "robot")


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own to spoil, and an empty frame cache beside it."""
    monkeypatch.setenv("ATLAS_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(made, tmp_path / "robot")


def open_split(root: Path, split: str = "train", **options: Any) -> LeRobot:
    chosen: dict[str, Any] = {
        "history": 3,
        "horizon": 4,
        "val_episodes": 1,
        "image_size": [12, 16],
    } | options
    return LeRobot(root, split=split, **chosen)


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
    _, actions, mask = data._vectors(data._row)
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
        with pytest.raises(ConfigError, match=r"val_episodes=0 .* none for the split val"):
            open_split(root, "val", val_episodes=val_episodes)
    else:
        assert open_split(root, "val", val_episodes=val_episodes).episodes == val


def test_missing_episodes_are_counted_and_left_out(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "videos/hand/000-000001.mp4").unlink()
    with caplog.at_level(logging.WARNING, logger="atlas"):
        train, val = open_split(root), open_split(root, "val")
    assert (train.episodes, val.episodes, train.missing) == ([0], [2], [1])
    assert [r.getMessage().count("1 of the 3 episodes") for r in caplog.records] == [1]
    assert open_split(root, cameras=["top"]).episodes == [0, 1], "what is not read may be missing"
    with pytest.raises(ConfigError, match=r"hand/000-000001\.mp4.*data\.on_missing=skip"):
        open_split(root, on_missing="error")


def edit_info(**changes: Any) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / "meta/info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def unlink(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: int(keep * len(content))])

    return edit


def spoil(key: str, row: int, value: float) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        table = columns(1, LENGTHS[1])
        table[key] = table[key].copy()
        table[key][row] = value
        write_table(root, 1, table)

    return edit


def rewrite_video(frames: int, fps: int) -> Callable[[Path], None]:
    return lambda root: write_video(root / "videos/top/000-000001.mp4", [9] * frames, fps)


def untouched(root: Path) -> None:
    pass


EPISODE_1 = "episode_000001.parquet"


@pytest.mark.parametrize(
    ("edit", "options", "said"),
    [
        (unlink("meta/info.json"), {}, ["data.root=", "no meta/info.json"]),
        (cut("meta/info.json", 0.5), {}, ["info.json: is not JSON"]),
        (edit_info(codebase_version="v3.0"), {}, ["codebase_version=v3.0 is not supported"]),
        (edit_info(fps=None), {}, ["info.json: lacks fps"]),
        (unlink("meta/tasks.jsonl"), {}, ["tasks.jsonl: cannot be read"]),
        (cut("meta/episodes.jsonl", 0.9), {}, ["episodes.jsonl, line 3: is not JSON"]),
        (untouched, {"cameras": ["hnad"]}, ["hnad is no video", "'hand'", "hand, top"]),
        (untouched, {"cameras": []}, ["data.cameras is empty", "hand, top"]),
        (
            untouched,
            {"state_key": "observation.stat", "action_key": "top"},
            ["observation.stat is no vector", "'observation.state'", "action_key=top is no vector"],
        ),
        (
            untouched,
            {"horizon": 0, "image_size": [64], "split": "vall", "on_missing": "no"},
            ["data.horizon=0", "data.image_size=[64]", "data.split=vall", "data.on_missing=no"],
        ),
        (untouched, {"val_episodes": 3}, ["data.val_episodes=3 of the 3", "split train"]),
        (untouched, {"action_offset": 9}, ["data.action_offset=9 is past the end"]),
        (cut(f"data/chunk-000/{EPISODE_1}", 0.7), {}, [f"{EPISODE_1}: cannot be read"]),
        (spoil("action", 4, np.nan), {}, [f"{EPISODE_1}, row 4: action is NaN"]),
        (spoil("task_index", 4, 7), {}, [f"{EPISODE_1}: task_index=7 is not in"]),
        (
            lambda root: write_table(root, 1, columns(1, 5)),
            {},
            [f"{EPISODE_1}: has 5 rows", "length=7"],
        ),
        (
            lambda root: write_table(root, 1, columns(1, 7) | {"action": np.ones((7, 2), "f4")}),
            {},
            [f"{EPISODE_1}: action has 14 numbers in 7 rows"],
        ),
        (cut("videos/top/000-000001.mp4", 0.4), {}, ["top/000-000001.mp4: cannot be decoded"]),
        (rewrite_video(4, FPS), {}, ["top/000-000001.mp4: has 4 frames, its table 7 rows"]),
        (rewrite_video(7, 5), {}, ["top/000-000001.mp4: runs at 5 frames/s", "fps=10"]),
    ],
)
def test_what_is_wrong_is_named(
    root: Path, edit: Callable[[Path], None], options: dict[str, Any], said: list[str]
) -> None:
    edit(root)
    with pytest.raises(ConfigError) as raised:
        open_split(root, **options).prepare()
    assert [part for part in said if part not in str(raised.value)] == []


def test_relative_targets_need_states_of_their_size(root: Path) -> None:
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(features=features | {"action": {"dtype": "float32", "shape": [2]}})(root)
    for episode, length in enumerate(LENGTHS):
        table = columns(episode, length)
        write_table(root, episode, table | {"action": table["action"][:, :2]})
    with pytest.raises(ConfigError, match=r"action \(2 numbers\).*set data\.relative=false"):
        open_split(root)
    train, val = open_split(root, relative=False), open_split(root, "val", relative=False)
    assert (train.spec["state_dim"], train.spec["action_dim"]) == (3, 2)
    assert list(val.baselines(train)) == ["mean_action"]


def test_missing_package_is_named_with_its_command(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"needs av: pip install -e '\.\[vla\]'"):
        open_split(root)


def test_importing_loads_neither_pyarrow_nor_av() -> None:
    code = (
        "import sys, atlas.data.lerobot; print([m for m in ('av', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=True
    )
    assert out.stdout.split() == [b"[]"]


def cached(root: Path) -> list[Path]:
    return sorted((root.parent / "cache/frames").iterdir())


def test_frames_are_decoded_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_split(root)[3]["images"]
    assert [file.suffix for file in cached(root)] == [".npy"] * 4
    monkeypatch.setattr(Video, "decode", lambda *_: pytest.fail("decoded again"))
    open_frames.cache_clear()
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
    with pytest.raises(
        ConfigError, match=r"data\.cache_dir: cannot write frames to .*cache_dir=DIR"
    ):
        open_split(root).prepare()


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
