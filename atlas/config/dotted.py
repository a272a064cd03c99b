"""Dotted keys: `a.b` for the value at `config["a"]["b"]`.

A key that itself has a dot, such as a module's path in `optim.lr_multipliers`, is shown by `flatten`
and `select` and cannot be named by the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a.b": 1}` for `{"a": {"b": 1}}`; an empty mapping is a value."""
    out: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            out.update(flatten(value, f"{name}."))
        else:
            out[name] = value
    return out


def select(
    nested: Mapping[str, Any], keep: Callable[[str, Any], bool], prefix: str = ""
) -> dict[str, Any]:
    """Return the part of `nested` whose values and sections pass `keep(key, value)`.

    A section of which nothing is left is removed too.
    """
    out: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if not keep(name, value):
            continue
        if isinstance(value, Mapping):
            value = select(value, keep, f"{name}.")
            if not value:
                continue
        out[str(key)] = value
    return out


def lookup(nested: Mapping[str, Any], key: str) -> tuple[bool, Any]:
    """Return whether `nested` has `key`, and its value (None if it has not)."""
    node: Any = nested
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False, None
        node = node[part]
    return True, node


def assign(nested: dict[str, Any], key: str, value: Any) -> None:
    """Set `key` in place; create the sections that it needs."""
    section, _, rest = key.partition(".")
    if not rest:
        nested[section] = value
        return
    if not isinstance(nested.get(section), dict):
        nested[section] = {}
    assign(nested[section], rest, value)


def add_default(nested: dict[str, Any], key: str, value: Any) -> None:
    """Set `key` in place if it is missing from a section that exists."""
    section, _, last = key.rpartition(".")
    node = lookup(nested, section)[1] if section else nested
    if isinstance(node, dict):
        node.setdefault(last, value)


def remove(nested: dict[str, Any], key: str) -> None:
    """Remove `key`, a value or a section, in place; do nothing if it is missing."""
    section, _, last = key.rpartition(".")
    node = lookup(nested, section)[1] if section else nested
    if isinstance(node, dict):
        node.pop(last, None)


def without(nested: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return a deep copy of `nested` without `keys`."""
    out = copy.deepcopy(dict(nested))
    for key in keys:
        remove(out, key)
    return out
