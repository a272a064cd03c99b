"""A user's object is asked for members by protocol: inherited, its own, or forwarded by a wrapper."""

from __future__ import annotations

from typing import Any

import pytest

from atlas.data import protocol
from atlas.data.protocol import scenes_of, spec_of
from atlas.errors import ConfigError
from atlas.models.protocol import Encodes
from atlas.protocol import missing, offers


class Plain:
    """A data set with what is required and one optional member of each kind."""

    scenes = 3

    def __init__(self) -> None:
        self.spec = {"state_dim": 7}

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return index

    def rollout(self, policy: Any, scenes: Any) -> dict[str, Any]:
        return {}


class Wrapper:
    """Forwards every name that it does not have."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Halfway:
    scenes = 2


@pytest.mark.parametrize(
    ("part", "wanted", "lacking"),
    [
        (Plain(), protocol.Dataset, []),
        (object(), protocol.Dataset, ["__len__", "__getitem__"]),
        (Plain(), protocol.HasSpec, []),
        (Plain(), protocol.HasScenes, []),
        (Halfway(), protocol.HasScenes, ["rollout"]),
        (Plain(), protocol.Collates, ["collate"]),
        (Wrapper(Plain()), protocol.HasScenes, []),
        (Wrapper(Plain()), protocol.Prepares, ["prepare"]),
        (None, protocol.Describes, ["describe"]),
        (Plain(), Encodes, ["encode", "fingerprint", "grid", "width"]),
    ],
)
def test_members(part, wanted, lacking):
    assert missing(part, wanted) == lacking
    assert offers(part, wanted) == (not lacking)


def test_every_protocol_asks_for_something():
    declared = [p for p in vars(protocol).values() if getattr(p, "_is_protocol", False)]
    asked = [p for p in declared if p.__module__ == protocol.__name__]
    assert len(asked) > 10
    assert [p for p in asked if not missing(object(), p)] == []


def test_spec_and_scenes_of_a_data_set():
    assert (spec_of(Plain()), spec_of(Halfway())) == ({"state_dim": 7}, None)
    assert (scenes_of(Plain()), scenes_of(object())) == (3, 0)


def test_scenes_without_rollout():
    with pytest.raises(ConfigError, match="scenes=2"):
        scenes_of(Halfway())
