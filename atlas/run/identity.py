"""The identity of a run: the part of its configuration that its id hashes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from atlas.config.dotted import lookup, select
from atlas.config.schema import BATCH_SPLIT, EXCLUDED
from atlas.system.files import digest

ID_LENGTH = 10


def effective_batch(config: Mapping[str, Any], world_size: int) -> int:
    """Return how many samples one update sees: per-rank batch size x micro-batches x world size."""
    return world_size * math.prod(lookup(config, key)[1] for key in BATCH_SPLIT)


def identity(config: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """Return the nested part of a resolved `config` that determines the result of the run.

    Keys that Atlas does not know, the user's own, belong to it.
    """
    left_out = EXCLUDED | BATCH_SPLIT
    # Null and an empty section are the same as a missing key, so that new keys do not change ids.
    kept = select(config, lambda key, value: key not in left_out and value is not None)
    kept["effective_batch"] = effective_batch(config, world_size)
    return kept


def frozen_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a frozen configuration, whose head has the world size."""
    return identity(config, config["run"]["world_size"])


def run_id(identity: Mapping[str, Any]) -> str:
    """Return ten hexadecimal digits of the SHA-256 of `identity`, the same in every process."""
    text = json.dumps(_canonical(identity), sort_keys=True, separators=(",", ":"))
    return digest(text)[:ID_LENGTH]


def is_excluded(key: str) -> bool:
    """Return whether the dotted `key` can be overridden without making another run."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in EXCLUDED for n in range(1, len(parts) + 1))


def _canonical(value: Any) -> Any:
    """Return `value` with whole floats as integers: 1.0 and 1 are the same run."""
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
