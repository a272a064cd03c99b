"""A model, a data set, an optimizer and a schedule that are not Atlas's, for the tests."""

from __future__ import annotations

import math
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn


class Points(torch.utils.data.Dataset):
    """Noisy samples of a line; the noise is drawn anew whenever a sample is read."""

    def __init__(self, samples: int, noise: float = 0.1, bad: int = -1, delay: float = 0.0) -> None:
        self.samples, self.noise, self.bad, self.delay = samples, noise, bad, delay

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(self.delay)
        x = torch.linspace(-1, 1, 4) * math.sin(index)
        jitter = np.random.normal() + random.gauss(0, 1) + torch.randn(()).item()
        y = x.sum() + self.noise * jitter
        return {"x": x, "y": y if index != self.bad else y * math.nan}


class Holes(Points):
    """Points of which the samples `nan` are not finite and the samples `torn` cannot be read."""

    def __init__(self, nan: list[int] = (), torn: list[int] = (), **other: float) -> None:
        super().__init__(**other)
        self.nan, self.torn = set(nan), set(torn)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index in self.torn:
            raise OSError("the file ends too early")
        sample = super().__getitem__(index)
        return {**sample, "x": sample["x"] / 0 if index in self.nan else sample["x"]}

    def describe(self, index: int) -> str:
        """Where a sample was recorded."""
        return f"line.csv, row {index + 1}"


class Stuck(Points):
    """Points of which sample `at` takes a minute for as long as the file `flag` is there."""

    def __init__(self, flag: str, at: int = 5, **other: float) -> None:
        super().__init__(**other)
        self.flag, self.at = Path(flag), at

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.at and self.flag.exists():
            self.flag.with_suffix(".reached").touch()
            time.sleep(60)
        return super().__getitem__(index)


class Played(Points):
    """Points with scenes, of which number n is over after n + 1 actions, whose sum is measured."""

    def __init__(self, scenes: int, **other: float) -> None:
        super().__init__(**other)
        self.scenes = scenes

    def rollout(self, policy, scenes: list[int]) -> dict[str, np.ndarray]:
        totals = []
        for scene in scenes:
            x = torch.full((1, 4), 0.1 * scene)
            for _ in range(scene + 1):
                x = x + policy({"x": x})[:, None] / 10
            totals.append(float(x.sum()))
        return {"total": np.array(totals)}


class Net(nn.Module):
    """Two layers with dropout; `pause` seconds a forward pass make a step take its time."""

    def __init__(self, width: int = 16, dropout: float = 0.2, pause: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 1)
        self.pause = pause

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        time.sleep(self.pause)
        hidden = self.drop(torch.tanh(self.norm(self.encoder(batch["x"]))))
        error = self.head(hidden)[:, 0] - batch["y"]
        return {"loss": error.square().mean(), "mae": error.abs().mean()}


class Choosy(Net):
    """A model that looks at its numbers before it goes on."""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if batch["x"].abs().sum().item() < 0:
            raise ValueError("less than nothing")
        return super().forward(batch)


class Greedy(Net):
    """A model that changes its batch in place."""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batch["x"].mul_(0.5)
        return super().forward(batch)


class Moody(Net):
    """A model whose loss depends on what no seed reaches."""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = super().forward(batch)
        return {**out, "loss": out["loss"] * (1 + 0.01 * random.SystemRandom().random())}


class Heavy(Net):
    """A model with `ballast` million numbers that are saved, trained by nothing."""

    def __init__(self, ballast: int = 10, **other: float) -> None:
        super().__init__(**other)
        self.register_buffer("ballast", torch.arange(float(ballast * 1_000_000)))


class Plain(torch.optim.Optimizer):
    """Gradient descent as its own class."""

    def __init__(self, params, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(p.grad, alpha=-group["lr"])


class Tallied(torch.optim.AdamW):
    """AdamW whose updates are counted: rank 0 adds a byte for each to the file $TALLY."""

    def step(self, closure=None):
        super().step(closure)
        if (
            "TALLY" in os.environ
            and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
        ):
            with open(os.environ["TALLY"], "ab") as tally:
                tally.write(b".")


class Noisy(torch.optim.SGD):
    """Gradient descent with a random step beside it."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(torch.randn_like(p), alpha=0.1 * group["lr"])


def staircase(step: int, total: int, stairs: int) -> float:
    """Down in equal stairs."""
    return 1.0 - math.floor(step / total * stairs) / stairs


class Layer(nn.Module):
    """A residual layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.mix(self.norm(x)))


class Stack(nn.Module):
    """Two stacks of layers, the first of them frozen, and a norm whose statistics are buffers.

    Not every sample counts, and 7 numbers cannot be cut evenly. by_batch: a batch norm.
    """

    def __init__(
        self, width: int = 7, depth: int = 2, dropout: float = 0.1, by_batch: bool = True
    ) -> None:
        super().__init__()
        self.eye = nn.ModuleDict({"layers": nn.ModuleList(Layer(4) for _ in range(depth))})
        self.enter = nn.Linear(4, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm = nn.BatchNorm1d(width) if by_batch else nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 1)

    def act(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen = batch["x"]
        for layer in self.eye["layers"]:
            seen = layer(seen)
        hidden = self.enter(seen)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.drop(self.norm(hidden)))[:, 0]

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        error = self.act(batch) - batch["y"]
        valid = (batch["x"][:, 0] > -0.5).float()
        weight = valid.sum()
        return {"loss": (error.square() * valid).sum() / weight.clamp(min=1), "weight": weight}


class Uneven(Stack):
    """A stack of which rank 0 leaves a layer out, and one whose scale has no dimension."""

    def __init__(self, scalar: bool = False, **other: float) -> None:
        super().__init__(**other)
        self.extra = nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.ones(()) if scalar else torch.ones(1))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = super().forward(batch)
        loss = out["loss"] * self.scale.sum()
        if os.environ.get("RANK") == "1":
            loss = loss + self.extra(batch["x"]).square().mean()
        return {**out, "loss": loss}
