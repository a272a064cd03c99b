"""The action heads: what is learned from, what is acted with, and that padding has no say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from atlas.models.action_head import CategoricalHead, ChunkHead, FlowMatchingHead

torch.set_num_threads(1)

CONF = Path(__file__).resolve().parents[2] / "conf"
WIDTH = 16
# A table top, a joint vector, a pose of 7 numbers with a gripper, a long chunk.
SHAPES = [(8, 2), (8, 26), (16, 8), (50, 7)]


def make(name: str, horizon: int = 8, action_dim: int = 3, *overrides: str) -> Any:
    torch.manual_seed(0)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [f"model/action_head={name}", *overrides])
    return instantiate(config.model.action_head)(
        width=WIDTH, horizon=horizon, action_dim=action_dim
    )


def chunks(
    samples: int, horizon: int = 8, action_dim: int = 3, discrete: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, actions and a mask that leaves half of the second chunk out."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(samples, horizon, dtype=torch.bool)
    mask[1:2, horizon // 2 :] = False
    features = torch.randn(samples, WIDTH, generator=generator)
    actions = torch.randn(samples, horizon, action_dim, generator=generator)
    if discrete:
        actions = (actions == actions.amax(dim=-1, keepdim=True)).float()
    return features, actions, mask


@pytest.mark.parametrize("name", ["l1", "flow_matching", "categorical"])
@pytest.mark.parametrize(("horizon", "action_dim"), SHAPES)
def test_any_chunk(name: str, horizon: int, action_dim: int) -> None:
    head = make(name, horizon, action_dim)
    features, actions, mask = chunks(3, horizon, action_dim)
    errors, _ = head.errors(features, actions, mask)
    errors.sum().backward()
    elements = 1 if head.discrete else action_dim
    assert errors.shape == (3, horizon, elements) and errors.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    assert head(features).shape == actions.shape


@pytest.mark.parametrize("name", ["l1", "flow_matching", "categorical"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_has_no_say(name: str, training: bool) -> None:
    head = make(name).train(training)
    features, actions, mask = chunks(2)

    def learned(actions: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        head.zero_grad()
        errors, measures = head.errors(features, actions, mask)
        errors.sum().backward()
        for values in (errors, *measures.values()):
            assert not values[~mask].any()
        return errors, torch.cat([p.grad.flatten() for p in head.parameters()])

    plain = learned(actions)
    spoilt = learned(actions.masked_fill(~mask[..., None], torch.nan))
    assert all(torch.equal(one, other) for one, other in zip(plain, spoilt, strict=True))


@pytest.mark.parametrize("name", ["l1", "flow_matching", "categorical"])
def test_a_chunk_without_a_valid_action_teaches_nothing(name: str) -> None:
    head = make(name)
    features, actions, mask = chunks(2)
    errors, _ = head.errors(features, actions, torch.zeros_like(mask))
    errors.sum().backward()
    assert not errors.any()
    assert not any(p.grad.any() for p in head.parameters() if p.grad is not None)


def test_the_regression_keeps_its_names() -> None:
    head = make("l1")
    assert isinstance(head, ChunkHead)
    assert list(head.state_dict()) == [
        f"layers.{n}.{p}" for n in (0, 3) for p in ("weight", "bias")
    ]
    errors, measures = head.errors(*chunks(2))
    assert list(measures) == ["l1"] and measures["l1"] is errors


def exactly(target: Tensor) -> Any:
    """The velocity of the lines that all lead to `target`."""

    def velocity(chunk: Tensor, time: Tensor, features: Tensor, mask: Any) -> Tensor:
        return (chunk - target) / time[..., None]

    return velocity


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_the_right_velocity_has_no_error_and_leads_to_the_actions(steps: int) -> None:
    head = make("flow_matching", 8, 3, f"model.action_head.steps={steps}").eval()
    features, actions, mask = chunks(4)
    head._velocity = exactly(actions)
    errors, measures = head.errors(features, actions, mask)
    assert errors.max() < 1e-6 and measures["l1"].max() < 1e-5
    assert torch.allclose(head(features), actions, atol=1e-5)


def test_time_is_from_beta() -> None:
    head, seen = make("flow_matching"), []

    def velocity(chunk: Tensor, time: Tensor, features: Tensor, mask: Any) -> Tensor:
        seen.append(time)
        return torch.zeros_like(chunk)

    head._velocity = velocity
    torch.manual_seed(0)
    head.errors(*chunks(20_000, 1, 1))
    beta = torch.distributions.Beta(1.5, 1.0)
    assert seen[0].mean().item() == pytest.approx(beta.mean.item(), abs=0.01)
    assert seen[0].var().item() == pytest.approx(beta.variance.item(), abs=0.01)


def test_learning_draws_from_the_global_generator_and_acting_does_not() -> None:
    head = make("flow_matching")
    batch = chunks(2)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return head.errors(*batch)[0].sum().item()

    assert loss(1) == loss(1) != loss(2)
    head.eval()
    before = torch.get_rng_state()
    one, other = head(batch[0]), head(batch[0])
    assert torch.equal(one, other) and torch.equal(torch.get_rng_state(), before)


def test_a_sample_acts_alike_in_any_batch() -> None:
    head = make("flow_matching").eval()
    features, *_ = chunks(4)
    assert torch.allclose(head(features)[2], head(features[2:3])[0], atol=1e-6)
    again = make("flow_matching", 8, 3, "model.action_head.seed=1").eval()
    assert not torch.allclose(head(features), again(features))


def test_the_distance_is_known_in_eval_mode_alone() -> None:
    head = make("flow_matching")
    features, actions, mask = chunks(2)
    assert head.errors(features, actions, mask)[1] == {}
    distances = head.eval().errors(features, actions, mask)[1]["l1"]
    expected = (head(features) - actions).abs()[mask]
    assert torch.allclose(distances[mask], expected, atol=1e-6)


def test_two_ways_round_are_not_averaged() -> None:
    """Half of the demonstrations pass on the left, half on the right, and the middle is wrong."""
    torch.manual_seed(0)
    head = FlowMatchingHead(WIDTH, 1, 1, hidden=32, depth=1)
    features, mask = torch.zeros(256, WIDTH), torch.ones(256, 1, dtype=torch.bool)
    sides = torch.where(torch.rand(256, 1, 1) < 0.5, -1.0, 1.0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(250):
        errors, _ = head.errors(features, sides, mask)
        optimizer.zero_grad()
        errors.mean().backward()
        optimizer.step()
    ends = []
    for start in (-1.0, -0.3, 0.3, 1.0):  # it is the noise that decides
        head.noise.fill_(start)
        ends.append(round(head.eval()(features[:1]).item()))
    assert ends == [-1, -1, 1, 1]


def test_a_choice_is_measured_as_torch_does() -> None:
    head = make("categorical", 8, 5).eval()
    features, actions, mask = chunks(3, 8, 5, discrete=True)
    errors, measures = head.errors(features, actions, mask)
    likely = head(features)
    taken = actions.argmax(dim=-1)
    assert torch.allclose(likely.sum(dim=-1), torch.ones(3, 8))
    expected = torch.nn.functional.nll_loss(likely[mask].log(), taken[mask])
    assert torch.allclose(errors.sum() / mask.sum(), expected)
    right = (likely.argmax(dim=-1) == taken)[mask].float().mean()
    assert torch.allclose(measures["accuracy"].sum() / mask.sum(), right)
    missed = 1 - likely[mask].gather(1, taken[mask][:, None])
    assert torch.allclose(measures["l1"].sum() / 2 / mask.sum(), missed.mean())


def test_two_ways_round_are_both_likely() -> None:
    """Half of the demonstrations turn left, half right, and none goes straight on."""
    torch.manual_seed(0)
    head = CategoricalHead(WIDTH, 1, 3)
    features, mask = torch.zeros(64, WIDTH), torch.ones(64, 1, dtype=torch.bool)
    sides = torch.eye(3)[[0, 2] * 32][:, None]
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(100):
        errors, _ = head.errors(features, sides, mask)
        optimizer.zero_grad()
        errors.mean().backward()
        optimizer.step()
    assert torch.allclose(head(features)[0, 0], torch.tensor([0.5, 0.0, 0.5]), atol=0.02)
