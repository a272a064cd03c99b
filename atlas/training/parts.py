"""What a run trains with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from atlas.training.optimization.optimizer import Group, Optimizer


@dataclass
class Parts:
    """The objects of a configuration; `spec` is what the data told the model about itself, plain values."""

    train: Any
    val: Any | None
    spec: dict[str, Any] | None
    model: nn.Module
    groups: list[Group]
    optimizer: Optimizer
