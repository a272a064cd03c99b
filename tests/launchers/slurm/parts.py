"""A data set that breaks on one rank, and models that a machine without GPUs cannot judge."""

from __future__ import annotations

import os
import signal

import torch
from own_parts import Net, Points
from torch import nn


class Brittle(Points):
    """Points of which rank 1 cannot read sample 7."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 7 and os.environ["RANK"] == "1":
            raise RuntimeError("sample 7 cannot be read")
        return super().__getitem__(index)


class Faulty(Points):
    """Points in whose reading rank `rank` breaks `how`, after `after[n]` samples in attempt n."""

    def __init__(self, how: str, rank: int, after: list[int], **other: float) -> None:
        super().__init__(**other)
        attempt = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        mine = os.environ.get("RANK") == str(rank) and attempt < len(after)
        self.how, self.left = how, after[attempt] if mine else -1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.left -= 1
        sample = super().__getitem__(index)
        if self.left != 0:
            return sample
        if self.how == "raise":
            raise RuntimeError("the cable is loose")
        if self.how == "infinite":
            return {**sample, "x": sample["x"] / 0}
        os.kill(os.getpid(), getattr(signal, self.how))
        return sample


class Absent(Points):
    """Points whose files are on the nodes alone."""

    def __init__(self, samples: int, noise: float = 0.1) -> None:
        raise FileNotFoundError("/scratch/points")


class Lopsided(Net):
    """A head that does not fit."""

    def __init__(self, width: int = 16, dropout: float = 0.2, pause: float = 0.0) -> None:
        super().__init__(width, dropout, pause)
        self.head = nn.Linear(width + 1, 1)


class Silent(Net):
    """Returns no loss."""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"l": super().forward(batch)["loss"]}


class OnGpu(Net):
    """Cannot be built here."""

    def __init__(self, width: int = 16, dropout: float = 0.2, pause: float = 0.0) -> None:
        raise RuntimeError("no NVIDIA driver on this machine")


class Huge(Net):
    """Reads a value of its 400 GB, which without weights cannot be done."""

    def __init__(self, width: int = 16, dropout: float = 0.2, pause: float = 0.0) -> None:
        super().__init__(width, dropout, pause)
        self.table = nn.Embedding(10**6, 10**5)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.table.weight[0, 0].item()
        return super().forward(batch)


class Counting(Net):
    """Looks at a value in the middle of its forward pass."""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.encoder.weight.sum().item() == 0:
            raise ValueError("no weights")
        return super().forward(batch)


class Reading(Net):
    """Looks at its weights while it is built."""

    def __init__(self, width: int = 16, dropout: float = 0.2, pause: float = 0.0) -> None:
        super().__init__(width, dropout, pause)
        self.scale = float(self.encoder.weight.abs().max())


class Talking(Net):
    """Prints where the answer is expected."""

    def __init__(self, width: int = 16, dropout: float = 0.2, pause: float = 0.0) -> None:
        super().__init__(width, dropout, pause)
        print('[{"problems": ["printed"], "unchecked": []}]')
        os.write(1, b"hello")


class Deadly(Net):
    """Takes the process down."""

    def __init__(self, width: int = 16, dropout: float = 0.2, pause: float = 0.0) -> None:
        os._exit(3)
