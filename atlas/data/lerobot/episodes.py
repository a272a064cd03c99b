"""The usable episodes of a folder, and the episodes of a split."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from atlas.data.lerobot.damage import MISSING, find_damage
from atlas.data.lerobot.recordings import Recordings
from atlas.errors import ConfigError

logger = logging.getLogger("atlas")

LISTED = 10  # episodes that a message lists by number
NO_ROWS = "has no rows"

Unusable = dict[int, tuple[Path, str]]  # by episode: its first bad file, and what is wrong with it


def find_episodes(
    recordings: Recordings, cameras: Sequence[str], on_missing: str, on_bad: str | None
) -> tuple[list[int], list[int]]:
    """Return the episodes whose files are all complete, and the other episodes.

    Logs a warning that lists the others, once a process. Raises ConfigError if a file is missing
    and `on_missing` is "error", or if a file is damaged and `on_bad` is not "skip".
    """
    unusable = _unusable(recordings, cameras)
    found = [
        ("data.on_missing", on_missing, _missing_episodes(recordings, unusable)),
        ("data.on_bad", on_bad, _damaged_episodes(recordings, unusable)),
    ]
    problems = [
        f"{text}; copy them again, or leave them out: {key}=skip"
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
    """Return the episodes of the split, at least one: "val" has the last `val_episodes`."""
    if not usable:
        raise ConfigError(f"data.root={root} has no complete episode; copy its files again")
    first_val = max(len(usable) - val_episodes, 0)
    episodes = usable[:first_val] if split == "train" else usable[first_val:]
    if not episodes:
        raise ConfigError(
            f"data.val_episodes={val_episodes} of the {len(usable)} episodes under "
            f"data.root={root} leaves none for the split {split}; "
            + ("set fewer" if split == "train" else "set at least one")
        )
    return episodes


def _unusable(recordings: Recordings, cameras: Sequence[str]) -> Unusable:
    found: Unusable = {}
    for number, episode in recordings.episodes.items():
        if not episode.length:
            found[number] = (recordings.root / recordings.episodes_file, NO_ROWS)
            continue
        for file in episode.files(list(cameras)):
            if problem := find_damage(file):
                found[number] = (file, problem)
                break
    return found


def _missing_episodes(recordings: Recordings, unusable: Unusable) -> list[str]:
    """Return a sentence about the episodes with a missing file, if there are any."""
    missing = [number for number, (_, problem) in unusable.items() if problem == MISSING]
    if not missing:
        return []
    listed = ", ".join(map(str, missing[:LISTED])) + ", …" * (len(missing) > LISTED)
    return [
        f"{_count(recordings, missing)} are missing: {listed} (the first missing file: "
        f"{unusable[missing[0]][0]})"
    ]


def _damaged_episodes(recordings: Recordings, unusable: Unusable) -> list[str]:
    """Return a sentence about the episodes with a damaged file, if there are any."""
    damaged = {n: fault for n, fault in unusable.items() if fault[1] != MISSING}
    if not damaged:
        return []
    files = [f"{n} ({file} {problem})" for n, (file, problem) in damaged.items()]
    listed = ", ".join(files[:LISTED]) + ", …" * (len(files) > LISTED)
    return [f"{_count(recordings, list(damaged))} are damaged: {listed}"]


def _count(recordings: Recordings, some: list[int]) -> str:
    total = len(recordings.episodes)
    return f"{recordings.root}: {len(some)} of the {total} episodes in {recordings.episodes_file}"


@lru_cache  # both splits find the same
def _warn_once(message: str) -> None:
    logger.warning(message)
