"""What a configuration may hold, checked without torch and all at once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from atlas.config.dotted import flatten, lookup
from atlas.errors import ConfigError, nearest

PRECISIONS = ("fp32", "tf32", "bf16")
SCALINGS = ("none", "linear", "sqrt")
DEVICES = ("auto", "cpu", "cuda")
SHARDINGS = ("fsdp2",)
SECRETS = ("token", "password", "secret", "api_key", "access_key")  # whole words of a key's name
IN_URI = re.compile(r"://[^/@\s]*:[^/@\s]+@")  # user and password in an address

STORES = ("sqlite", "postgresql", "mysql", "mssql", "databricks", "uc")  # beside http and https
IN_ADDRESS = re.compile(r"\?|%[0-9a-fA-F]{2}")  # what has a meaning of its own in an address


@dataclass(frozen=True)
class Key:
    """What one key may be: its `type`, bounds, `choices`, and whether null or `auto` will do."""

    type: type
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    null: bool = False
    auto: bool = False

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, as the end of a sentence, or None."""
        if value is None:
            return None if self.null else f"must be {self.wanted}, not null"
        if self.auto and value == "auto":
            return None
        if self.choices:
            return (
                None
                if value in self.choices
                else f"is not known{nearest(str(value), self.choices)}"
            )
        if not self._has_type(value):
            return f"must be {self.wanted}"
        if self.type in (int, float) and not self._in_range(value):
            return f"must be {self.wanted}"
        return None

    def _has_type(self, value: Any) -> bool:
        if self.type is bool or isinstance(value, bool):
            return self.type is bool and isinstance(value, bool)
        if self.type is float:
            return isinstance(value, int | float)
        return isinstance(value, self.type)

    def _in_range(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
        )

    @property
    def wanted(self) -> str:
        """The permitted values in words."""
        names = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "text",
            dict: "a mapping",
            list: "a list",
        }
        words = [names[self.type]]
        if self.minimum is not None:
            words.append(f"of at least {self.minimum:g}")
        if self.above is not None:
            words.append(f"above {self.above:g}")
        if self.maximum is not None:
            words.append(f"and at most {self.maximum:g}")
        text = " ".join(words)
        if self.auto:
            text += ", or auto"
        return text + (", or null" if self.null else "")


COUNT = Key(int, minimum=1)
OPTIONAL_COUNT = Key(int, minimum=1, null=True)
MINUTES = Key(float, above=0, null=True)
KEYS: dict[str, Key] = {
    "name": Key(str),
    "seed": Key(int, minimum=0, maximum=2**63 - 1),
    "outputs": Key(str),
    "objective": Key(str),
    "init_from": Key(str, null=True),
    "resume": Key(str, null=True),
    "fresh": Key(bool),
    "dry_run": Key(bool),
    "trainer.steps": COUNT,
    "trainer.accumulate": COUNT,
    "trainer.val_interval": Key(int, minimum=1, auto=True, null=True),
    "trainer.val_batches": OPTIONAL_COUNT,
    "trainer.log_interval": COUNT,
    "trainer.log_samples": Key(bool),
    "trainer.save_interval": OPTIONAL_COUNT,
    "trainer.save_minutes": MINUTES,
    "trainer.keep": COUNT,
    "trainer.patience": OPTIONAL_COUNT,
    "trainer.precision": Key(str, choices=PRECISIONS),
    "trainer.compile": Key(bool),
    "trainer.deterministic": Key(bool),
    "trainer.clip_norm": Key(float, above=0, null=True),
    "trainer.ema": Key(float, above=0, maximum=0.999999, null=True),
    "trainer.max_time": MINUTES,
    "trainer.progress": Key(bool, auto=True),
    "optim.lr": Key(float, above=0),
    "optim.scale_lr": Key(str, choices=SCALINGS),
    "optim.base_batch_size": COUNT,
    "optim.lr_multipliers": Key(dict, null=True),
    "optim.optimizer": Key(dict),
    "data.batch_size": COUNT,
    "data.workers": Key(int, minimum=0),
    "data.on_bad": Key(str, choices=("error", "skip"), null=True),
    "data.train": Key(dict),
    "data.val": Key(dict, null=True),
    "data.cache_features": Key(bool, null=True),
    "cluster.nodes": COUNT,
    "cluster.nproc_per_node": Key(int, minimum=1, auto=True),
    "cluster.device": Key(str, choices=DEVICES),
    "cluster.sharding": Key(str, choices=SHARDINGS, null=True),
    "tracking.kind": Key(str, choices=("mlflow", "none")),
    "tracking.uri": Key(str, null=True),
    "tracking.artifact_root": Key(str, null=True),
    "tracking.log_best": Key(bool),
    "tracking.wait_s": Key(float, minimum=0),
    "schedule._target_": Key(str),
    "model._target_": Key(str),
}
# A schedule of a person's own can have others.
SCHEDULE = {"warmup": Key(int, minimum=0), "floor": Key(float, minimum=0, maximum=1)}
# The sections in which every key is Atlas's own; elsewhere a person's own keys are welcome.
CLOSED = ("trainer", "optim", "tracking")
TOP = ("model", "optim", "schedule", "data", "cluster", "tracking", "trainer", "run")


def check(config: Mapping[str, Any]) -> None:
    """Raise one `ConfigError` with everything that is wrong in a resolved `config`."""
    if problems := list(_sections(config)):  # what is below them would only be told of as missing
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


def is_sharded(config: Mapping[str, Any], world_size: int) -> bool:
    """Whether the ranks hold parts of the weights; one rank has nobody to share with."""
    return world_size > 1 and config["cluster"].get("sharding") is not None


def not_set(key: str) -> str:
    """The problem of a mandatory value that nobody gave."""
    return f"{key} is not set; give it a value, for example on the command line: {key}=…"


def _sections(config: Mapping[str, Any]) -> Iterator[str]:
    for section in TOP[:-1]:
        value = config.get(section, {})
        if not isinstance(value, Mapping):
            yield f"{section}={value!r} must be a section with its keys, such as {section}.…=…"


def _missing(config: Mapping[str, Any]) -> Iterator[str]:
    values = {key: value for key, value in flatten(config).items() if value == "???"}
    for key in values:
        yield not_set(key)
    for key, spec in KEYS.items():
        found, _ = lookup(config, key)
        # What a person's own section may leave out, Atlas's own always has.
        own = "." not in key or key.startswith(tuple(f"{section}." for section in CLOSED))
        if not found and (own or not spec.null):
            yield f"{key} is missing from the configuration; it must be {spec.wanted}"


def _unknown(config: Mapping[str, Any]) -> Iterator[str]:
    top = {key for key in KEYS if "." not in key} | set(TOP)
    for key in config:
        if key not in top:
            yield f"{key} is not a key of Atlas{nearest(key, top)}"
    for section in CLOSED:
        known = [k.partition(".")[2] for k in KEYS if k.startswith(f"{section}.")]
        for key, value in (config.get(section) or {}).items():
            if key not in known and not _is_secret(key, value):  # secrets are told of below
                yield f"{section}.{key} is not a key of Atlas{nearest(key, known)}"


def _values(config: Mapping[str, Any]) -> Iterator[str]:
    for key, spec in KEYS.items():
        found, value = lookup(config, key)
        if not found or value == "???":
            continue
        problem = spec.problem(value)
        if problem:
            yield f"{key}={value!r} {problem}"
    multipliers = lookup(config, "optim.lr_multipliers")[1]
    for path, factor in (multipliers if isinstance(multipliers, Mapping) else {}).items():
        problem = Key(float, minimum=0).problem(factor)
        if problem and isinstance(factor, Mapping):  # Hydra has read the dots of a path as levels
            pairs = ",".join(f"{key}:{value}" for key, value in flatten({path: factor}).items())
            problem += f"; a path with dots goes in braces: '++optim.lr_multipliers={{{pairs}}}'"
        if problem:
            yield f"optim.lr_multipliers.{path}={factor!r} {problem}"
    schedule = config.get("schedule") or {}
    for name, spec in SCHEDULE.items():
        if name in schedule and (problem := spec.problem(schedule[name])):
            yield f"schedule.{name}={schedule[name]!r} {problem}"


def _secrets(config: Mapping[str, Any]) -> Iterator[str]:
    """Values that must not be kept; they are not repeated in the message either."""
    for key, value in flatten(config).items():
        if _is_secret(key, value):
            yield (
                f"{key} holds a secret, and a configuration is kept and shown; put it into the "
                f"environment, for example as {key.rpartition('.')[2].upper()} (for MLflow: "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD), and read it there"
            )


def without_secret(argument: str) -> str:
    """A word of a command line with a secret in it masked: Hydra's own keys are checked by nobody."""
    key, equals, value = argument.partition("=")
    if equals and _is_secret(key, value):
        return f"{key}=***"
    return IN_URI.sub("://***@", argument)


def _is_secret(key: str, value: Any) -> bool:
    last = key.rpartition(".")[2].lower()
    named = any(f"_{secret}_" in f"_{last}_" for secret in SECRETS)
    return (named and value not in (None, "")) or (
        isinstance(value, str) and IN_URI.search(value) is not None
    )


def _relations(config: Mapping[str, Any]) -> Iterator[str]:
    """What two values say together; those that are wrong by themselves are told of already."""
    steps, warmup = _good(config, "trainer.steps"), lookup(config, "schedule.warmup")[1]
    if steps and isinstance(warmup, int) and warmup >= steps:
        yield (
            f"schedule.warmup={warmup} must be below trainer.steps={steps}; "
            f"shorten the warm-up or train for longer"
        )
    if config.get("resume") and config.get("fresh") is True:
        yield "resume and fresh=true contradict each other; give one of them"
    sharding = _good(config, "cluster.sharding")
    if sharding and _good(config, "trainer.compile"):
        yield (
            f"cluster.sharding={sharding} and trainer.compile=true do not go together: weights are "
            "gathered between the parts of a compiled model; set trainer.compile=false, or "
            "cluster.sharding=null"
        )
    patience, (_, val) = _good(config, "trainer.patience"), lookup(config, "data.val")
    if patience and val is None:
        yield (
            f"trainer.patience={patience} counts validations and there is "
            "no data.val; add a validation set or set trainer.patience=null"
        )


def _good(config: Mapping[str, Any], key: str) -> Any:
    """The value of `key` where it is a permitted one, else None."""
    value = lookup(config, key)[1]
    return None if KEYS[key].problem(value) else value


def _store(config: Mapping[str, Any]) -> Iterator[str]:
    if _good(config, "tracking.kind") != "mlflow":
        return
    uri, name = _good(config, "tracking.uri"), "tracking.uri"
    if not uri:
        uri, name = os.environ.get("MLFLOW_TRACKING_URI"), "MLFLOW_TRACKING_URI"
    if uri and not _is_store(uri):
        yield (
            f"{name}={IN_URI.sub('://***@', uri)} is no address of a store; give "
            "http://HOST:PORT of an MLflow server, sqlite:///FILE or another database's address"
        )


def _is_store(uri: str) -> bool:
    """Whether MLflow takes `uri`: it says no to others only when the first point is to be sent."""
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
    name = _good(config, "name")
    if name is not None and (not name or "/" in name or name.startswith(".")):
        yield f"name={name!r} must be the name of one folder below outputs, without / or a leading dot"
    if given := _good(config, "outputs"):
        outputs = Path(given).absolute()
        existing = next(p for p in (outputs, *outputs.parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            yield f"outputs={given}: {existing} is not a folder that can be written to"
        kind, uri = _good(config, "tracking.kind"), _good(config, "tracking.uri")
        own_store = kind == "mlflow" and not (uri or os.environ.get("MLFLOW_TRACKING_URI"))
        if own_store and IN_ADDRESS.search(str(outputs)):
            yield (
                f"outputs={given}: MLflow reads ? and %20 in the path of its database as parts of an "
                "address; use another folder, or set tracking.uri or tracking=none"
            )
    root = lookup(config, "data.root")[1]
    on_hub = lookup(config, "data.revision")[1] is not None
    if isinstance(root, str) and root != "???" and not on_hub and not Path(root).exists():
        yield f"data.root={root} does not exist; give the folder that holds the data set, or a name on the hub with data.revision"
