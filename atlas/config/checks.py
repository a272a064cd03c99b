"""Checks of a configuration: without torch, and with all problems reported at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from atlas.config.dotted import flatten, lookup
from atlas.config.keys import Key
from atlas.config.schema import CLOSED, HEAD, KEYS, SECTIONS
from atlas.config.secrets import is_secret, mask_uris
from atlas.errors import ConfigError, nearest

STORES = ("sqlite", "postgresql", "mysql", "mssql", "databricks", "uc")  # and http, https
IN_ADDRESS = re.compile(r"\?|%[0-9a-fA-F]{2}")  # characters with a meaning in an address


def check(config: Mapping[str, Any]) -> None:
    """Raise one `ConfigError` with all problems of a resolved `config`."""
    if problems := list(_sections(config)):  # the keys in them would only be reported as missing
        raise ConfigError(problems)
    problems = [
        *_missing(config),
        *_unknown(config),
        *_values(config),
        *_secrets(config),
        *_relations(config),
        *_paths(config),
        *_store(config),
    ]
    if problems:
        raise ConfigError(problems)


def not_set(key: str) -> str:
    """Return the problem of a mandatory value that was not given."""
    return f"{key} is not set; give it a value, for example on the command line: {key}=…"


def _sections(config: Mapping[str, Any]) -> Iterator[str]:
    for section in SECTIONS:
        value = config.get(section, {})
        if not isinstance(value, Mapping):
            yield f"{section}={value!r} must be a section with its keys, such as {section}.…=…"


def _missing(config: Mapping[str, Any]) -> Iterator[str]:
    values = {key: value for key, value in flatten(config).items() if value == "???"}
    for key in values:
        yield not_set(key)
    for key, spec in KEYS.items():
        found, _ = lookup(config, key)
        # A section that the user wrote may leave out what may be null; Atlas's own sections may not.
        is_atlas_own = "." not in key or key.startswith(tuple(f"{name}." for name in CLOSED))
        if not found and not spec.optional and (is_atlas_own or not spec.null):
            yield spec.missing(key)


def _unknown(config: Mapping[str, Any]) -> Iterator[str]:
    top = {key for key in KEYS if "." not in key} | {*SECTIONS, HEAD}
    for key in config:
        if key not in top:
            yield f"{key} is not a key of Atlas{nearest(key, top)}"
    for section in CLOSED:
        known = [k.partition(".")[2] for k in KEYS if k.startswith(f"{section}.")]
        for key, value in (config.get(section) or {}).items():
            if key not in known and not is_secret(key, value):  # `_secrets` reports those
                yield f"{section}.{key} is not a key of Atlas{nearest(key, known)}"


def _values(config: Mapping[str, Any]) -> Iterator[str]:
    for key, spec in KEYS.items():
        found, value = lookup(config, key)
        if not found or value == "???":
            continue
        if problem := spec.problem(value):
            yield f"{key}={value!r} {problem}"
    yield from _multipliers(config)


def _multipliers(config: Mapping[str, Any]) -> Iterator[str]:
    multipliers = lookup(config, "optim.lr_multipliers")[1]
    for path, factor in (multipliers if isinstance(multipliers, Mapping) else {}).items():
        problem = Key(float, minimum=0).problem(factor)
        if problem and isinstance(factor, Mapping):  # Hydra read the dots of a path as levels
            pairs = ",".join(f"{key}:{value}" for key, value in flatten({path: factor}).items())
            problem += f"; a path with dots goes in braces: '++optim.lr_multipliers={{{pairs}}}'"
        if problem:
            yield f"optim.lr_multipliers.{path}={factor!r} {problem}"


def _secrets(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of secrets; the message does not repeat a value that must not be kept."""
    for key, value in flatten(config).items():
        if is_secret(key, value):
            yield (
                f"{key} holds a secret, and a configuration is kept and shown; put it into the "
                f"environment, for example as {key.rpartition('.')[2].upper()} (for MLflow: "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD), and read it there"
            )


def _relations(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with two values together; other checks report invalid single values."""
    steps, warmup = _valid(config, "trainer.steps"), lookup(config, "schedule.warmup")[1]
    if steps and isinstance(warmup, int) and warmup >= steps:
        yield (
            f"schedule.warmup={warmup} must be below trainer.steps={steps}; "
            f"shorten the warm-up or train for longer"
        )
    if config.get("resume") and config.get("fresh") is True:
        yield "resume and fresh=true contradict each other; give one of them"
    sharding = _valid(config, "cluster.sharding")
    if sharding and _valid(config, "trainer.compile"):
        yield (
            f"cluster.sharding={sharding} and trainer.compile=true cannot be combined: weights are "
            "gathered between the parts of a compiled model; set trainer.compile=false or "
            "cluster.sharding=null"
        )
    patience, (_, val) = _valid(config, "trainer.patience"), lookup(config, "data.val")
    if patience and val is None:
        yield (
            f"trainer.patience={patience} counts validations, and data.val is null; "
            "add a validation set or set trainer.patience=null"
        )


def _valid(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of `key` if it is valid, else None."""
    value = lookup(config, key)[1]
    return None if KEYS[key].problem(value) else value


def _store(config: Mapping[str, Any]) -> Iterator[str]:
    if _valid(config, "tracking.kind") != "mlflow":
        return
    uri, name = _valid(config, "tracking.uri"), "tracking.uri"
    if not uri:
        uri, name = os.environ.get("MLFLOW_TRACKING_URI"), "MLFLOW_TRACKING_URI"
    if uri and not _is_store(uri):
        yield (
            f"{name}={mask_uris(uri)} is not the address of a store; give "
            "http://HOST:PORT of an MLflow server, sqlite:///FILE or another database's address"
        )


def _is_store(uri: str) -> bool:
    """Return whether MLflow accepts `uri`; MLflow itself refuses only when it sends the first point."""
    address = urlsplit(uri)
    if address.scheme in ("http", "https"):
        return bool(address.hostname)
    if address.scheme in ("", "file") and uri not in STORES:
        return os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")
    if (address.scheme.partition("+")[0] or uri) in STORES:
        return True
    from importlib.metadata import entry_points

    return address.scheme in entry_points(group="mlflow.tracking_store").names


def _paths(config: Mapping[str, Any]) -> Iterator[str]:
    name = _valid(config, "name")
    if name is not None and (not name or "/" in name or name.startswith(".")):
        yield f"name={name!r} must be the name of one folder below outputs, without / or a leading dot"
    if outputs := _valid(config, "outputs"):
        yield from _outputs(config, outputs)
    root = lookup(config, "data.root")[1]
    on_hub = lookup(config, "data.revision")[1] is not None
    if isinstance(root, str) and root != "???" and not on_hub and not Path(root).exists():
        yield (
            f"data.root={root} does not exist; give the folder of the data set, or its name on the "
            "hub together with data.revision"
        )


def _outputs(config: Mapping[str, Any], outputs: str) -> Iterator[str]:
    folder = Path(outputs).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield f"outputs={outputs}: {existing} is not a folder that you can write to"
    uri = _valid(config, "tracking.uri") or os.environ.get("MLFLOW_TRACKING_URI")
    has_own_store = _valid(config, "tracking.kind") == "mlflow" and not uri
    if has_own_store and IN_ADDRESS.search(str(folder)):
        yield (
            f"outputs={outputs}: MLflow interprets ? and %20 in the path of its database as parts of "
            "an address; use another folder, or set tracking.uri or tracking=none"
        )
