"""Dotted keys of nested mappings."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from atlas.config import dotted

NESTED: dict[str, Any] = {"a": {"b": 1, "c": {"d": None}}, "e": {}, "f": [{"g": 2}], "h": "text"}


def test_flatten() -> None:
    expected = {"a.b": 1, "a.c.d": None, "e": {}, "f": [{"g": 2}], "h": "text"}
    assert dotted.flatten(NESTED) == expected
    assert dotted.flatten({"x": {"y.z": 1, 2: 3}}) == {"x.y.z": 1, "x.2": 3}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a", (True, NESTED["a"])),
        ("a.b", (True, 1)),
        ("a.c.d", (True, None)),
        ("e", (True, {})),
        ("a.x", (False, None)),
        ("x.b", (False, None)),
        ("a.b.c", (False, None)),  # a value is no section
        ("f.0", (False, None)),
        ("", (False, None)),
    ],
)
def test_lookup(key: str, expected: tuple[bool, Any]) -> None:
    assert dotted.lookup(NESTED, key) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a", {"a": 7}),
        ("a.b", {"a": {"b": 7, "c": None}}),
        ("a.c.d", {"a": {"b": 1, "c": {"d": 7}}}),  # null becomes a section
        ("x.y.z", {"a": {"b": 1, "c": None}, "x": {"y": {"z": 7}}}),
    ],
)
def test_assign(key: str, expected: dict[str, Any]) -> None:
    nested: dict[str, Any] = {"a": {"b": 1, "c": None}}
    dotted.assign(nested, key, 7)
    assert nested == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a.new", {"a": {"b": None, "new": 7}}),
        ("new", {"a": {"b": None}, "new": 7}),
        ("a.b", {"a": {"b": None}}),  # null is a value
        ("x.new", {"a": {"b": None}}),  # no such section
        ("a.b.new", {"a": {"b": None}}),
    ],
)
def test_add_default(key: str, expected: dict[str, Any]) -> None:
    nested: dict[str, Any] = {"a": {"b": None}}
    dotted.add_default(nested, key, 7)
    assert nested == expected


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["a.b"], {"a": {"c": {"d": 1}}}),
        (["a.c.d"], {"a": {"b": 1, "c": {}}}),
        (["a.c"], {"a": {"b": 1}}),
        (["a"], {}),
        (["a.b", "a.c", "x", "a.x", "x.y", "a.b.c"], {"a": {}}),
    ],
)
def test_without(keys: list[str], expected: dict[str, Any]) -> None:
    nested: dict[str, Any] = {"a": {"b": 1, "c": {"d": 1}}}
    before = copy.deepcopy(nested)
    assert dotted.without(nested, keys) == expected
    assert nested == before
    for key in keys:
        dotted.remove(nested, key)
    assert nested == expected


def test_select() -> None:
    def keep(key: str, value: Any) -> bool:
        return key != "a.b" and value is not None

    assert dotted.select(NESTED, keep) == {"f": [{"g": 2}], "h": "text"}
    # A key with a dot stays one key.
    assert dotted.select({"x": {"y.z": 1, 2: 3}}, keep) == {"x": {"y.z": 1, "2": 3}}
