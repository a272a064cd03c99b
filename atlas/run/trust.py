"""Whose configuration is instantiated: one's own, or of others what is known to be harmless.

A `config.yaml` names classes to call, so using somebody else's run is running what it names. One
that the current user does not own may name the parts of Atlas and of torch that hold no more than
data and layers, and what the person trusts: `--trust PREFIX`, ATLAS_TRUST, or `load_policy(trust=…)`.
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
from atlas.run import directory as run

OPTION = "--trust"
VARIABLE = "ATLAS_TRUST"  # prefixes, separated by commas; the workers inherit it
HARMLESS = (
    *("atlas.data.", "atlas.models.", "atlas.schedule."),
    *("torch.nn.", "torch.optim.", "torch.utils.data."),
)
CLUSTERS = ("launchers.local.LocalLauncher", "launchers.slurm.SlurmLauncher")


def config_of(of: run.Run) -> dict[str, Any]:
    """The frozen configuration of a run, to be instantiated; raises `AtlasError` for a stranger's."""
    config = of.read_config()
    check(of.config_file, config)
    return config


def check(file: Path, config: Mapping[str, Any], trust: Sequence[str] = ()) -> None:
    """Raise `AtlasError` where a stranger's `config` in `file` names what is not trusted.

    `trust` adds prefixes to those that ATLAS_TRUST holds.
    """
    if is_own(file):
        return
    prefixes = (*HARMLESS, *_dotted((*trusted(), *trust)))
    body = {key: value for key, value in config.items() if key != "run"}
    found = list(_strange(body, prefixes))
    if found:
        raise AtlasError(
            f"{file} belongs to {_owner(file)}, not to you, and names what would be run as you:\n"
            + "\n".join(f"  {text}" for text in found)
            + "\nlook at it, and if you trust it, add --trust PREFIX (or set ATLAS_TRUST=PREFIX)"
        )


def is_own(file: Path) -> bool:
    """Whether the current user wrote `file`."""
    return file.stat().st_uid == os.geteuid()


def use_modules(file: Path, folders: Sequence[str], trust: Sequence[str] = ()) -> None:
    """Put the `folders` that `file` names on `sys.path`; a stranger's only where one is trusted.

    Those come last: they must not stand in for a module that is there without them.
    """
    if is_own(file):
        run.use_modules(folders)
    elif trusted() or trust:
        sys.path += [folder for folder in folders if folder not in sys.path]


def trusted() -> tuple[str, ...]:
    """The prefixes that the person has added."""
    return tuple(filter(None, os.environ.get(VARIABLE, "").split(",")))


def add(prefixes: Sequence[str]) -> None:
    """Trust `prefixes` too, in this process and in those that it starts."""
    if prefixes:
        os.environ[VARIABLE] = ",".join(filter(None, (*trusted(), *prefixes)))


def _dotted(prefixes: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{prefix.rstrip('.')}." for prefix in prefixes)


def _strange(node: Any, prefixes: tuple[str, ...], path: str = "") -> Iterator[str]:
    """What in a configuration would run, or become, something that is not under `prefixes`."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            inner = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                if not _is_allowed(value, prefixes, path):
                    yield f"{inner}={value}"
            else:
                yield from _strange(value, prefixes, inner)
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _strange(value, prefixes, f"{path}[{index}]")
    elif isinstance(node, str) and "${" in node:  # frozen values have none: it resolves to anything
        yield f"{path}={node}"


def _is_allowed(target: Any, prefixes: tuple[str, ...], path: str) -> bool:
    """By its name, and by where it is defined: a module's name leads to all that it imports."""
    if path == "cluster":
        return target in CLUSTERS
    name = str(target)
    if not f"{name}.".startswith(prefixes):
        return False
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception:  # no module of that name; instantiating it would look for it elsewhere
        return False
    return f"{getattr(found, '__module__', '')}.".startswith(prefixes)


def _owner(file: Path) -> str:
    number = file.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
