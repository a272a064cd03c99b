"""The exponential moving average of the trained weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class Ema:
    """Averages the trained parameters of `model`; buffers and frozen weights stay as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._names = [n for n, p in model.named_parameters() if p.requires_grad]
        self._live = [p for p in model.parameters() if p.requires_grad]
        self._average = [p.detach().clone() for p in self._live]

    def update(self, step: int) -> None:
        """Take in the weights after update `step`; young averages forget faster, as in TF's EMA."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, [p.detach() for p in self._live], 1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged weights by parameter name."""
        return dict(zip(self._names, self._average, strict=True))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the averages that `state_dict` gave."""
        for name, average in zip(self._names, self._average, strict=True):
            average.copy_(state[name])

    def _swap(self) -> None:
        with torch.no_grad():
            for live, average in zip(self._live, self._average, strict=True):
                kept = live.detach().clone()
                live.copy_(average)
                average.copy_(kept)
