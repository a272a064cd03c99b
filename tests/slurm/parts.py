"""A data set that breaks on one rank."""

from __future__ import annotations

import os

import torch
from own_parts import Points


class Brittle(Points):
    """Points of which rank 1 cannot read sample 7."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 7 and os.environ["RANK"] == "1":
            raise RuntimeError("sample 7 cannot be read")
        return super().__getitem__(index)
