"""The policy: its loss and weight, its units, and that it does not care how a batch is cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import unnamed
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from atlas.data.tabletop import Tabletop
from atlas.errors import ConfigError
from atlas.models.fusion import LanguageQueriedSoftmax
from atlas.models.lang_encoder import WordEncoder
from atlas.models.vision import VisionTransformer
from atlas.models.vla import VLA

torch.set_num_threads(1)

CONF = Path(__file__).resolve().parents[2] / "conf"


def statistics(mean: float, std: float, size: int) -> dict[str, list[float]]:
    return {"mean": [mean + i for i in range(size)], "std": [std * (1 + i) for i in range(size)]}


def robot_spec(**changes: Any) -> dict[str, Any]:
    """A robot unlike the table top: one larger camera, five joints, a history, relative actions."""
    spec = {
        "cameras": ["front"],
        "image_size": [64, 80],
        "state_dim": 5,
        "history": 4,
        "action_dim": 3,
        "horizon": 6,
        "vocabulary": ["pick", "bottle"],
        "relative": True,
        "statistics": {"state": statistics(1.0, 0.5, 5), "actions": statistics(-1.0, 0.1, 3)},
    }
    return {**spec, **changes}


def robot_batch(samples: int, spec: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    size = (samples, len(spec["cameras"]), 3, *spec["image_size"])
    return {
        "images": torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
        "state": noise(samples, spec["history"], spec["state_dim"]),
        "instruction": ["pick the bottle"] * samples,
        "actions": noise(samples, spec["horizon"], spec["action_dim"]),
        "action_mask": torch.ones(samples, spec["horizon"], dtype=torch.bool),
    }


def make(spec: dict[str, Any], *overrides: str) -> VLA:
    torch.manual_seed(0)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["model=vla", *overrides])
    model: VLA = instantiate(config.model, spec=spec)
    return model


@pytest.fixture(scope="module")
def data() -> Tabletop:
    return Tabletop(episodes=8, seed=1)


@pytest.fixture
def model(data: Tabletop) -> Iterator[VLA]:
    yield make(data.spec)


def gradients(model: VLA, batches: list[dict[str, Any]]) -> torch.Tensor:
    """As a trainer sums them: loss times weight over the batches, divided once."""
    model.zero_grad()
    weight = torch.zeros(())
    for batch in batches:
        out = model(batch)
        (out["loss"] * out["weight"]).backward()
        weight += out["weight"]
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found) / weight


@pytest.mark.parametrize(("batches", "size"), [(2, 16), (4, 8), (32, 1)])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(
    model: VLA, data: Tabletop, batches: int, size: int
) -> None:
    ids = np.random.default_rng(0).permutation(len(data))[
        :32
    ]  # also chunks cut by an episode's end
    whole = gradients(model, [data.batch(ids)])
    cut = gradients(model, [data.batch(ids[i * size : (i + 1) * size]) for i in range(batches)])
    assert (cut - whole).norm() / whole.norm() < 1e-5


def test_loss_and_l1_are_means_over_valid_elements(model: VLA, data: Tabletop) -> None:
    batch = data.batch([0, int(data.ends[0]) - 3])
    out = model(batch)
    error = (model.act(batch) - batch["actions"]).abs()[batch["action_mask"]]
    scale = torch.tensor(data.spec["statistics"]["actions"]["std"])
    assert out["weight"] == 11 * 2
    assert out["l1"].item() == pytest.approx(error.mean().item(), rel=1e-4)
    assert out["loss"].item() == pytest.approx((error / scale).mean().item(), rel=1e-4)


def test_padding_has_no_say(model: VLA, data: Tabletop) -> None:
    batch = data.batch([int(data.ends[0]) - 3, 0])
    plain = gradients(model, [batch])
    batch["actions"] = batch["actions"].masked_fill(~batch["action_mask"][..., None], torch.nan)
    assert torch.equal(gradients(model, [batch]), plain)


def test_a_batch_without_a_valid_action_weighs_nothing(model: VLA, data: Tabletop) -> None:
    batch = data.batch([0, 1])
    batch["action_mask"] = torch.zeros_like(batch["action_mask"])
    out = model(batch)
    out["loss"].backward()
    assert (out["loss"].item(), out["weight"].item(), out["l1"].item()) == (0.0, 0.0, 0.0)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"relative": False},
        {"history": 1},
        {"cameras": ["left", "right", "wrist"], "image_size": [56, 56]},
        {"vocabulary": []},
    ],
)
def test_any_robot(changes: dict[str, Any]) -> None:
    spec = robot_spec(**changes)
    model, batch = make(spec), robot_batch(3, spec)
    out = model(batch)
    out["loss"].backward()
    assert out["weight"] == 3 * 6 * 3 and out["loss"].isfinite()
    assert model.act(batch).shape == (3, 6, 3)


def test_relative_actions_are_added_to_the_last_state() -> None:
    spec = robot_spec()
    model, batch = make(spec), robot_batch(2, spec)
    with torch.no_grad():  # a head that always says the mean
        for parameter in model.action_head.parameters():
            parameter.zero_()
    mean = torch.tensor(spec["statistics"]["actions"]["mean"])
    expected = batch["state"][:, -1:, :3] + mean
    assert torch.allclose(model.act(batch), expected.expand(-1, 6, -1))
    batch["actions"] = expected + 0.1 * torch.tensor([1.0, 2.0, 3.0]).expand(2, 6, 3)
    out = model(batch)  # one standard deviation off everywhere
    assert out["loss"].item() == pytest.approx(1.0, rel=1e-4)
    assert out["l1"].item() == pytest.approx(0.2, rel=1e-4)


def test_what_never_moved_keeps_its_unit() -> None:
    flat = {"mean": [0.0, 1.0, 2.0], "std": [0.0, 0.1, 0.1]}
    spec = robot_spec(statistics={"state": statistics(0.0, 1.0, 5), "actions": flat})
    assert torch.allclose(make(spec).actions_std, torch.tensor([1.0, 0.1, 0.1]))


def test_statistics_travel_with_the_weights(model: VLA, data: Tabletop) -> None:
    batch = data.batch(range(4))
    other = {name: statistics(9.0, 9.0, 2) for name in ("state", "actions")}
    loaded = make({**data.spec, "statistics": other}, "seed=7")
    assert not torch.allclose(loaded.act(batch), model.act(batch))
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded.act(batch), model.act(batch))


def test_images_are_seen_and_words_are_heard(model: VLA, data: Tabletop) -> None:
    batch = data.batch([0])
    plain = model.act(batch)
    assert not torch.equal(model.act({**batch, "instruction": ["touch the"]}), plain)
    assert not torch.equal(model.act({**batch, "images": batch["images"].flip(-1)}), plain)


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("", [2, 0, 0, 0, 0, 0, 0, 0]),
        ("touch BALL", [2, 4, 3, 0, 0, 0, 0, 0]),
        ("Touch, the ball!", [2, 4, 1, 3, 0, 0, 0, 0]),
        ("ball " * 7, [2, 3, 3, 3, 3, 3, 3, 3]),
        ("ball " * 8, [2, *[3] * 8, *[0] * 7]),
        ("ball " * 99, [2, *[3] * 19]),
    ],
)
def test_tokens(text: str, row: list[int]) -> None:
    encoder = WordEncoder(["ball", "touch"], length=20)
    for _ in range(2):  # the second time from memory
        assert encoder.tokenize([text]).tolist() == [row]


def test_an_instruction_means_the_same_beside_a_longer_one() -> None:
    encoder = WordEncoder(["ball", "touch"]).eval()
    alone, beside = encoder(["touch ball"])[0], encoder(["ball " * 12, "touch ball"])[1]
    assert torch.allclose(alone, beside, atol=1e-5)


def test_fusion_looks_where_the_query_matches() -> None:
    fusion = LanguageQueriedSoftmax(1, (3, 4), 8, 8, 2, points=1)
    assert fusion.places.tolist()[0] == pytest.approx([-2 / 3, -0.75])
    assert fusion.places.tolist()[-1] == pytest.approx([2 / 3, 0.75])
    patches, state = torch.randn(1, 1, 12, 8), torch.zeros(1, 2)
    one, other = (fusion(patches, torch.randn(1, 8), state) for _ in range(2))
    assert one.shape == (1, fusion.width) and not torch.allclose(one, other)


def test_vision_sees_order_and_resizes() -> None:
    vision = VisionTransformer([64, 80], resize=[28, 42], patch=7, width=16)
    features = vision(torch.randint(0, 256, (2, 3, 64, 80), dtype=torch.uint8))
    assert features.shape == (2, 4 * 6, 16) and vision.grid == (4, 6)
    assert not torch.allclose(features[0, 0], features[0, 1])


def test_views_are_kept_apart_and_features_can_be_given(model: VLA, data: Tabletop) -> None:
    batch = data.batch(range(3))
    features = model.vision.encode(batch["images"])
    assert features.shape == (3, 2, model.vision.grid[0] * model.vision.grid[1], model.vision.width)
    assert torch.allclose(features[1, 1], model.vision(batch["images"][1, 1:])[0], atol=1e-5)
    seen = {key: value for key, value in batch.items() if key != "images"}
    exact, half = {**seen, "features": features}, {**seen, "features": features.half()}
    assert torch.equal(model(exact)["loss"], model(batch)["loss"])
    assert torch.equal(model.act(exact), model.act(batch))
    assert torch.allclose(model.act(half), model.act(batch), atol=1e-2)
    assert model(half)["loss"].dtype == torch.float32


def test_a_vision_tells_what_determines_its_features() -> None:
    encoders = [
        VisionTransformer([56, 56]),
        VisionTransformer([56, 56], heads=8),
        VisionTransformer([56, 56], patch=14),
        VisionTransformer([64, 80], resize=[28, 42]),
    ]
    prints = [json.dumps(encoder.fingerprint(), sort_keys=True) for encoder in encoders]
    assert len(set(prints)) == len(prints)


def test_dropout_is_off_by_default_and_in_eval_mode(data: Tabletop) -> None:
    batch, spec = data.batch([0, 1]), data.spec
    model, dropped = make(spec), make(spec, "model.fusion.dropout=0.5")
    assert torch.equal(model(batch)["loss"], model(batch)["loss"])
    assert not torch.equal(dropped(batch)["loss"], dropped(batch)["loss"])
    assert torch.equal(dropped.eval()(batch)["loss"], model(batch)["loss"])


def test_bf16_autocast_is_close_to_float32(model: VLA, data: Tabletop) -> None:
    batch = data.batch(range(8))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(batch)
        low["loss"].backward()
    assert low["loss"].dtype == torch.float32
    assert low["loss"].item() == pytest.approx(model(batch)["loss"].item(), rel=0.05)


def test_a_few_updates_learn_a_batch(model: VLA, data: Tabletop) -> None:
    batch = data.batch(range(8))
    trained = [p for n, p in model.named_parameters() if not n.startswith("vision.")]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(40):
        loss = model(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_configuration_freezes_vision_and_slows_language() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["model=vla", "model/lang_encoder=words"])
    assert config.optim.lr_multipliers == {
        "vision": 0,
        "lang_encoder": 0.1,
        "fusion": 1,
        "action_head": 1,
    }
    names = {name for name, _ in make(robot_spec()).named_children()}
    assert names == set(config.optim.lr_multipliers)


@pytest.mark.parametrize(
    ("overrides", "changes", "named"),
    [
        (["model.vision.patch=9"], {}, ["model.vision.patch=9", "56x56"]),
        (
            ["model.vision.resize=null"],
            {},
            ["model.vision.patch=7", "64x80", "model.vision.resize"],
        ),
        (["model.vision.heads=5"], {}, ["heads=5", "width=96"]),
        ([], {"state_dim": 2}, ["action_dim=3", "state_dim=2"]),
        ([], {"action_dim": 2}, ["actions", 3, 2]),
    ],
)
def test_wrong_sizes_are_named(
    overrides: list[str], changes: dict[str, Any], named: list[Any]
) -> None:
    with pytest.raises(Exception) as caught:
        make(robot_spec(**changes), *overrides)
    chain = [caught.value, caught.value.__cause__]  # Hydra's error, or the one itself
    (error,) = [error for error in chain if isinstance(error, ConfigError)]
    assert unnamed(str(error), *named) == []
