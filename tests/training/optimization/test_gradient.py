"""One update's gradient is the same however the update is cut into micro-batches and over ranks."""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
from typing import Any

import pytest
import torch
from commands import unnamed
from torch import nn

from atlas.errors import ConfigError
from atlas.schedule import Constant, LearningRate
from atlas.training.feeding.stream import TrainStream
from atlas.training.optimization.gradient import Gradient, Sums
from atlas.training.optimization.optimizer import Optimizer, group_parameters
from atlas.training.ranks.world import World, join_ranks, leave_ranks

ALONE = World(0, 0, 1, torch.device("cpu"))
CUTS = [(1, 32), (2, 16), (4, 8), (32, 1)]


class Chunks:
    """32 samples of 6 steps, of which the first `valid` count."""

    def __init__(self, lengths: str) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(32, 6, 5, generator=generator)
        self.y = torch.randn(32, 6, 2, generator=generator)
        valid = {
            "equal": torch.full((32,), 6),
            "different": torch.randint(1, 7, (32,), generator=generator),
            # whole micro-batches without a valid element
            "mostly none": torch.where(torch.arange(32) % 11 == 0, 3, 0),
            "none": torch.zeros(32),
        }[lengths]
        self.mask = (torch.arange(6)[None] < valid[:, None]).float()

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "y": self.y[index], "mask": self.mask[index]}


class Net(nn.Module):
    """Returns the mean over the valid elements, and how many they were as `weight` says."""

    def __init__(self, weight: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
        self.weight = weight

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        error = (self.layers(batch["x"]) - batch["y"]).square().mean(-1)
        valid = batch["mask"].sum()
        loss = (error * batch["mask"]).sum() / valid.clamp(min=1)
        out = {"loss": loss, "twice": 2 * loss, "name": "no scalar", "many": error}
        if self.weight == "tensor":
            out["weight"] = valid
        elif self.weight == "whole tensor":
            out["weight"] = valid.long()
        elif self.weight == "number":
            out["weight"] = int(valid)
        return out


def update(cut: tuple[int, int], lengths: str, weight: str | None, clip: float | None = None):
    """The gradient, the norm and the metrics of one update, through the trainer's own pieces."""
    accumulate, size = cut
    data = Chunks(lengths)
    model = Net(weight)
    stream = TrainStream(
        data, seed=0, batch_size=size, accumulate=accumulate, workers=0, world=ALONE
    )
    optimizer = Optimizer(
        group_parameters(model, {}), torch.optim.SGD, rate=LearningRate(0.1, Constant(), 10)
    )
    sums = Sums(detailed=True)
    for _, batch in stream.iterate(0, 1):
        sums.add(model(batch)).backward()
    sums.over_ranks(ALONE)
    norm, _ = Gradient(optimizer, ALONE, clip).finish(0, sums)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return gradient, norm, {name: float(value) for name, value in sums.means().items()}


def plain(lengths: str) -> torch.Tensor:
    """The gradient of the mean over all valid elements, by hand, in double precision."""
    data, model = Chunks(lengths), Net(None).double()
    batch = {"x": data.x.double(), "y": data.y.double(), "mask": data.mask.double()}
    model(batch)["loss"].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(
    ("lengths", "weight"),
    [
        ("equal", None),
        ("equal", "tensor"),
        ("different", "tensor"),
        ("different", "whole tensor"),
        ("different", "number"),
        ("mostly none", "tensor"),
        ("mostly none", "number"),
    ],
)
def test_the_same_gradient_however_it_is_cut(cut, lengths, weight):
    gradient, norm, metrics = update(cut, lengths, weight)
    expected = plain(lengths)
    assert difference(gradient, expected) < 1e-5
    assert norm == pytest.approx(float(expected.norm()), rel=1e-5)
    whole = update((1, 32), lengths, weight)[2]
    assert metrics == pytest.approx(whole, rel=1e-5)
    assert set(metrics) == {"train/loss", "train/twice"}
    assert metrics["train/twice"] == pytest.approx(2 * metrics["train/loss"], rel=1e-5)


def test_the_weight_is_what_makes_it_so():
    gradient, _, _ = update((4, 8), "different", None)
    assert difference(gradient, plain("different")) > 1e-3


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_clipping_comes_after_the_division(cut):
    clipped, norm, _ = update(cut, "different", "tensor", clip=0.05)
    expected = plain("different")
    assert (
        norm == pytest.approx(float(expected.norm()), rel=1e-5) and norm > 0.05
    )  # before clipping
    assert float(clipped.norm()) == pytest.approx(0.05, rel=1e-4)
    assert difference(clipped / clipped.norm(), expected / expected.norm()) < 1e-5
    same, _, _ = update(cut, "different", "tensor", clip=1e6)
    assert difference(same, expected) < 1e-5


@pytest.mark.parametrize("weight", ["tensor", "number"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_no_valid_element_anywhere_gives_no_gradient(weight, clip):
    gradient, norm, metrics = update((4, 8), "none", weight, clip)
    assert torch.equal(gradient, torch.zeros_like(gradient)) and norm == 0
    assert metrics == {"train/loss": 0, "train/twice": 0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_is_known_by_its_step(value, where):
    model = Net(None)
    groups = group_parameters(model, {})
    optimizer = Optimizer(groups, torch.optim.SGD, rate=LearningRate(1, Constant(), 9))
    judge = Gradient(optimizer, ALONE, 1.0)
    for step, bad in [(3, False), (4, True)]:
        sums = Sums(detailed=False)
        loss = model({"x": torch.ones(1, 6, 5), "y": torch.ones(1, 6, 2), "mask": torch.ones(1, 6)})
        sums.add(loss).backward()
        if bad and where == "gradient":
            next(model.parameters()).grad[0, 0] = value
        elif bad:
            sums.loss = sums.loss * value
        judge.finish(step, sums)
        assert int(judge.first_bad) == (4 if bad else -1)


def test_scalars_are_not_summed_where_nothing_is_logged():
    sums = Sums(detailed=False)
    sums.add({"loss": torch.tensor(2.0, requires_grad=True), "other": torch.tensor(3.0)})
    assert set(sums.means()) == {"train/loss"}


Row = tuple[str, bool, float, float]


def as_rank(rank: int, port: int, tell: Any) -> None:
    """One of two ranks, whose samples are of different valid length: 1 of 6 steps on rank 1."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    world = join_ranks("cpu")
    for weight in (None, "tensor", "number"):
        for detailed in (True, False):
            tell.send((str(weight), detailed, *over_ranks(world, weight, detailed)))
    leave_ranks()


def over_ranks(world: World, weight: str | None, detailed: bool) -> tuple[float, float]:
    """How far gradient and loss are from those of all samples at once."""
    data, model = Chunks("equal"), Net(weight)
    if weight:
        data.mask[16:, 1:] = 0
    groups = group_parameters(model, {})
    optimizer = Optimizer(groups, torch.optim.SGD, rate=LearningRate(1, Constant(), 9))
    sums = Sums(detailed)
    for start in (16 * world.rank, 16 * world.rank + 8):
        part = slice(start, start + 8)
        batch = {"x": data.x[part], "y": data.y[part], "mask": data.mask[part]}
        sums.add(model(batch)).backward()
    for parameter in model.parameters():
        world.sum(parameter.grad).div_(2)  # what DDP leaves behind
    sums.over_ranks(world)
    Gradient(optimizer, world, None).finish(0, sums)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    whole = Net(None)
    loss = whole({"x": data.x, "y": data.y, "mask": data.mask})["loss"]
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in whole.parameters()])
    error = abs(float(sums.means()["train/loss"]) - float(loss)) if detailed else 0.0
    return difference(gradient, expected), error


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[tuple[str, bool], tuple[float, float]]]:
    """What each of two ranks found: (weight, detailed) -> differences of gradient and loss."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # torch is there already
    pipes = [fork.Pipe(duplex=False) for _ in range(2)]
    ranks = [fork.Process(target=as_rank, args=(r, port, pipe[1])) for r, pipe in enumerate(pipes)]
    for rank in ranks:
        rank.start()
    found = []
    for mine, _ in pipes:
        assert mine.poll(60)
        rows: list[Row] = [mine.recv() for _ in range(6)]
        found.append(
            {(weight, detailed): (gradient, loss) for weight, detailed, gradient, loss in rows}
        )
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return found


@pytest.mark.parametrize("detailed", [True, False])
@pytest.mark.parametrize("weight", ["None", "tensor", "number"])
def test_the_same_gradient_over_ranks(two_ranks, weight, detailed):
    for rank in two_ranks:
        gradient, loss = rank[weight, detailed]
        assert gradient < 1e-5 and loss < 1e-6


@pytest.mark.parametrize(
    "out, named",
    [
        (None, ["NoneType"]),
        ({"l": 1.0}, ["dict", "l"]),
        (torch.ones(()), ["Tensor"]),
        ({"loss": 0.5}, ["float"]),
        ({"loss": torch.ones(3)}, ["[3]"]),
        ({"loss": torch.ones(())}, ["detach()"]),
    ],
    ids=["nothing", "another name", "bare", "float", "vector", "detached"],
)
def test_what_is_no_loss_is_told(out, named):
    with pytest.raises(ConfigError) as raised:
        Sums(detailed=True).add(out)
    assert unnamed(str(raised.value), "model._target_", "`loss`", *named) == []


def test_a_loss_of_one_number_in_a_list_is_that_number():
    loss = Sums(detailed=True).add({"loss": torch.ones(1, requires_grad=True)})
    assert loss.shape == () and loss.requires_grad
