"""Robot recordings in LeRobot's formats as samples of camera frames, states and action chunks.

A sample is a frame of an episode: what the cameras see in it, the states up to it, its instruction
and the targets that follow. Episodes of which a file is missing are left out and counted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atlas.data.arrays import cache_folder, open_array
from atlas.data.augment import Augment
from atlas.data.baselines import Block, fit, measure
from atlas.data.formats import open_recordings
from atlas.data.hub import find_root
from atlas.data.recordings import Recordings, Table
from atlas.data.statistics import KINDS, statistics
from atlas.data.video import FrameCache, Video
from atlas.errors import ConfigError, nearest

logger = logging.getLogger("atlas")

BLOCK = 4096  # samples at a time where all are gone through, so that memory stays small
NAMED = 10  # missing episodes that a message names one by one


@dataclass(eq=False)
class LeRobot:
    """A map-style data set over one split of the LeRobot folder `root`, format v2.1 or v3.0.

    `root`: a folder or, where there is none of that name, a data set on the hub, of which
    `revision` says the tag or commit. `val_episodes`: the last so many of the episodes that are
    there are the split "val", all before them "train". `cameras`: keys of video features, in the
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
    "percentile", see `statistics`. `augment`: the fields of `Augment`; None is off. `on_missing`:
    "skip" leaves out episodes of which a file is not there and says how many, "error" raises.
    `cache_dir`: where decoded frames are kept; None is $ATLAS_CACHE/frames, or
    ~/.cache/atlas/frames.

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
        present, self.missing = _find_episodes(self, recordings)
        self.episodes = _split_episodes(self, present)
        tables = _read_tables(self, recordings)
        if self.action_offset is None:
            # From the folder's first episode, so that both splits come to the same.
            first = recordings.read(present[0], self.state_key, self.action_key)
            self.action_offset = 0 if first.has_commands else self._stride
        self._index(tables)
        self._tasks = recordings.tasks
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

    def _index(self, tables: list[Table]) -> None:
        """Put the episodes' rows after each other, and remember where each begins and ends."""
        lengths = np.array([len(table.state) for table in tables])
        ends = np.cumsum(lengths)
        self._states = np.concatenate([table.state for table in tables])
        targets = [table.state if table.action is None else table.action for table in tables]
        self._targets = np.concatenate(targets)
        self._task = np.concatenate([table.task for table in tables])
        self._episode = np.repeat(np.arange(len(tables)), lengths)
        self._begin = np.repeat(ends - lengths, lengths)
        self._end = np.repeat(ends, lengths)
        # A sample's row; rows with not one target left in their episode are none.
        rows = np.arange(ends[-1])
        self._row = rows[rows + (self.action_offset or 0) < self._end]
        if not self._row.size:
            raise ConfigError(
                f"data.action_offset={self.action_offset} is past the end of every episode of the "
                f"split {self.split}; the longest has {lengths.max()} rows"
            )

    def __len__(self) -> int:
        return len(self._row)

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
        rows = self._row[np.asarray(ids, np.int64)]
        state, actions, mask = self._vectors(rows)
        batch = {
            "state": torch.from_numpy(state),
            "instruction": [self._tasks[task] for task in self._task[rows].tolist()],
            "actions": torch.from_numpy(actions),
            "action_mask": torch.from_numpy(mask),
        }
        if images:
            pixels = torch.from_numpy(self._images(rows))
            if seeds is not None:
                pixels = self._augment(pixels, self.cameras or [], seeds)
            batch["images"] = pixels
        return batch

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
        return self._episode[self._row]

    def image_blocks(self) -> list[tuple[str, int]]:
        """For each episode: what tells its pixels from all others, and its number of frames."""
        return [
            ("|".join(self._cache.file(video).name for video in videos), videos[0].frames)
            for videos in self._videos
        ]

    def block_images(self, block: int, start: int, stop: int) -> torch.Tensor:
        """uint8 [stop - start, V, 3, H, W], frames of the episode in place `block`."""
        first = int(np.searchsorted(self._episode, block))
        return torch.from_numpy(self._images(first + np.arange(start, stop)))

    def image_places(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The block and the frame in it of each sample's images, [B] and [B]."""
        rows = self._row[np.asarray(ids, np.int64)]
        return self._episode[rows], rows - self._begin[rows]

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What a model must know of the data, all of it from the training split; plain values.

        The statistics of `velocity` are of a state less the one before it: a robot moves little in
        a frame, so that in the scale of the states its motion would not be seen.
        """
        if self.split != "train":
            return replace(self, split="train").spec
        instructions = " ".join(self._tasks[task] for task in np.unique(self._task).tolist())
        rows, kind = len(self._states), self.normalization
        return {
            "cameras": list(self.cameras or []),
            "image_size": [self._cache.height, self._cache.width],
            "state_dim": self._states.shape[1],
            "history": self.history,
            "action_dim": self._targets.shape[1],
            "horizon": self.horizon,
            "fps": self.fps,
            "interval": self._stride / self.fps,
            "vocabulary": sorted(set(re.findall(r"[^\W_]+", instructions.lower()))),
            "relative": self.relative,
            "normalization": kind,
            "statistics": {
                "state": statistics([self._states], rows, kind),
                "velocity": statistics([self._velocities()], rows, kind),
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
        """State, absolute targets and mask of all samples, some thousands at a time."""
        for start in range(0, len(self), BLOCK):
            yield self._vectors(self._row[start : start + BLOCK])

    def _vectors(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """State [B, K, S], absolute targets [B, T, A] and mask [B, T] of samples at `rows`."""
        past = rows[:, None] + np.arange(1 - self.history, 1)
        ahead = (self.action_offset or 0) + self._stride * np.arange(self.horizon)
        future = rows[:, None] + ahead
        end = self._end[rows, None]
        state = self._states[np.maximum(past, self._begin[rows, None])]
        # Past the end the last target again: any finite value would do, the mask leaves it out.
        return state, self._targets[np.minimum(future, end - 1)], future < end

    def _images(self, rows: np.ndarray) -> np.ndarray:
        self.prepare()
        cache = self._cache
        shape = (len(rows), len(self._videos[0]), 3, cache.height, cache.width)
        images = np.empty(shape, np.uint8)
        places = zip(self._episode[rows].tolist(), (rows - self._begin[rows]).tolist(), strict=True)
        for sample, (episode, frame) in enumerate(places):
            for view, file in enumerate(self._files[episode]):
                images[sample, view] = open_array(file)[frame]
        return images

    def _velocities(self) -> np.ndarray:
        """Each row's state less that of the row before it, of rows that have one: [*, S]."""
        within = self._begin[1:] == self._begin[:-1]
        return np.diff(self._states, axis=0)[within]

    def _all_targets(self) -> Iterator[np.ndarray]:
        """What a model is to predict: the valid targets of all chunks, [*, A]."""
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
    if data.interval is not None and not data.interval > 0:
        problems.append(f"data.interval={data.interval} must be null or a number of s above 0")
    for name, choices in (
        ("split", ("train", "val")),
        ("on_missing", ("skip", "error")),
        ("normalization", KINDS),
    ):
        if (value := getattr(data, name)) not in choices:
            problems.append(f"data.{name}={value} is unknown{nearest(str(value), choices)}")
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


def _find_episodes(data: LeRobot, recordings: Recordings) -> tuple[list[int], list[int]]:
    """The episodes of which all files are there, and those of which one is not."""
    present: list[int] = []
    missing: list[int] = []
    first: Path | None = None
    is_file = lru_cache(maxsize=None)(Path.is_file)  # many episodes can be in one file
    for number, episode in recordings.episodes.items():
        files = episode.files(list(data.cameras or []))
        absent = [file for file in files if not is_file(file)]
        (missing if absent else present).append(number)
        first = first or next(iter(absent), None)
    if missing:
        listed = ", ".join(map(str, missing[:NAMED])) + ", …" * (len(missing) > NAMED)
        said = (
            f"{recordings.root}: {len(missing)} of the {len(recordings.episodes)} episodes that "
            f"{recordings.named_in} names are not there: {listed} (the first file: {first})"
        )
        if data.on_missing == "error":
            raise ConfigError(f"{said}; fetch them, or leave them out: data.on_missing=skip")
        _warn_once(f"{said}; they are left out")
    return present, missing


@lru_cache
def _warn_once(message: str) -> None:
    """Both splits find the same; it is said once a process."""
    logger.warning(message)


def _split_episodes(data: LeRobot, present: list[int]) -> list[int]:
    """The episodes of the split, at least one."""
    cut = len(present) - data.val_episodes
    episodes = present[: max(cut, 0)] if data.split == "train" else present[max(cut, 0) :]
    if not episodes:
        raise ConfigError(
            f"data.val_episodes={data.val_episodes} of the {len(present)} episodes under "
            f"data.root={data.root} leaves none for the split {data.split}; "
            + ("take fewer" if data.split == "train" else "take at least one")
            if present
            else f"data.root={data.root} has not one complete episode; fetch its files"
        )
    return episodes


def _read_tables(data: LeRobot, recordings: Recordings) -> list[Table]:
    """The tables of the split's episodes; what is wrong with any of them in one message."""
    tables, problems = [], []
    for episode in data.episodes:
        try:
            tables.append(recordings.read(episode, data.state_key, data.action_key))
        except ConfigError as error:
            problems += error.problems
    _raise(problems)
    return tables


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)
