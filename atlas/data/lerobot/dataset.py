"""Robot recordings in LeRobot's formats as samples: camera images, states and action chunks.

A sample is a frame of an episode: the images of the cameras, the states up to the frame, the
instruction, and the actions that follow. Unusable episodes are left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atlas.data.arrays import cache_folder, open_array
from atlas.data.baselines import Vectors, fit, measure
from atlas.data.lerobot.arguments import (
    augment_of,
    feature_problems,
    raise_problems,
    sample_problems,
    stride_of,
    value_problems,
)
from atlas.data.lerobot.episodes import find_episodes, split_episodes
from atlas.data.lerobot.formats import open_recordings
from atlas.data.lerobot.hub import find_root
from atlas.data.lerobot.recordings import Recordings, Table
from atlas.data.lerobot.rows import Rows
from atlas.data.lerobot.statistics import statistics
from atlas.data.lerobot.video import FrameCache, Video


@dataclass(eq=False)
class LeRobot:
    """A map-style data set of one split of the LeRobot folder `root`, format v2.1 or v3.0.

    `root`: a folder or, if no such folder exists, the name of a data set on the hub, with
    `revision` as its tag or commit. `val_episodes`: the last so many usable episodes are the split
    "val", all others "train". `cameras`: keys of video features, in the order of the views; None
    is all. `image_size`: [H, W] that whole frames are resized to, without keeping their aspect.
    `history`: number K of states in a sample, one frame apart, the current state last. `horizon`:
    number T of actions in a chunk; `interval`: seconds between two of them, a multiple of a
    frame's duration; None is one frame.

    `action_key`: None uses the following states as actions. `action_offset`: number of rows from a
    frame to its first action. None chooses it: 0 if the recorded actions are commands of their
    own; one interval if an action equals the state of its row (or none is recorded), because then
    the action of the current row could be predicted by copying the current state.

    `relative`: the model predicts actions minus the current state, so the statistics are those of
    the differences; the actions in a sample are absolute in any case. `normalization`: "mean_std"
    or "percentile", see `statistics`. `augment`: the fields of `Augment`; None is off.
    `cache_dir`: folder for decoded frames; None is $ATLAS_CACHE/frames, or ~/.cache/atlas/frames.

    `on_missing`: "skip" leaves out episodes with a missing file and logs them; "error" raises.
    `on_bad`: "skip" leaves out episodes with an empty or truncated file and logs them; it keeps
    rows that are not finite and returns the samples that include them unchanged, so that the
    reader can skip them, but statistics, baselines and `blocks` ignore those samples. None and
    "error" raise.

    Raises ConfigError with key, value and remedy. Videos are decoded by `prepare`, or when the
    first sample with images is read.
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
        raise_problems(value_problems(self))
        self._augment = augment_of(self.augment)
        self._recordings = recordings = open_recordings(find_root(self.root, self.revision))
        self.cameras = list(recordings.cameras if self.cameras is None else self.cameras)
        raise_problems(feature_problems(self, recordings))
        self.fps = float(recordings.info["fps"])
        self._stride = stride_of(self.interval, self.fps)
        self.action_names = recordings.entry_names(self.action_key or self.state_key)
        usable, self.missing = find_episodes(recordings, self.cameras, self.on_missing, self.on_bad)
        self.episodes = split_episodes(usable, self.split, self.val_episodes, self.root)
        tables = self._read_tables(self.episodes)
        if self.action_offset is None:
            # From the folder's first usable episode, so that both splits get the same offset.
            first = self._read_tables(usable[:1])[0]
            self.action_offset = 0 if first.has_commands else self._stride
        ahead = self.action_offset + self._stride * np.arange(self.horizon)
        self._rows = Rows(tables, self.history, ahead)
        raise_problems(sample_problems(self, self._rows))
        folder = Path(self.cache_dir).expanduser() if self.cache_dir else cache_folder("frames")
        self._cache = FrameCache(folder, *map(int, self.image_size))
        self._videos = [
            self._videos_of(recordings, episode, len(table.state))
            for episode, table in zip(self.episodes, tables, strict=True)
        ]
        self._files: list[list[Path]] = []  # of frames, by episode and camera; set by `prepare`

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample: as `batch`, without the first dimension, `instruction` a str."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {key: value[0] for key, value in self.batch([index]).items()}

    def batch(
        self, ids: Sequence[int], seeds: Sequence[int] | None = None, *, images: bool = True
    ) -> dict[str, Any]:
        """Return the collated batch of the samples `ids`.

        `images` uint8 [B, V, 3, H, W], not with images=False; `state` float32 [B, K, S], oldest
        first, the first row repeated at the start of an episode; `instruction` list of str;
        `actions` float32 [B, T, A] in the data's units; `action_mask` bool [B, T], False past the
        episode's end. `seeds`: one seed a sample for random augmentation; None does not augment.
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
        """Return where a sample was recorded: episode, table and row (from 0), videos and second.

        The row is counted from the start of the file, which can hold several episodes. Rows of the
        sample that are not finite are listed too.
        """
        rows = self._rows
        row = int(rows.samples[index])
        place, frame = int(rows.episode[row]), int(row - rows.begin[row])
        episode = self._recordings.episodes[self.episodes[place]]
        parts = [f"{self._path_in_root(episode.table)} row {rows.in_file(row)}"]
        parts += [
            f"{self._path_in_root(video.path)} at {video.start + frame / self.fps:.6g} s"
            for video in self._videos[place]
        ]
        bad = ", ".join(map(str, rows.bad_rows(row)))
        return f"episode {episode.index}: {', '.join(parts)}" + (
            f"; bad rows: {bad}" if bad else ""
        )

    def prepare(self) -> None:
        """Decode the videos that are not in the frame cache yet; several processes share the work.

        Raises ConfigError that names every damaged or too short video.
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
        """[N], the index in `episodes` of the episode that each sample belongs to."""
        return self._rows.episode[self._rows.samples]

    def image_blocks(self) -> list[tuple[str, int]]:
        """Return a name that identifies the pixels, and the number of frames, of every episode."""
        return [
            ("|".join(self._cache.file(video).name for video in videos), videos[0].frames)
            for videos in self._videos
        ]

    def block_images(self, block: int, start: int, stop: int) -> torch.Tensor:
        """Return frames `start` to `stop` of an episode, uint8 [stop - start, V, 3, H, W].

        `block`: the episode's index in `episodes`.
        """
        first = int(np.searchsorted(self._rows.episode, block))
        return torch.from_numpy(self._images(first + np.arange(start, stop)))

    def image_places(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the block and the frame inside it of each sample's images, [B] each."""
        return self._frames(self._rows.samples[np.asarray(ids, np.int64)])

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What a model must know about the data, from the training split; plain values.

        `velocity` has the statistics of a state minus the state before it. A robot moves little
        within a frame, so its motion would be invisible at the scale of the states.
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
        """Return the mean absolute errors of predictions without learning, over valid elements.

        `mean_action`: the mean action of `train`. If actions and states have the same size, also
        `hold_state`: the current state; and `ridge`: the current state plus a linear function of
        the differences between the states of the history, fitted on `train`.
        """
        errors = measure(fit(train.blocks), self.blocks())
        return {name: error.mean for name, error in errors.items()}

    def blocks(self) -> Iterator[Vectors]:
        """Yield states, absolute actions and masks of all finite samples, thousands at a time."""
        return self._rows.batches()

    def _read_tables(self, episodes: list[int]) -> list[Table]:
        keys = self.state_key, self.action_key
        return self._recordings.read_all(episodes, *keys, on_bad=self.on_bad or "error")

    def _videos_of(self, recordings: Recordings, episode: int, frames: int) -> list[Video]:
        """Return the videos of an episode, one for each camera."""
        clips = [recordings.episodes[episode].clips[camera] for camera in self.cameras or []]
        return [Video(clip.path, frames, self.fps, clip.start) for clip in clips]

    def _path_in_root(self, path: Path) -> str:
        return path.relative_to(self._recordings.root).as_posix()

    def _frames(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the episode's index and the frame inside the episode of each row."""
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
        """Yield what the model is to predict: valid actions, relative if so configured, [*, A]."""
        for state, actions, mask in self.blocks():
            yield (actions - state[:, -1:] if self.relative else actions)[mask]
