"""Whose configuration may be instantiated: your own, or of others only what is known to be harmless.

A `config.yaml` names classes to call, so to use somebody else's run is to run what it names. In a run
that the current user does not own only parts of Atlas and of torch that hold no more than data and
layers may be named, and what the user trusts: `--trust PREFIX`, ATLAS_TRUST, or `load_policy(trust=…)`.
"""

from __future__ import annotations

import importlib
import os
import pwd
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atlas.errors import AtlasError
from atlas.run.directory import Run

OPTION = "--trust"
VARIABLE = "ATLAS_TRUST"  # prefixes, separated by commas; the workers inherit it
HARMLESS = (
    *("atlas.data.", "atlas.models.", "atlas.schedule."),
    *("torch.nn.", "torch.optim.", "torch.utils.data."),
)
CLUSTERS = ("launchers.local.LocalLauncher", "launchers.slurm.SlurmLauncher")


def read_trusted_config(run: Run) -> dict[str, Any]:
    """Return the frozen configuration of `run`; raise `AtlasError` if it may not be instantiated."""
    config = run.read_config()
    require_trust(run.config_file, config)
    return config


def require_trust(file: Path, config: Mapping[str, Any], extra: Sequence[str] = ()) -> None:
    """Raise `AtlasError` if the `config` in somebody else's `file` names what is not trusted.

    `extra` are prefixes in addition to those in ATLAS_TRUST.
    """
    if is_own(file):
        return
    prefixes = (*HARMLESS, *_dotted((*trusted_prefixes(), *extra)))
    body = {key: value for key, value in config.items() if key != "run"}
    found = list(_untrusted(body, prefixes))
    if found:
        raise AtlasError(
            f"{file} belongs to {_owner(file)}, not to you, and names code that would run as you:\n"
            + "\n".join(f"  {text}" for text in found)
            + "\nread it, and if you trust it, add --trust PREFIX (or set ATLAS_TRUST=PREFIX)"
        )


def is_own(file: Path) -> bool:
    """Return whether `file` belongs to the current user."""
    return file.stat().st_uid == os.geteuid()


def extend_sys_path(file: Path, folders: Sequence[str], extra: Sequence[str] = ()) -> None:
    """Put the `folders` of modules that `file` names on `sys.path`, in their order.

    The folders of your own runs come first, as they did at submission. Somebody else's are added only
    if a prefix is trusted, and come last: they must not replace a module that can be imported
    without them.
    """
    new = [folder for folder in folders if folder not in sys.path]
    if is_own(file):
        sys.path[:0] = new
    elif trusted_prefixes() or extra:
        sys.path += new


def trusted_prefixes() -> tuple[str, ...]:
    """Return the prefixes that the user has added."""
    return tuple(filter(None, os.environ.get(VARIABLE, "").split(",")))


def add_prefixes(prefixes: Sequence[str]) -> None:
    """Trust `prefixes` too, in this process and in those that it starts."""
    if prefixes:
        os.environ[VARIABLE] = ",".join(filter(None, (*trusted_prefixes(), *prefixes)))


def _dotted(prefixes: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{prefix.rstrip('.')}." for prefix in prefixes)


def _untrusted(node: Any, prefixes: tuple[str, ...], path: str = "") -> Iterator[str]:
    """Yield every `key=value` that would run, or resolve to, something not under `prefixes`."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            inner = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                if not _is_allowed(value, prefixes, path):
                    yield f"{inner}={value}"
            else:
                yield from _untrusted(value, prefixes, inner)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _untrusted(value, prefixes, f"{path}[{index}]")
    elif isinstance(node, str) and "${" in node:  # can resolve to anything; Atlas freezes none
        yield f"{path}={node}"


def _is_allowed(target: Any, prefixes: tuple[str, ...], path: str) -> bool:
    """Judge a target by its name and by where it is defined: a module also has what it imports."""
    if path == "cluster":
        return target in CLUSTERS
    name = str(target)
    if not f"{name}.".startswith(prefixes):
        return False
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception:  # no such module; to instantiate it would be to look for it elsewhere
        return False
    return f"{getattr(found, '__module__', '')}.".startswith(prefixes)


def _owner(file: Path) -> str:
    number = file.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
