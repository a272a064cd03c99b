"""Robot recordings in LeRobot's formats as samples of camera frames, states and action chunks.

A sample is a frame of an episode: what the cameras see in it, the states up to it, its instruction
and the targets that follow. Episodes that cannot be used are left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atlas.data.arrays import cache_folder, open_array
from atlas.data.augment import Augment
from atlas.data.baselines import Block, fit, measure
from atlas.data.lerobot.episodes import find_episodes, split_episodes
from atlas.data.lerobot.formats import open_recordings
from atlas.data.lerobot.hub import find_root
from atlas.data.lerobot.recordings import Recordings, Table
from atlas.data.lerobot.rows import Rows
from atlas.data.lerobot.statistics import KINDS, statistics
from atlas.data.lerobot.video import FrameCache, Video
from atlas.errors import ConfigError, nearest


@dataclass(eq=False)
class LeRobot:
    """A map-style data set over one split of the LeRobot folder `root`, format v2.1 or v3.0.

    `root`: a folder or, where there is none of that name, a data set on the hub, of which
    `revision` says the tag or commit. `val_episodes`: the last so many of the episodes that can be
    used are the split "val", all before them "train". `cameras`: keys of video features, in the
    order of the views; None takes all. `image_size`: [H, W] to which whole frames are resized,
    whatever their aspect. `history`: number K of states, the current one included, a frame apart.
    `horizon`: number T of targets in a chunk; `interval`: seconds between neighbouring ones, a
    multiple of a frame's; None is a frame's.

    `action_key` None takes the states that follow as the targets. `action_offset`: the first
    target is that of so many rows later; None derives it: 0 where the recorded action is a command
    of its own, and one interval where it is the state of its row (or there is none), since a target
    that equals the current state is right without anything having been learned.

    `relative`: a model is to predict targets less the current state, so the statistics are of
    those; the samples' actions are absolute all the same. `normalization`: "mean_std" or
    "percentile", see `statistics`. `augment`: the fields of `Augment`; None is off. `cache_dir`:
    where decoded frames are kept; None is $ATLAS_CACHE/frames, or ~/.cache/atlas/frames.

    `on_missing`: "skip" leaves out episodes of which a file is not there, and says which; "error"
    raises. `on_bad`: "skip" leaves out episodes of which a file is empty or cut short, and says
    which. It keeps rows that are not finite and gives the samples that see them as they are, for
    who reads them to skip; statistics, baselines and `blocks` are without them. None and "error"
    raise.

    Raises ConfigError with key, value and remedy. Videos are decoded by `prepare`, or when a
    first sample is asked for.
    """

    root: str | Path
    split: str = "train"
    cameras: Sequence[str] | None = None
    image_size: Sequence[int] = (56, 56)
    state_key: str = "observation.state"
    action_key: str | None = "action"
    action_offset: int | None = None
    horizon: int = 8
    interval: float | None = None
    history: int = 4
    relative: bool = True
    normalization: str = "mean_std"
    augment: Mapping[str, Any] | None = None
    val_episodes: int = 2
    on_missing: str = "skip"
    on_bad: str | None = None
    revision: str | None = None
    cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        _raise(_wrong_values(self) + _missing_packages())
        self._augment = _augment(self.augment)
        recordings = open_recordings(find_root(self.root, self.revision))
        self.cameras = list(recordings.cameras if self.cameras is None else self.cameras)
        _raise(_wrong_keys(self, recordings))
        self.fps = float(recordings.info["fps"])
        self._stride = _stride(self.interval, self.fps)
        usable, self.missing = find_episodes(recordings, self.cameras, self.on_missing, self.on_bad)
        self.episodes = split_episodes(usable, self.split, self.val_episodes, self.root)
        tables = _read_tables(self, recordings, self.episodes)
        if self.action_offset is None:
            # From the folder's first episode, so that both splits come to the same.
            first = _read_tables(self, recordings, usable[:1])[0]
            self.action_offset = 0 if first.has_commands else self._stride
        ahead = self.action_offset + self._stride * np.arange(self.horizon)
        self._rows = Rows(tables, self.history, ahead)
        _raise(_no_samples(self, self._rows))
        self._recordings = recordings
        self.action_names = recordings.names(self.action_key or self.state_key)
        folder = Path(self.cache_dir).expanduser() if self.cache_dir else cache_folder("frames")
        self._cache = FrameCache(folder, *map(int, self.image_size))
        self._videos = [
            [
                Video(clip.path, len(table.state), self.fps, clip.start)
                for clip in (recordings.episodes[e].clips[camera] for camera in self.cameras)
            ]
            for e, table in zip(self.episodes, tables, strict=True)
        ]
        self._files: list[list[Path]] = []  # of frames, by episode and camera, once prepared

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: as in `batch`, without the leading dimension, `instruction` a str."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {key: value[0] for key, value in self.batch([index]).items()}

    def batch(
        self, ids: Sequence[int], seeds: Sequence[int] | None = None, *, images: bool = True
    ) -> dict[str, Any]:
        """The samples `ids`, collated; augmented by one seed a sample, if at all.

        `images` uint8 [B, V, 3, H, W], left out where they are not wanted; `state` float32
        [B, K, S], oldest first, the first row repeated before the episode's begin; `instruction`
        list of str; `actions` float32 [B, T, A] in the data's units; `action_mask` bool [B, T],
        False past the episode's end.
        """
        rows = self._rows.samples[np.asarray(ids, np.int64)]
        state, actions, mask = self._rows.vectors(rows)
        batch = {
            "state": torch.from_numpy(state),
            "instruction": [
                self._recordings.tasks[task] for task in self._rows.task[rows].tolist()
            ],
            "actions": torch.from_numpy(actions),
            "action_mask": torch.from_numpy(mask),
        }
        if images:
            pixels = torch.from_numpy(self._images(rows))
            if seeds is not None:
                pixels = self._augment(pixels, self.cameras or [], seeds)
            batch["images"] = pixels
        return batch

    def describe(self, index: int) -> str:
        """Where a sample was recorded: episode, table and row (from 0), videos and second.

        The row is the file's, also where several episodes are in it; rows that are not finite and
        that the sample sees are named too.
        """
        rows = self._rows
        row = int(rows.samples[index])
        place, frame = int(rows.episode[row]), int(row - rows.begin[row])
        episode = self._recordings.episodes[self.episodes[place]]
        parts = [f"{self._relative(episode.table)} row {rows.in_file(row)}"]
        parts += [
            f"{self._relative(video.path)} at {video.start + frame / self.fps:.6g} s"
            for video in self._videos[place]
        ]
        bad = ", ".join(map(str, rows.bad_rows(row)))
        return f"episode {episode.index}: {', '.join(parts)}" + (
            f"; bad rows: {bad}" if bad else ""
        )

    def prepare(self) -> None:
        """Decode what is not in the frame cache yet; several processes share the work.

        Raises ConfigError naming every video that is damaged or too short.
        """
        if not self._files:
            self._cache.fill([video for videos in self._videos for video in videos])
            self._files = [[self._cache.file(video) for video in videos] for videos in self._videos]

    @property
    def augments(self) -> bool:
        """Whether a sample's images depend on its seed."""
        return self._augment.changes and bool(self._augment.views(self.cameras or []))

    @property
    def episode(self) -> np.ndarray:
        """[N], the place in `episodes` of the episode that each sample is of."""
        return self._rows.episode[self._rows.samples]

    def image_blocks(self) -> list[tuple[str, int]]:
        """For each episode: what tells its pixels from all others, and its number of frames."""
        return [
            ("|".join(self._cache.file(video).name for video in videos), videos[0].frames)
            for videos in self._videos
        ]

    def block_images(self, block: int, start: int, stop: int) -> torch.Tensor:
        """uint8 [stop - start, V, 3, H, W], frames of the episode in place `block`."""
        first = int(np.searchsorted(self._rows.episode, block))
        return torch.from_numpy(self._images(first + np.arange(start, stop)))

    def image_places(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The block and the frame in it of each sample's images, [B] and [B]."""
        return self._frames(self._rows.samples[np.asarray(ids, np.int64)])

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What a model must know of the data, all of it from the training split; plain values.

        The statistics of `velocity` are of a state less the one before it: a robot moves little in
        a frame, so that in the scale of the states its motion would not be seen.
        """
        if self.split != "train":
            return replace(self, split="train").spec
        rows, kind, tasks = self._rows, self.normalization, self._recordings.tasks
        instructions = " ".join(tasks[task] for task in np.unique(rows.task).tolist())
        count = len(rows.states)
        return {
            "cameras": list(self.cameras or []),
            "image_size": [self._cache.height, self._cache.width],
            "state_dim": rows.states.shape[1],
            "history": self.history,
            "action_dim": rows.targets.shape[1],
            "horizon": self.horizon,
            "fps": self.fps,
            "interval": self._stride / self.fps,
            "vocabulary": sorted(set(re.findall(r"[^\W_]+", instructions.lower()))),
            "relative": self.relative,
            "normalization": kind,
            "statistics": {
                "state": statistics([rows.finite_states], count, kind),
                "velocity": statistics([rows.velocities], count, kind),
                "actions": statistics(self._all_targets(), len(self) * self.horizon, kind),
            },
        }

    def baselines(self, train: LeRobot) -> dict[str, float]:
        """Mean absolute errors, over this split's valid elements, of what needs no network.

        `mean_action`: the training split's mean target; where targets and states are of one size,
        also `hold_state`: the current state, and `ridge`: it and a linear function of the
        differences between the states of the history, fitted to the training split.
        """
        errors = measure(fit(train.blocks), self.blocks())
        return {name: error.mean for name, error in errors.items()}

    def blocks(self) -> Iterator[Block]:
        """State, absolute targets and mask of all finite samples, some thousands at a time."""
        return self._rows.blocks()

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._recordings.root).as_posix()

    def _frames(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The place of each row's episode, and the number of the row's frame in it."""
        return self._rows.episode[rows], rows - self._rows.begin[rows]

    def _images(self, rows: np.ndarray) -> np.ndarray:
        self.prepare()
        cache = self._cache
        shape = (len(rows), len(self._videos[0]), 3, cache.height, cache.width)
        images = np.empty(shape, np.uint8)
        places = zip(*(part.tolist() for part in self._frames(rows)), strict=True)
        for sample, (episode, frame) in enumerate(places):
            for view, file in enumerate(self._files[episode]):
                images[sample, view] = open_array(file)[frame]
        return images

    def _all_targets(self) -> Iterator[np.ndarray]:
        """What a model is to predict: the valid targets of all finite chunks, [*, A]."""
        for state, actions, mask in self.blocks():
            yield (actions - state[:, -1:] if self.relative else actions)[mask]


def _augment(settings: Mapping[str, Any] | None) -> Augment:
    known = [field.name for field in fields(Augment)]
    unknown = [key for key in settings or {} if key not in known]
    _raise([f"data.augment.{key} is unknown{nearest(key, known)}" for key in unknown])
    return Augment(**(settings or {}))


def _stride(interval: float | None, fps: float) -> int:
    """Frames between the targets of a chunk."""
    if interval is None:
        return 1
    frames = interval * fps
    if round(frames) < 1 or abs(frames - round(frames)) > 0.01 * frames:
        raise ConfigError(
            f"data.interval={interval} s is {frames:g} frames at {fps:g} frames/s, and must be a "
            f"whole number of them, such as {max(1, round(frames)) / fps:.6g}"
        )
    return round(frames)


def _wrong_values(data: LeRobot) -> list[str]:
    """What can be told without a look at the folder."""
    problems = []
    for name, least in (("horizon", 1), ("history", 1), ("val_episodes", 0)):
        value = getattr(data, name)
        if not isinstance(value, int) or value < least:
            problems.append(f"data.{name}={value} must be a whole number from {least} up")
    offset = data.action_offset
    if offset is not None and (not isinstance(offset, int) or offset < 0):
        problems.append(f"data.action_offset={offset} must be null or a number of rows from 0 up")
    size = data.image_size
    if isinstance(size, int) or [isinstance(n, int) and n > 0 for n in size] != [True, True]:
        problems.append(f"data.image_size={size} must be two numbers of pixels, as [56,56] (H, W)")
    if isinstance(data.cameras, str):
        problems.append(f"data.cameras={data.cameras} must be a list, as [{data.cameras}]")
    if data.interval is not None and not data.interval > 0:
        problems.append(f"data.interval={data.interval} must be null or a number of s above 0")
    for name, choices in (
        ("split", ("train", "val")),
        ("on_missing", ("skip", "error")),
        ("on_bad", (None, "skip", "error")),
        ("normalization", KINDS),
    ):
        if (value := getattr(data, name)) not in choices:
            known = [choice for choice in choices if choice is not None]
            problems.append(f"data.{name}={value} is unknown{nearest(str(value), known)}")
    return problems


def _missing_packages() -> list[str]:
    missing = [name for name in ("pyarrow", "av") if find_spec(name) is None]
    if not missing:
        return []
    return [f"data=lerobot needs {' and '.join(missing)}: pip install -e '.[vla]'"]


def _wrong_keys(data: LeRobot, recordings: Recordings) -> list[str]:
    """What does not fit the features that meta/info.json names."""
    problems = []
    if not data.cameras:
        problems.append(
            "data.cameras is empty, and a sample has a frame of at least one camera"
            f"{nearest('', recordings.cameras)}"
        )
    for camera in data.cameras or []:
        if camera not in recordings.cameras:
            problems.append(
                f"data.cameras: {camera} is no video{nearest(camera, recordings.cameras)}"
            )
    sizes = recordings.vectors
    for name in ("state_key", "action_key"):
        key = getattr(data, name)
        if key not in sizes and (key is not None or name == "state_key"):
            problems.append(f"data.{name}={key} is no vector of floats{nearest(str(key), sizes)}")
    if problems or data.action_key is None:
        return problems
    state, action = sizes[data.state_key], sizes[data.action_key]
    if data.relative and state != action:
        problems.append(
            f"data.relative=true takes {data.action_key} ({action} numbers) less {data.state_key} "
            f"({state} numbers), which must be of one size; set data.relative=false"
        )
    return problems


def _read_tables(data: LeRobot, recordings: Recordings, episodes: list[int]) -> list[Table]:
    """The tables of `episodes`; what is wrong with any of them in one message."""
    tables, problems = [], []
    keys, on_bad = (data.state_key, data.action_key), data.on_bad or "error"
    for episode in episodes:
        try:
            tables.append(recordings.read(episode, *keys, on_bad=on_bad))
        except ConfigError as error:
            problems += error.problems
    _raise(problems)
    return tables


def _no_samples(data: LeRobot, rows: Rows) -> list[str]:
    if not len(rows):
        return [
            f"data.action_offset={data.action_offset} is past the end of every episode of the "
            f"split {data.split}; the longest has {rows.lengths.max()} rows"
        ]
    if next(rows.blocks(), None) is None:
        return [
            f"data.on_bad=skip: every sample of the split {data.split} under data.root={data.root} "
            "sees a row that is NaN or infinite; mend the tables, or choose other columns"
        ]
    return []


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)
