"""A configuration in one file with the keys `training.*` and `data.*`, translated to overrides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from atlas.config.dotted import flatten
from atlas.errors import ConfigError, nearest

KEYS = {
    "training.learning_rate": "optim.lr",
    "training.warmup_steps": "schedule.warmup",
    "training.total_steps": "trainer.steps",
    "training.gradient_accumulation_steps": "trainer.accumulate",
    "training.val_interval": "trainer.val_interval",
    "training.batch_size": "data.batch_size",
    "data.batch_size": "data.batch_size",
}
MULTIPLIERS = "training.lr_multipliers"


def overrides_of(file: str) -> list[str]:
    """Return the overrides that give the values in `file`."""
    return overrides(read(Path(file)), file)


def read(path: Path) -> Mapping[str, Any]:
    """Return the values of the file; raise `ConfigError` if it is not readable YAML."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"--config {path}: it must hold a mapping with training: and data:")
    return values


def overrides(values: Mapping[str, Any], file: str) -> list[str]:
    """Return overrides for the `values` of `file`; raise `ConfigError` with every problem in them."""
    known = [*KEYS, MULTIPLIERS]
    found = {key: value for key, value in flatten(values).items() if value != {}}
    problems = [
        f"{file}: {key} is not a key of this file{nearest(key, known)}"
        for key in found
        if key not in KEYS and not key.startswith(f"{MULTIPLIERS}.")
    ]
    sizes = {found[key] for key in ("training.batch_size", "data.batch_size") if key in found}
    if len(sizes) > 1:
        problems.append(
            f"{file}: training.batch_size={found['training.batch_size']} and "
            f"data.batch_size={found['data.batch_size']} differ; both are the batch size per GPU, "
            "so keep one of them"
        )
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys(_override(key, value) for key, value in found.items()))


def _override(key: str, value: Any) -> str:
    if key.startswith(f"{MULTIPLIERS}."):
        # In braces: dots in a module's path are part of the key, not levels.
        return f"++optim.lr_multipliers={{{key.removeprefix(f'{MULTIPLIERS}.')}:{value}}}"
    return f"{KEYS[key]}={'null' if value is None else value}"
