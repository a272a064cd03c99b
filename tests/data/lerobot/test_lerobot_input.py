"""Recordings with something wrong in them: named with file, row and remedy, or left out and counted."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import lines, only_run, train, unnamed

av = pytest.importorskip("av", reason="av is not installed (extra vla)")
pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra vla)")

from pyarrow import parquet, table  # noqa: E402
from robot import (  # noqa: E402
    FPS,
    LENGTHS,
    columns,
    cut,
    open_split,
    states,
    unlink,
    write_folder,
    write_table,
    write_v3,
    write_video,
)

from atlas.data.lerobot.damage import find_damage  # noqa: E402
from atlas.errors import ConfigError  # noqa: E402
from atlas.policy.evaluate import evaluate  # noqa: E402
from atlas.run.directory import Run  # noqa: E402
from atlas.training.feeding.stream import TrainStream, ValidationStream  # noqa: E402
from atlas.training.ranks.world import World  # noqa: E402

TABLE, VIDEO = "data/chunk-000/episode_000001.parquet", "videos/top/000-000001.mp4"
SHARED, SHARED_VIDEO = "data/chunk-000/file-000.parquet", "videos/top/chunk-000/file-000.mp4"
STRICT = {"on_missing": "error"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
ALONE = World(0, 0, 1, torch.device("cpu"))

Edit = Callable[[Path], None]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same recordings in both formats; in v3.0 episodes 0 and 1 are in one file."""
    folder = tmp_path_factory.mktemp("made")
    return {"v2": write_folder(folder / "v2"), "v3": write_v3(folder / "v3")}


@pytest.fixture
def root(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both, to be spoilt, and an empty frame cache beside them."""
    monkeypatch.setenv("ATLAS_CACHE", str(tmp_path / "cache"))
    for name, folder in made.items():
        shutil.copytree(folder, tmp_path / name)
    return tmp_path


def spoil(name: str, key: str, *rows: int, value: Any) -> Edit:
    """Put `value` into `rows` of a table: in place of a list's first number, or of all there is."""

    def edit(root: Path) -> None:
        found = parquet.read_table(root / name).to_pydict()
        for row in rows:
            old = found[key][row]
            whole = isinstance(value, list) or value is None or not isinstance(old, list)
            found[key][row] = value if whole else [value, *old[1:]]
        parquet.write_table(table(found), root / name)

    return edit


def replace(name: str, content: bytes) -> Edit:
    return lambda root: (root / name).write_bytes(content) and None


def empty(name: str) -> Edit:
    return lambda root: (root / name).write_bytes(b"") or None


def overwrite(name: str, start: int, count: int) -> Edit:
    def edit(root: Path) -> None:
        content = bytearray((root / name).read_bytes())
        content[start : start + count] = b"\xff" * count
        (root / name).write_bytes(content)

    return edit


def without_rows(root: Path) -> None:
    parquet.write_table(parquet.read_table(root / TABLE).slice(0, 0), root / TABLE)


def rewrite_video(frames: int, fps: int = FPS) -> Edit:
    return lambda root: write_video(root / VIDEO, [9] * frames, fps)


def index_first(keep: float) -> Edit:
    """A video with its index ahead of its frames, and of this much its begin."""

    def edit(root: Path) -> None:
        write_video(root / VIDEO, [9] * 7, movflags="faststart")
        cut(VIDEO, keep)(root)

    return edit


def damage_frame(name: str, number: int) -> Edit:
    """Overwrite what a frame is decoded from, and leave the file's structure as it is."""

    def edit(root: Path) -> None:
        with av.open(str(root / name)) as container:
            packet = [p for p in container.demux(video=0) if p.size][number]
            start, count = packet.pos, packet.size
        overwrite(name, start, count)(root)

    return edit


def drop_frames(root: Path) -> None:
    """Frames at 0.0, 0.1 and 0.2 s and from 0.8 s on: so many that the average rate is right."""
    with av.open(str(root / VIDEO), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in [*range(3), *range(8, 700)]:
            image = np.full((48, 64, 3), 99, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def assert_named(folder: Path, edit: Edit, options: dict[str, Any], named: list[Any]) -> None:
    """What is wrong after `edit` is told before training, with all that is `named`."""
    edit(folder)
    with pytest.raises(ConfigError) as raised:
        open_split(folder, **options).prepare()
    assert unnamed(str(raised.value).replace(str(folder), "ROOT"), *named) == []


# Of episode 1, one of 3, which is left out with the key.
ABSENT = [1, 3, 1, "data.on_missing=skip"]
DAMAGED = [1, 3, 1, "data.on_bad=skip"]


@pytest.mark.parametrize(
    ("edit", "options", "named"),
    [
        (unlink(TABLE), STRICT, [TABLE, *ABSENT]),
        (unlink(VIDEO), STRICT, [VIDEO, *ABSENT]),
        (empty(TABLE), {}, [TABLE, *DAMAGED]),
        (empty(VIDEO), {}, [VIDEO, *DAMAGED]),
        (without_rows, {}, [TABLE, *DAMAGED]),
        (cut(TABLE, 0.7), {}, [TABLE, *DAMAGED]),
        (cut(VIDEO, 0.4), {}, [VIDEO, *DAMAGED]),
        (cut(VIDEO, 0.98), {}, [VIDEO, *DAMAGED]),
        (index_first(0.9), {}, [VIDEO, *DAMAGED]),
        (replace(TABLE, POINTER), {}, [TABLE, "git-lfs", *DAMAGED]),
        (overwrite(TABLE, 4, 200), {}, [TABLE]),
        (replace(VIDEO, b"no video at all"), {}, [VIDEO, "data.on_missing=skip"]),
        (
            spoil(TABLE, "action", 4, 6, value=np.nan),
            {},
            [TABLE, "row 4", "action", 2, "data.on_bad=skip"],
        ),
        (
            spoil(TABLE, "observation.state", 5, value=-np.inf),
            {"on_bad": "error"},
            [TABLE, "row 5", "observation.state", 1, "data.on_bad=skip"],
        ),
        (
            spoil(TABLE, "action", 3, value=[1.0, 2.0]),
            {},
            [TABLE, "row 3", "action", 2, "meta/info.json", 3],
        ),
        (
            spoil(TABLE, "observation.state", 2, value=None),
            {"on_bad": "skip"},
            [TABLE, "row 2", "observation.state", 0, "meta/info.json", 3],
        ),
        (
            lambda root: write_table(root, 1, columns(1, 7) | {"action": np.ones((7, 2), "f4")}),
            {},
            [TABLE, "row 0", "action", 2, 3, 7],
        ),
        (
            lambda root: write_table(root, 1, columns(1, 5)),
            {},
            [TABLE, 5, "meta/episodes.jsonl", "length=7"],
        ),
        (
            spoil(TABLE, "task_index", 4, value=7),
            {},
            [TABLE, "row 4", "task_index=7", "meta/tasks.jsonl"],
        ),
        (rewrite_video(4), {}, [VIDEO, 4, 7]),
        (rewrite_video(7, 5), {}, [VIDEO, 5, "meta/info.json", "fps=10"]),
        (drop_frames, {}, [VIDEO, 0.2, "0.8 s"]),
        (unlink("meta/tasks.jsonl"), {}, ["meta/tasks.jsonl", os.strerror(errno.ENOENT)]),
        (empty("meta/tasks.jsonl"), {}, ["meta/tasks.jsonl"]),
        (
            cut("meta/episodes.jsonl", 0.9),
            {},
            ["meta/episodes.jsonl", "line 3", "episode_index", "length"],
        ),
        (
            replace("meta/tasks.jsonl", b'{"task_index": 0, "task": "a"}\n\xff\n{"task": "b"}\n'),
            {},
            [2, *["meta/tasks.jsonl"] * 2, "line 2", "line 3", *["task_index"] * 2],
        ),
        (
            replace("meta/episodes.jsonl", b'{"episode_index": 0, "length": null}\n'),
            {},
            ["meta/episodes.jsonl", "line 1", "episode_index", "length"],
        ),
    ],
)
def test_what_is_wrong_is_named(
    root: Path, edit: Edit, options: dict[str, Any], named: list[Any]
) -> None:
    assert_named(root / "v2", edit, options, named)


@pytest.mark.parametrize(
    ("edit", "options", "named"),
    [
        (cut(SHARED, 0.7), {}, [2, 3, 0, 1, *[SHARED] * 2, "data.on_bad=skip"]),
        (cut(SHARED_VIDEO, 0.7), {}, [2, 3, 0, 1, *[SHARED_VIDEO] * 2, "data.on_bad=skip"]),
        (unlink(SHARED_VIDEO), STRICT, [2, 3, 0, 1, SHARED_VIDEO, "data.on_missing=skip"]),
        # Row 12 of the file is row 3 of its second episode.
        (spoil(SHARED, "action", 12, value=np.nan), {}, [SHARED, "row 12", "action", 1]),
        (spoil(SHARED, "action", 12, value=[1.0]), {}, [SHARED, "row 12", "action", 1, 3, 1]),
        (spoil(SHARED, "task_index", 12, value=5), {}, [SHARED, "row 12", "task_index=5"]),
        (cut("meta/tasks.parquet", 0.5), {}, ["meta/tasks.parquet"]),
        (
            cut("meta/episodes/chunk-000/file-001.parquet", 0.5),
            {},
            ["meta/episodes/chunk-000/file-001.parquet"],
        ),
    ],
)
def test_what_is_wrong_with_v3_is_named(
    root: Path, edit: Edit, options: dict[str, Any], named: list[Any]
) -> None:
    assert_named(root / "v3", edit, options, named)


def test_kinds_of_damage_are_told_apart(root: Path) -> None:
    edits = (unlink(TABLE), empty(TABLE), without_rows, cut(TABLE, 0.7), replace(TABLE, POINTER))
    found = {find_damage(root / "v2" / TABLE)}
    assert found == {None}
    for number, edit in enumerate(edits):
        shutil.copytree(root / "v2", folder := root / str(number))
        edit(folder)
        found.add(find_damage(folder / TABLE))
    assert len(found) == 1 + len(edits)


@pytest.mark.parametrize(
    ("kind", "name", "frame", "times"),
    [
        ("v2", VIDEO, 0, ("0 s",)),
        ("v2", VIDEO, 3, ("0.2 s", "0.3 s")),
        ("v3", SHARED_VIDEO, 12, ("1.1 s", "1.2 s")),
    ],
)
def test_a_frame_that_cannot_be_decoded_is_named(
    root: Path, kind: str, name: str, frame: int, times: tuple[str, ...]
) -> None:
    """The decoder is some frames ahead of what it has given, so the time is near."""
    damage_frame(name, frame)(root / kind)
    with pytest.raises(ConfigError) as raised:
        open_split(root / kind).prepare()
    found = str(raised.value)
    assert unnamed(found, root / kind / name, "data.on_missing=skip") == []
    assert any(unnamed(found, time) == [] for time in times), found


@pytest.mark.parametrize(
    ("edit", "file"),
    [
        (unlink(TABLE), TABLE),
        (empty(TABLE), TABLE),
        (without_rows, TABLE),
        (cut(TABLE, 0.5), TABLE),
        (unlink(VIDEO), VIDEO),
        (empty(VIDEO), VIDEO),
        (cut(VIDEO, 0.9), VIDEO),
        (index_first(0.6), VIDEO),
    ],
)
def test_what_is_of_no_use_is_left_out_and_counted(
    root: Path, caplog: pytest.LogCaptureFixture, edit: Edit, file: str
) -> None:
    edit(root / "v2")
    with caplog.at_level(logging.WARNING, logger="atlas"):
        train, val = (open_split(root / "v2", split, on_bad="skip") for split in ("train", "val"))
    train.prepare()
    assert (train.episodes, val.episodes, train.missing, val.missing) == ([0], [2], [1], [1])
    (told,) = caplog.messages
    assert unnamed(told, 1, 3, 1, file) == []


def test_an_episode_without_rows_is_left_out(root: Path) -> None:
    folder = root / "v2"
    rows = [{"episode_index": e, "length": n} for e, n in enumerate((9, 0, 8))]
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_table(folder, 1, columns(1, 0))
    assert open_split(folder, on_bad="skip").episodes == [0]


BAD = (  # in episodes 0 (train) and 2 (val), whose tables in v3.0 are two files
    ("v2", "data/chunk-000/episode_000000.parquet", "data/chunk-001/episode_000002.parquet"),
    ("v3", SHARED, "data/chunk-000/file-001.parquet"),
)


@pytest.fixture(params=BAD, ids=["v2", "v3"])
def spoilt(root: Path, request: pytest.FixtureRequest) -> Path:
    """A state that is NaN in row 4 of episode 0 and an action that is infinite in row 7 of 2."""
    kind, first, last = request.param
    spoil(first, "observation.state", 4, value=np.nan)(root / kind)
    spoil(last, "action", 7, value=np.inf)(root / kind)
    return root / kind


def not_finite(values: torch.Tensor) -> list[int]:
    """The samples of a batch with a number in them that is none."""
    return (~values.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()


def test_bad_rows_are_kept_and_seen_by_their_samples(spoilt: Path) -> None:
    train, val = open_split(spoilt, on_bad="skip"), open_split(spoilt, "val", on_bad="skip")
    assert (train.episodes, len(train), val.episodes, len(val)) == ([0, 1], 16, [2], 8)
    # History is of 3 rows, chunks of 4, and past the end the last row is repeated.
    assert not_finite(train.batch(range(16))["state"]) == [4, 5, 6]
    assert not_finite(val.batch(range(8))["actions"]) == [4, 5, 6, 7]


def test_statistics_and_baselines_are_without_them(spoilt: Path) -> None:
    train, val = open_split(spoilt, on_bad="skip"), open_split(spoilt, "val", on_bad="skip")
    rows = [states(e, n) for e, n in enumerate(LENGTHS)]
    good = [[0, 1, 2, 3, 7, 8], list(range(7)), list(range(4))]  # samples, by episode
    state = np.concatenate([np.delete(rows[0], 4, axis=0), rows[1]])
    steps = np.concatenate(
        [np.delete(np.diff(rows[0], axis=0), [3, 4], axis=0), np.diff(rows[1], axis=0)]
    )
    chunks = [[rows[e][t : t + 4] + np.float32(0.5) for t in good[e]] for e in range(3)]
    less = np.concatenate(
        [chunk - rows[e][t] for e in (0, 1) for t, chunk in zip(good[e], chunks[e])]
    )
    found = train.spec["statistics"]
    for key, values in (("state", state), ("velocity", steps), ("actions", less)):
        np.testing.assert_allclose(found[key]["mean"], values.mean(0), rtol=1e-5, atol=1e-6)
    assert val.spec == train.spec == json.loads(json.dumps(train.spec))

    mean = np.concatenate([*chunks[0], *chunks[1]]).mean(0)
    measured = val.baselines(train)
    assert measured["mean_action"] == pytest.approx(abs(np.concatenate(chunks[2]) - mean).mean())
    hold = [abs(chunk - rows[2][t]) for t, chunk in zip(good[2], chunks[2])]
    assert measured["hold_state"] == pytest.approx(np.concatenate(hold).mean(), rel=1e-5)
    assert np.isfinite(measured["ridge"])


def test_percentiles_are_without_them(spoilt: Path) -> None:
    found = open_split(spoilt, on_bad="skip", normalization="percentile").spec["statistics"]
    assert all(np.isfinite(values).all() for part in found.values() for values in part.values())


def test_the_first_target_is_derived_from_rows_that_are_finite(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "robot", lead=0.0)
    first = "data/chunk-000/episode_000000.parquet"
    spoil(first, "action", 2, value=np.nan)(root)
    spoil(first, "observation.state", 2, 3, value=np.nan)(root)
    assert open_split(root, on_bad="skip").action_offset == 1, "actions are the states themselves"


def test_where_every_sample_is_bad_it_is_an_error(root: Path) -> None:
    last = "data/chunk-001/episode_000002.parquet"
    spoil(last, "observation.state", *range(8), value=np.nan)(root / "v2")
    assert len(open_split(root / "v2", on_bad="skip")) == 16
    with pytest.raises(ConfigError) as raised:
        open_split(root / "v2", "val", on_bad="skip")
    assert unnamed(str(raised.value), "data.on_bad=skip", "val", f"data.root={root / 'v2'}") == []


def test_an_unknown_choice(root: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        open_split(root / "v2", on_bad="skp")
    # Suggested, and listed with the other.
    assert unnamed(str(raised.value), "data.on_bad=skp", "skip", "skip", "error") == []


@pytest.mark.parametrize(
    ("kind", "index", "named"),
    [
        ("v2", 0, ["episode 0", BAD[0][1], "row 0", "videos/top/000-000000.mp4", "0 s"]),
        ("v2", 13, ["episode 1", TABLE, "row 4", VIDEO, "0.4 s"]),
        ("v3", 13, ["episode 1", SHARED, "row 13", SHARED_VIDEO, "1.3 s"]),
        ("v3", 15, ["episode 1", SHARED, "row 15", SHARED_VIDEO, "1.5 s"]),
    ],
)
def test_describe(root: Path, kind: str, index: int, named: list[str]) -> None:
    one = open_split(root / kind, cameras=["top"]).describe(index)
    both = open_split(root / kind).describe(index)
    hand = named[3].replace("top", "hand")
    assert unnamed(one, *named) == [] and one.count(".mp4") == 1
    assert unnamed(both, *named, hand, named[-1]) == [] and both.count(".mp4") == 2


def test_describe_names_the_bad_rows(spoilt: Path) -> None:
    train, val = open_split(spoilt, on_bad="skip"), open_split(spoilt, "val", on_bad="skip")
    for data, seeing, row, others in ((train, 6, 4, [3, 7]), (val, 4, 7, [3])):
        assert unnamed(data.describe(seeing), row) == []
        assert all(unnamed(data.describe(index), row) == [str(row)] for index in others)


def test_the_stream_replaces_them_and_validation_leaves_them_out(
    spoilt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, val = open_split(spoilt, on_bad="skip"), open_split(spoilt, "val", on_bad="skip")
    chosen = {"seed": 0, "batch_size": 4, "workers": 0, "world": ALONE, "on_bad": "skip"}
    stream = TrainStream(train, accumulate=1, **chosen)
    with caplog.at_level(logging.WARNING):
        batches = [stream[step, 0] for step in range(4)]  # an epoch
    assert [not_finite(batch["state"]) for _, batch in batches] == [[]] * 4
    assert sum(stream.replaced(step, 0, ids) for step, (ids, _) in enumerate(batches)) == 3
    (told,) = {text for text in caplog.messages if "sample 5" in text}
    assert unnamed(told, "LeRobot", "episode 0") == []
    assert [count for _, count, _ in ValidationStream(val, batches=None, **chosen)] == [4, 0]


RUN = (
    "data=lerobot",
    "data.val_episodes=1",
    "data.horizon=4",
    "data.image_size=[16,16]",
    "trainer.steps=6",
    "trainer.accumulate=1",
    "trainer.log_interval=1",
    "schedule.warmup=2",
    "tracking=none",
    "cluster.device=cpu",
)


def test_a_run_skips_and_counts_them(root: Path) -> None:
    folder, outputs = root / "v2", root / "outputs"
    spoil(BAD[0][1], "observation.state", 4, value=np.nan)(folder)
    spoil(BAD[0][2], "action", 7, value=np.inf)(folder)
    train(*RUN, f"data.root={folder}", "data.on_bad=skip", f"outputs={outputs}")
    run = only_run(outputs)
    journal = lines(run / "metrics.jsonl")
    counted = [line["bad_samples"] for line in journal if "bad_samples" in line]
    assert counted[-1] > 0
    assert all(np.isfinite(list(line.values())).all() for line in journal)
    assert any("val/l1_vs_ridge" in line for line in journal)
    log = (run / "logs/rank0.log").read_text()
    assert any(unnamed(line, "episode 0", BAD[0][1], 4) == [] for line in log.splitlines())

    found = evaluate(Run(run), "cpu")
    assert found["samples"] == 4, "half of the held-out episode sees the infinite action"
    last = {key: value for line in journal for key, value in line.items()}
    assert found["error"]["mean"] == pytest.approx(last["val/l1"], rel=1e-4)
    assert np.isfinite([base["ratio"] for base in found["baselines"].values()]).all()


def test_a_run_that_does_not_skip_names_them_before_it_trains(root: Path) -> None:
    folder, outputs = root / "v2", root / "outputs"
    spoil(TABLE, "action", 4, value=np.nan)(folder)
    done = train(*RUN, f"data.root={folder}", f"outputs={outputs}", code=1)
    assert unnamed(done.stderr, folder / TABLE, "row 4", "action", "data.on_bad=skip") == []
    assert "Traceback" not in done.stderr
    assert not list(outputs.glob("*/*/metrics.jsonl")) + list(outputs.glob("*/*/checkpoints/0*"))
