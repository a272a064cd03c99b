"""A data set and a model so small that what is measured is the loop around them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

SAMPLES, WIDTH, HIDDEN = 4096, 64, 256


def tensors(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, in memory."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, WIDTH, generator=generator)
    return inputs, inputs.roll(1, dims=1).tanh()


def mark(path: Path) -> None:
    """Write the time, and the processor time of this process and of those it waited for."""
    path.write_text(f"{time.monotonic()} {sum(os.times()[:4])}")


def network() -> nn.Sequential:
    """64-256-64."""
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))


class Vectors:
    """The tensors as a data set of Atlas's."""

    def __init__(self, seed: int = 0) -> None:
        self.inputs, self.targets = tensors(seed)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self.inputs[index], "targets": self.targets[index]}

    def batch(self, ids: npt.NDArray[Any]) -> dict[str, torch.Tensor]:
        """The samples `ids`."""
        index = torch.from_numpy(ids)
        return {"inputs": self.inputs[index], "targets": self.targets[index]}


class Marked(Vectors):
    """Writes the time at which the third batch is asked for.

    Atlas reads a batch ahead: the second update is being finished, so the first is over.
    """

    _asked = 0

    def batch(self, ids: npt.NDArray[Any]) -> dict[str, torch.Tensor]:
        """The samples `ids`."""
        self._asked += 1
        if self._asked == 3:
            mark(Path(os.environ["BENCHMARK_MARK"]))
        return super().batch(ids)


class MLP(nn.Module):
    """The network with its loss, as Atlas asks for a model; `pause` seconds a forward pass."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.net = network()
        self.pause = pause

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.pause:
            time.sleep(self.pause)
        return {"loss": functional.mse_loss(self.net(batch["inputs"]), batch["targets"])}
