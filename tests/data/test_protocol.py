"""A user's object is asked for members by protocol: inherited, its own, or forwarded by a wrapper."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atlas.data import protocol
from atlas.data.protocol import scenes_of, spec_of
from atlas.data.tabletop import Tabletop
from atlas.errors import ConfigError
from atlas.models import protocol as models
from atlas.models.action_head import CategoricalHead, ChunkHead, FlowMatchingHead
from atlas.models.fusion import LanguageQueriedSoftmax
from atlas.models.lang_encoder import WordEncoder
from atlas.models.protocol import Encodes
from atlas.models.vision import VisionTransformer
from atlas.models.vla import VLA
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


def tabletop() -> Tabletop:
    return Tabletop("val", episodes=2, val_episodes=1, rollouts=3)


def vit(**sizes: Any) -> VisionTransformer:
    return VisionTransformer(**{"image_size": [56, 56], "width": 8, **sizes})


def vla() -> VLA:
    parts = (vit, WordEncoder, LanguageQueriedSoftmax, ChunkHead)
    return VLA(*parts, spec=tabletop().spec)


HEAD = {"width": 8, "horizon": 2, "action_dim": 3}
SIMULATED = (
    *(protocol.Dataset, protocol.ReadsBatches, protocol.ReadsBlocks, protocol.HasSpec),
    *(protocol.HasBaselines, protocol.HasScenes, protocol.HasEpisodes, protocol.HasFrames),
)
CLAIMS: list[tuple[Callable[[], Any], tuple[Any, ...]]] = [
    (tabletop, SIMULATED),
    (vla, (models.Model, models.Acts, models.HasVision)),
    (vit, (models.Vision, models.Encodes, models.HasImageSize)),
    (lambda: WordEncoder(["ball"]), (models.LangEncoder, models.Untraced)),
    (lambda: LanguageQueriedSoftmax(1, (2, 2), 8, 8, 2), (models.Fusion,)),
    *(
        (lambda head=head: head(**HEAD), (models.ActionHead,))
        for head in (ChunkHead, CategoricalHead, FlowMatchingHead)
    ),
]


def assert_offers(part: Any, wanted: Any) -> None:
    """`part` has the members of `wanted`, and its methods take the arguments that are passed."""
    assert missing(part, wanted) == []
    for name, member in vars(wanted).items():
        if inspect.isfunction(member) and (name == "__call__" or not name.startswith("_")):
            passed = list(inspect.signature(member).parameters)[1:]
            method = part.forward if name == "__call__" else getattr(part, name)
            inspect.signature(method).bind(*passed)


@pytest.mark.parametrize(("make", "offered"), CLAIMS)
def test_what_is_shipped_offers_what_it_claims(
    make: Callable[[], Any], offered: tuple[Any, ...]
) -> None:
    part = make()
    for wanted in offered:
        assert_offers(part, wanted)


def test_recordings_offer_what_they_claim(tmp_path: Path) -> None:
    from robot import open_split, write_folder

    data = open_split(write_folder(tmp_path / "robot"))
    simulated = set(SIMULATED) - {protocol.HasScenes}
    recorded = (protocol.Prepares, protocol.Describes, protocol.NamesActions)
    for wanted in (*simulated, *recorded, protocol.HasRecordedEpisodes):
        assert_offers(data, wanted)
    assert not offers(data, protocol.HasScenes)


def test_babyai_offers_what_it_claims() -> None:
    pytest.importorskip("minigrid", reason="minigrid is not installed (extra sim)")
    from atlas.data.babyai import BabyAI

    data = BabyAI(episodes=2, val_episodes=1)
    for wanted in (*SIMULATED, protocol.HasRolloutBaselines, protocol.NamesActions):
        assert_offers(data, wanted)
