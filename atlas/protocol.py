"""Asking a user's object what it offers, in terms of a documented protocol.

The protocols are `typing.Protocol` classes in `atlas.data.protocol` and `atlas.models.protocol`, and
`Schedule` in `atlas.schedule`. An object need not inherit from them: what counts is which members it has.
"""

from __future__ import annotations

import inspect
from typing import Any

_SPECIAL = ("__len__", "__getitem__", "__call__")


def offers(part: Any, protocol: Any) -> bool:
    """Return whether `part` has every member of `protocol`.

    Unlike `isinstance` with a runtime-checkable protocol this also sees members that a wrapper
    forwards by `__getattr__`, which Python 3.12 and newer would not.
    """
    return not missing(part, protocol)


def missing(part: Any, protocol: Any) -> list[str]:
    """Return the names of the members of `protocol` that `part` does not have, methods first."""
    return [name for name in _members(protocol) if not hasattr(part, name)]


def _members(protocol: Any) -> list[str]:
    names: dict[str, None] = {}
    for cls in reversed(protocol.__mro__):
        if getattr(cls, "_is_protocol", False):
            names.update(dict.fromkeys([*vars(cls), *inspect.get_annotations(cls)]))
    return [name for name in names if not name.startswith("_") or name in _SPECIAL]
