"""Declaring keys as fields of dataclasses, and reading tables and values from the declarations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from atlas.errors import ConfigError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class Key:
    """The values that one key may have."""

    type: type
    minimum: float | None = None
    above: float | None = None  # a bound that is not a permitted value itself
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    null: bool = False
    auto: bool = False
    optional: bool = False  # the section is valid without the key

    def problem(self, value: Any) -> str | None:
        """Return why `value` is invalid, as the end of a sentence, or None."""
        if value is None:
            return None if self.null else f"must be {self.wanted}, not null"
        if self.auto and value == "auto":
            return None
        if self.choices:
            known = value in self.choices
            return None if known else f"is not known{nearest(str(value), self.choices)}"
        if not self._has_type(value) or not self._is_in_range(value):
            return f"must be {self.wanted}"
        return None

    def _has_type(self, value: Any) -> bool:
        if self.type is bool or isinstance(value, bool):  # a bool is an int in Python
            return self.type is bool and isinstance(value, bool)
        if self.type is float:
            return isinstance(value, int | float)
        return isinstance(value, self.type)

    def _is_in_range(self, value: Any) -> bool:
        return self.type not in (int, float) or (
            math.isfinite(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
        )

    @property
    def wanted(self) -> str:
        """The permitted values in words."""
        words = [NAMES[self.type]]
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

    def missing(self, name: str) -> str:
        """Return the problem of a configuration without this key, which is called `name`."""
        return f"{name} is missing from the configuration; it must be {self.wanted}"

    def convert(self, value: Any) -> Any:
        """Return a valid `value` as the type of the key: 1 as 1.0 where that is float."""
        as_it_is = value is None or value == "auto" or self.type in (dict, list)
        return value if as_it_is else self.type(value)


# The types that a configuration has for a field's.
PLAIN: dict[Any, type] = {Mapping: dict, list: list}
NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


def key(
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    optional: bool = False,
    name: str | None = None,
    hashed: bool = True,
    batch_split: bool = False,
    unhashed: tuple[str, ...] = (),
) -> Any:
    """Declare a key of a section.

    `minimum`, `above` and `maximum` bound its value. An `optional` key may be missing, but not null;
    its field is None then. `name` is the key's name where no Python name can be the same. The id of
    a run leaves the key out unless it is `hashed`; of a mapping that is hashed it leaves out the
    keys `unhashed`. Keys that `batch_split` are hashed as one: the effective batch.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "optional": optional}
    identity = {"hashed": hashed, "batch_split": batch_split, "unhashed": unhashed}
    return field(metadata={"limits": limits, "name": name, **identity})


def section(*, hashed: bool = True) -> Any:
    """Declare a section, with the keys of the dataclass that is its type."""
    return field(metadata={"hashed": hashed})


def open_section(*, unhashed: tuple[str, ...] = ()) -> Any:
    """Declare that a section also takes keys that Atlas does not know; the field is the mapping.

    The id of a run hashes them, but for those in `unhashed`.
    """
    return field(metadata={"raw": True, "unhashed": unhashed})


def walk(kind: type, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Yield the dotted name and the field of every key and section of `kind`, at every depth.

    The mapping of an open section has the name of the section.
    """
    for item in fields(kind):
        if "raw" in item.metadata:
            yield prefix.rstrip("."), item
            continue
        name = f"{prefix}{_name(item)}"
        yield name, item
        if is_dataclass(item.type):
            yield from walk(item.type, f"{name}.")  # type: ignore[arg-type]


def keys_of(kind: type) -> dict[str, Key]:
    """Return the keys of `kind` and of its sections by dotted name."""
    return {name: _key(item) for name, item in walk(kind) if "limits" in item.metadata}


def read(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Return a `kind` with valid `values`, each converted to its key's type.

    Keys that may be null or are optional can be missing; any other is a `ConfigError`. `prefix` is
    the beginning of the keys' names in it.
    """
    return kind(**{item.name: _read(item, values, prefix) for item in fields(kind)})  # type: ignore[arg-type]


def _read(item: Field[Any], values: Mapping[str, Any], prefix: str) -> Any:
    if "raw" in item.metadata:
        return values
    name = _name(item)
    if is_dataclass(item.type):
        return read(item.type, values.get(name, {}), f"{prefix}{name}.")  # type: ignore[arg-type]
    known = _key(item)
    if name not in values and not (known.null or known.optional):
        raise ConfigError(known.missing(f"{prefix}{name}"))
    return known.convert(values.get(name))


def _name(item: Field[Any]) -> str:
    return item.metadata.get("name") or item.name


def _key(item: Field[Any]) -> Key:
    """Return the key that a field declares: `int | Literal["auto"] | None` and its limits."""
    union = get_origin(item.type) in (Union, UnionType)
    parts = get_args(item.type) if union else (item.type,)
    words = tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
    kinds = [part for part in parts if part is not NoneType and get_origin(part) is not Literal]
    return Key(
        PLAIN.get(get_origin(kinds[0]), kinds[0]) if kinds else str,
        choices=() if kinds else words,
        auto=bool(kinds and words),
        null=NoneType in parts and not item.metadata["limits"]["optional"],
        **item.metadata["limits"],
    )
