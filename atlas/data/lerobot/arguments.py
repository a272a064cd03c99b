"""Checks of the arguments of `LeRobot`: each returns problems, with key, value and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from atlas.data.augment import Augment
from atlas.data.lerobot.recordings import Recordings
from atlas.data.lerobot.rows import Rows
from atlas.data.lerobot.statistics import KINDS
from atlas.errors import ConfigError, nearest

if TYPE_CHECKING:
    from atlas.data.lerobot.dataset import LeRobot

CHOICES: dict[str, tuple[str | None, ...]] = {
    "split": ("train", "val"),
    "on_missing": ("skip", "error"),
    "on_bad": (None, "skip", "error"),
    "normalization": KINDS,
}


def raise_problems(problems: list[str]) -> None:
    """Raise `ConfigError` if there are problems."""
    if problems:
        raise ConfigError(problems)


def value_problems(data: LeRobot) -> list[str]:
    """Return the problems that can be found without reading the folder."""
    return [
        *_number_problems(data),
        *_list_problems(data),
        *_choice_problems(data),
        *_package_problems(),
    ]


def _number_problems(data: LeRobot) -> list[str]:
    problems = []
    for name, least in (("horizon", 1), ("history", 1), ("val_episodes", 0)):
        value = getattr(data, name)
        if not isinstance(value, int) or value < least:
            problems.append(f"data.{name}={value} must be a whole number of at least {least}")
    offset = data.action_offset
    if offset is not None and (not isinstance(offset, int) or offset < 0):
        problems.append(f"data.action_offset={offset} must be null or a number of rows from 0 up")
    if data.interval is not None and not data.interval > 0:
        problems.append(f"data.interval={data.interval} must be null or seconds above 0")
    return problems


def _list_problems(data: LeRobot) -> list[str]:
    problems, size = [], data.image_size
    if isinstance(size, int) or [isinstance(n, int) and n > 0 for n in size] != [True, True]:
        problems.append(f"data.image_size={size} must be two numbers of pixels, as [56,56] (H, W)")
    if isinstance(data.cameras, str):
        problems.append(f"data.cameras={data.cameras} must be a list, as [{data.cameras}]")
    return problems


def _choice_problems(data: LeRobot) -> list[str]:
    problems = []
    for name, choices in CHOICES.items():
        if (value := getattr(data, name)) not in choices:
            known = [choice for choice in choices if choice is not None]
            problems.append(f"data.{name}={value} is unknown{nearest(str(value), known)}")
    return problems


def _package_problems() -> list[str]:
    missing = [name for name in ("pyarrow", "av") if find_spec(name) is None]
    if not missing:
        return []
    return [f"data=lerobot needs {' and '.join(missing)}: pip install -e '.[vla]'"]


def feature_problems(data: LeRobot, recordings: Recordings) -> list[str]:
    """Return the contradictions between the arguments and the features in meta/info.json."""
    problems = [*_camera_problems(data, recordings), *_column_problems(data, recordings)]
    if problems or data.action_key is None:
        return problems
    state, action = recordings.vectors[data.state_key], recordings.vectors[data.action_key]
    if data.relative and state != action:
        problems.append(
            f"data.relative=true subtracts {data.state_key} ({state} numbers) from "
            f"{data.action_key} ({action} numbers), which must have the same size; "
            "set data.relative=false"
        )
    return problems


def _camera_problems(data: LeRobot, recordings: Recordings) -> list[str]:
    if not data.cameras:
        return [
            "data.cameras is empty, but a sample needs images of at least one camera"
            f"{nearest('', recordings.cameras)}"
        ]
    return [
        f"data.cameras: {camera} is not a video{nearest(camera, recordings.cameras)}"
        for camera in data.cameras
        if camera not in recordings.cameras
    ]


def _column_problems(data: LeRobot, recordings: Recordings) -> list[str]:
    problems = []
    keys = {"state_key": data.state_key, "action_key": data.action_key}
    for name, key in keys.items():
        optional = name == "action_key" and key is None
        if key not in recordings.vectors and not optional:
            hint = nearest(str(key), recordings.vectors)
            problems.append(f"data.{name}={key} is not a vector of floats{hint}")
    return problems


def sample_problems(data: LeRobot, rows: Rows) -> list[str]:
    """Return why the split has no usable sample, if so."""
    if not len(rows):
        return [
            f"data.action_offset={data.action_offset} is past the end of every episode of the "
            f"split {data.split}, of which the longest has {rows.lengths.max()} rows; set a "
            "smaller one"
        ]
    if next(rows.batches(), None) is None:
        return [
            f"data.on_bad=skip: every sample of the split {data.split} under data.root={data.root} "
            "includes a row that is NaN or infinite; repair the tables, or choose other columns"
        ]
    return []


def augment_of(settings: Mapping[str, Any] | None) -> Augment:
    """Return the augmentation of `data.augment`; None is off. Raises `ConfigError`."""
    known = [field.name for field in fields(Augment)]
    unknown = [key for key in settings or {} if key not in known]
    raise_problems([f"data.augment.{key} is unknown{nearest(key, known)}" for key in unknown])
    return Augment(**(settings or {}))


def stride_of(interval: float | None, fps: float) -> int:
    """Return the frames between two targets that are `interval` seconds apart; None is 1 frame."""
    if interval is None:
        return 1
    frames = interval * fps
    if round(frames) < 1 or abs(frames - round(frames)) > 0.01 * frames:
        raise ConfigError(
            f"data.interval={interval} s is {frames:g} frames at {fps:g} frames/s, but must be a "
            f"whole number of frames; set for example {max(1, round(frames)) / fps:.6g}"
        )
    return round(frames)
