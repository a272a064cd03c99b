"""Parameter groups, the scaling of rates, the gradient's norm, and the update that a flag guards."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from commands import unnamed
from torch import nn

from atlas.errors import ConfigError
from atlas.schedule import Cosine, LearningRate, scaling
from atlas.training.optimization.gradient import Gradient, Sums
from atlas.training.optimization.optimizer import (
    Optimizer,
    check_fused,
    freeze,
    group_parameters,
    total_norm,
)
from atlas.training.ranks.world import World
from atlas.training.saving.frozen import frozen_modules, frozen_names

CPU = torch.device("cpu")


class Policy(nn.Module):
    """Parts as a policy has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vision = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.lang = nn.ModuleDict(
            {"embedding": nn.Embedding(5, 4), "encoder": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
        )
        self.language = nn.Linear(4, 4)  # its name begins like that of another
        self.head = nn.Linear(4, 2)
        self.query_token = nn.Parameter(torch.randn(1, 4))
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
        lang = self.lang["norm"](self.lang["encoder"](self.lang["embedding"](word)))
        mixed = self.vision(x) + self.language(lang) + self.query_token
        return self.head(mixed) * self.gain[:2]


def named(model: nn.Module, groups: list[Any]) -> dict[str, set[str]]:
    """The names of the parameters in each group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {group.name: {names[id(p)] for p in group.parameters} for group in groups}


def optimizer(model: nn.Module, factory: Any, multipliers: dict[str, float] | None = None, **more):
    groups = group_parameters(model, multipliers or {})
    freeze(groups)
    rate = LearningRate(**{"base": 0.1, "schedule": Cosine(4), "steps": 20, **more})
    return Optimizer(groups, factory, rate=rate)


def backward(model: nn.Module, size: float = 1.0) -> None:
    torch.manual_seed(1)
    out = model(torch.randn(8, 4), torch.randint(5, (8,)))
    (size * out.square().mean()).backward()


@pytest.mark.parametrize(
    ("multipliers", "expected"),
    [
        ({}, {"rest": 15}),
        ({"lang": 0.1}, {"lang": 5, "rest": 10}),
        # the longest path wins, whatever the order
        ({"lang": 0.1, "lang.encoder": 1}, {"lang": 3, "lang.encoder": 2, "rest": 10}),
        ({"lang.encoder": 1, "lang": 0.1}, {"lang": 3, "lang.encoder": 2, "rest": 10}),
        ({"lang.encoder.weight": 2, "lang": 1}, {"lang.encoder.weight": 1, "lang": 4, "rest": 10}),
        ({"language": 0.5}, {"language": 2, "rest": 13}),
        ({"query_token": 3}, {"query_token": 1, "rest": 14}),
    ],
)
def test_grouping(multipliers, expected):
    model = Policy()
    groups = group_parameters(model, multipliers)
    found = named(model, groups)
    assert {name: len(members) for name, members in found.items()} == expected
    for name, members in found.items():
        assert name == "rest" or all(f"{m}.".startswith(f"{name}.") for m in members)
    assert {g.name: g.multiplier for g in groups} == {
        name: float(multipliers.get(name, 1)) for name in expected
    }
    assert sum(g.count for g in groups) == sum(p.numel() for p in model.parameters())


def test_paths_that_match_nothing_list_what_there_is():
    with pytest.raises(ConfigError) as raised:
        group_parameters(Policy(), {"visoin": 0, "head": 1, "lan": 0.1})
    wrong, short = raised.value.problems
    there = ("vision", "lang.encoder", "language", "head")
    # Suggested, and listed with the others.
    assert unnamed(wrong, "optim.lr_multipliers.visoin", "vision", *there) == []
    assert unnamed(short, "optim.lr_multipliers.lan", *there) == []


def test_no_decay_on_biases_norms_embeddings_and_what_is_flat():
    model = Policy()
    (group,) = group_parameters(model, {})
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in group.decayed} == {
        "vision.0.weight",
        "lang.encoder.weight",
        "language.weight",
        "head.weight",
    }
    inner = optimizer(model, partial(torch.optim.AdamW, weight_decay=0.3)).inner
    decay = {names[id(p)]: g["weight_decay"] for g in inner.param_groups for p in g["params"]}
    assert decay["head.weight"] == 0.3 and decay["head.bias"] == decay["gain"] == 0.0
    assert decay["lang.embedding.weight"] == decay["vision.1.weight"] == decay["query_token"] == 0.0
    assert len(decay) == 15


def test_frozen_means_no_gradient_no_update_and_eval_for_good():
    model = Policy()
    held = optimizer(model, torch.optim.AdamW, {"vision": 0, "lang.norm": 0})
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        "vision.0.weight",
        "vision.0.bias",
        "vision.1.weight",
        "vision.1.bias",
        "lang.norm.weight",
        "lang.norm.bias",
    }
    assert set(held.rates) == {"rest"} and len(held.parameters) == 9
    assert frozen_modules(model) == [model.vision, model.lang["norm"]]
    assert "vision.1.running_mean" in frozen_names(model)
    before = copy.deepcopy(model.state_dict())
    model.train()
    for module in frozen_modules(model):
        module.eval()
    backward(model)
    assert all(p.grad is None for p in model.vision.parameters())
    held.set_rates(5)
    held.step(None)
    after = model.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {n for n in before if n.startswith(("vision.", "lang.norm."))}


def test_what_the_model_froze_itself_stays_frozen():
    model = Policy()
    model.head.weight.requires_grad_(False)
    held = optimizer(model, torch.optim.AdamW, {"head": 1})
    assert not model.head.weight.requires_grad and len(held.parameters) == 14


def test_nothing_left_to_train_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"optim\.lr_multipliers"):
        optimizer(model, torch.optim.AdamW, {"0": 0})


@pytest.mark.parametrize(
    ("kind", "batch", "base", "rate"),
    [
        ("none", 64, 8, 1e-4),
        ("linear", 64, 8, 8e-4),
        ("sqrt", 64, 8, 2.8284e-4),
        ("linear", 8, 8, 1e-4),
        ("sqrt", 8, 8, 1e-4),
        ("linear", 4, 8, 5e-5),
        ("sqrt", 2, 8, 5e-5),
    ],
)
def test_scaling_has_the_numbers_of_the_seed(kind, batch, base, rate):
    assert 1e-4 * scaling(kind, batch, base) == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize("step", [0, 2, 4, 12, 19, 20])
def test_every_group_has_its_rate(step):
    model = Policy()
    held = optimizer(model, torch.optim.AdamW, {"vision": 0, "lang": 0.1, "head": 2})
    factor = Cosine(4)(step, 20)
    held.set_rates(step)
    assert held.rates == pytest.approx(
        {"lang": 0.01 * factor, "head": 0.2 * factor, "rest": 0.1 * factor}
    )
    assert {g["name"]: g["lr"] for g in held.inner.param_groups} == held.rates


def test_rates_survive_loading_the_state():
    model = Policy()
    held = optimizer(model, torch.optim.AdamW, {"lang": 0.1})
    held.set_rates(4)
    backward(model)
    held.step(None)
    again = optimizer(Policy(), torch.optim.AdamW, {"lang": 0.1})
    again.inner.load_state_dict(held.inner.state_dict())
    again.set_rates(12)
    assert {g["name"]: g["lr"] for g in again.inner.param_groups} == again.rates


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("clip", [0.1, 1.0, None])
def test_norm_and_clipping_equal_torch(size, clip):
    model, other = Policy(), Policy()
    model.eval(), other.eval()
    held = optimizer(model, torch.optim.SGD)
    backward(model, size)
    backward(other, size)
    theirs = nn.utils.clip_grad_norm_(other.parameters(), clip or float("inf"))
    assert float(total_norm(held.gradients())) == pytest.approx(float(theirs), rel=1e-6)
    sums = Sums(detailed=False)
    sums.add({"loss": torch.tensor(1.0, requires_grad=True)})
    norm, good = Gradient(held, World(0, 0, 1, CPU), clip).finish(0, sums)
    assert norm == pytest.approx(float(theirs), rel=1e-6) and good is None
    for mine, their in zip(model.parameters(), other.parameters(), strict=True):
        # clip_grad_norm_ leaves out the last parameter's unused gradient just as it is
        assert torch.allclose(mine.grad, their.grad, rtol=1e-5, atol=0)


def test_a_parameter_that_the_loss_leaves_out():
    model = Policy()
    held = optimizer(model, torch.optim.AdamW)
    before = model.head.weight.detach().clone()
    model.language(torch.ones(1, 4)).sum().backward()
    assert len(held.gradients()) == 2
    held.set_rates(4)
    held.step(None)
    assert torch.equal(before, model.head.weight)


def tensors(state: Any) -> list[torch.Tensor]:
    return [
        v.clone() for values in state["state"].values() for v in values.values() if v is not None
    ]


FACTORIES = {
    "adamw fused": partial(torch.optim.AdamW, fused=True, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, fused=False, weight_decay=0.1),
    "sgd fused": partial(torch.optim.SGD, fused=True, momentum=0.9, weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, fused=False),
    "sgd momentum": partial(torch.optim.SGD, fused=False, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FACTORIES)
def test_a_bad_update_changes_nothing(name, bad):
    model = Policy()
    held = optimizer(model, FACTORIES[name])
    held.set_rates(4)
    good = torch.tensor(True)
    backward(model)
    held.step(good)  # so that there is a state
    weights = [p.detach().clone() for p in model.parameters()]
    state = tensors(held.inner.state_dict())
    backward(model, bad)
    held.step(~good)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(state, tensors(held.inner.state_dict()), strict=True)
    )
    assert held.gradients() == []  # the next update starts from nothing


@pytest.mark.parametrize("name", FACTORIES)
def test_a_good_flag_is_as_no_flag(name):
    models = [Policy(), Policy()]
    for model, flag in zip(models, [None, torch.tensor(True)], strict=True):
        held = optimizer(model, FACTORIES[name])
        for step in range(4, 7):
            held.set_rates(step)
            backward(model)
            held.step(flag)
    one, other = (list(model.parameters()) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], next(Policy().parameters()))


def test_fused_where_there_is_no_fused_form():
    check_fused(partial(torch.optim.AdamW, fused=True), CPU)
    check_fused(partial(torch.optim.Rprop), CPU)
    with pytest.raises(ConfigError) as raised:
        check_fused(partial(torch.optim.Rprop, fused=True), CPU)
    wanted = ("optim.optimizer.fused=true", "Rprop", "~optim.optimizer.fused")
    assert unnamed(str(raised.value), *wanted) == []
