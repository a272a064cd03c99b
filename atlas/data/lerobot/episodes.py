"""Which episodes of a folder can be used, and which of them a split has."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from atlas.data.lerobot.damage import ABSENT, damage
from atlas.data.lerobot.recordings import Recordings
from atlas.errors import ConfigError

logger = logging.getLogger("atlas")

NAMED = 10  # episodes that a message names one by one
NO_ROWS = "has no rows"

Unusable = dict[int, tuple[Path, str]]  # by episode: the first file at fault, and what it is


def find_episodes(
    recordings: Recordings, cameras: Sequence[str], on_missing: str, on_bad: str | None
) -> tuple[list[int], list[int]]:
    """The episodes of which all files are there and whole, and the others.

    These are warned of by name, once a process; ConfigError where a file is missing and
    `on_missing` is "error", or is damaged and `on_bad` is not "skip".
    """
    unusable = _unusable(recordings, cameras)
    found = [
        ("data.on_missing", on_missing, _absent(recordings, unusable)),
        ("data.on_bad", on_bad, _damaged(recordings, unusable)),
    ]
    problems = [
        f"{text}; copy them anew, or leave them out: {key}=skip"
        for key, value, texts in found
        for text in texts
        if value != "skip"
    ]
    if problems:
        raise ConfigError(problems)
    for text in (text for _, _, texts in found for text in texts):
        _warn_once(f"{text}; they are left out")
    return [e for e in recordings.episodes if e not in unusable], list(unusable)


def split_episodes(usable: list[int], split: str, val_episodes: int, root: str | Path) -> list[int]:
    """The episodes of the split, at least one: the last `val_episodes` are "val"."""
    if not usable:
        raise ConfigError(f"data.root={root} has not one complete episode; fetch its files")
    cut = max(len(usable) - val_episodes, 0)
    episodes = usable[:cut] if split == "train" else usable[cut:]
    if not episodes:
        raise ConfigError(
            f"data.val_episodes={val_episodes} of the {len(usable)} episodes under "
            f"data.root={root} leaves none for the split {split}; "
            + ("take fewer" if split == "train" else "take at least one")
        )
    return episodes


def _unusable(recordings: Recordings, cameras: Sequence[str]) -> Unusable:
    found: Unusable = {}
    for number, episode in recordings.episodes.items():
        if not episode.length:
            found[number] = (recordings.root / recordings.named_in, NO_ROWS)
            continue
        for file in episode.files(list(cameras)):
            if problem := damage(file):
                found[number] = (file, problem)
                break
    return found


def _absent(recordings: Recordings, unusable: Unusable) -> list[str]:
    """A sentence about the episodes of which a file is not there, if there are any."""
    absent = [number for number, (_, problem) in unusable.items() if problem == ABSENT]
    if not absent:
        return []
    listed = ", ".join(map(str, absent[:NAMED])) + ", …" * (len(absent) > NAMED)
    return [
        f"{_of_all(recordings, absent)} are not there: {listed} (the first file: "
        f"{unusable[absent[0]][0]})"
    ]


def _damaged(recordings: Recordings, unusable: Unusable) -> list[str]:
    """A sentence about those of which a file is there and of no use, with the files."""
    damaged = {n: fault for n, fault in unusable.items() if fault[1] != ABSENT}
    if not damaged:
        return []
    files = [f"{n} ({file} {problem})" for n, (file, problem) in damaged.items()]
    listed = ", ".join(files[:NAMED]) + ", …" * (len(files) > NAMED)
    return [f"{_of_all(recordings, list(damaged))} are damaged: {listed}"]


def _of_all(recordings: Recordings, some: list[int]) -> str:
    every = len(recordings.episodes)
    return (
        f"{recordings.root}: {len(some)} of the {every} episodes that {recordings.named_in} names"
    )


@lru_cache
def _warn_once(message: str) -> None:
    """Both splits find the same."""
    logger.warning(message)
