"""What makes a run the run it is: the part of a configuration that its id hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from atlas.system.files import digest

# What can change without changing the result: where a run runs, how it is watched, how often it is
# saved. Everything that is not named here (a person's own keys too) is part of the identity.
EXCLUDED = frozenset(
    {
        "name",
        "outputs",
        "objective",
        "resume",
        "fresh",
        "dry_run",
        "run",  # the head that Atlas adds to a frozen configuration
        "cluster",
        "tracking",
        "data.workers",
        "data.cache_dir",
        "data.train.cache_dir",
        "data.val.cache_dir",
        "trainer.log_interval",
        "trainer.log_samples",
        "trainer.save_interval",
        "trainer.save_minutes",
        "trainer.keep",
        "trainer.max_time",
        "trainer.progress",
    }
)
# How the effective batch is cut over ranks and micro-batches; the effective batch itself counts.
CUT = frozenset({"data.batch_size", "trainer.accumulate"})
ID_LENGTH = 10


def effective_batch(config: Mapping[str, Any], world_size: int) -> int:
    """Samples in one update: per-GPU batch size x world size x micro-batches."""
    return int(config["data"]["batch_size"]) * world_size * int(config["trainer"]["accumulate"])


def identity(config: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """The nested part of a resolved `config` that determines the result of the run."""
    kept = _without(config, EXCLUDED | CUT, "")
    kept["effective_batch"] = effective_batch(config, world_size)
    return kept


def run_id(identity: Mapping[str, Any]) -> str:
    """Ten hexadecimal digits of the SHA-256 of `identity`; the same in every process."""
    text = json.dumps(_canonical(identity), sort_keys=True, separators=(",", ":"))
    return digest(text)[:ID_LENGTH]


def is_excluded(key: str) -> bool:
    """Whether the dotted `key` can be overridden without making another run."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in EXCLUDED for n in range(1, len(parts) + 1))


def _without(node: Mapping[str, Any], excluded: frozenset[str], prefix: str) -> dict[str, Any]:
    """`node` less excluded keys and null leaves: a key that is null is as if it were not there."""
    out: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        if name in excluded or value is None:
            continue
        if isinstance(value, Mapping):
            value = _without(value, excluded, f"{name}.")
            if not value:
                continue
        out[str(key)] = value
    return out


def _canonical(value: Any) -> Any:
    """1.0 and 1 are the same number on a command line, so they are the same run."""
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
