"""One update's gradient: summed over micro-batches and ranks, divided once, clipped, judged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from atlas.errors import ConfigError
from atlas.training.optimization.optimizer import Optimizer, total_norm
from atlas.training.ranks.world import World, is_sharded

Number = float | torch.Tensor
_TINY = 1e-12


class Sums:
    """Sums over the micro-batches of one update: loss and metrics times the weight, and the weight.

    A model that returns no `weight` counts every micro-batch the same, since all of them hold the
    same number of samples. Metrics are summed only in an update that is logged (`detailed`).
    """

    def __init__(self, detailed: bool) -> None:
        self.detailed = detailed
        self.loss: Number = 0.0
        self.weight: Number = 0.0
        self.others: dict[str, Number] = {}
        self._same_everywhere = True  # no weight was given, so every rank has the same

    def add(self, out: Mapping[str, Any]) -> torch.Tensor:
        """Take in what the model returned; gives the tensor to call `backward` on."""
        loss = loss_of(out, trained=True)
        weight = out.get("weight")
        total = loss if weight is None else loss * weight
        self.loss = self.loss + total.detach()
        self.weight = self.weight + (1.0 if weight is None else weight)
        self._same_everywhere &= weight is None
        if self.detailed:
            for name, value in scalars(out).items():
                self.others[name] = self.others.get(name, 0.0) + value * (
                    1.0 if weight is None else weight
                )
        return total

    def over_ranks(self, world: World) -> None:
        """Add up what every rank has summed; a constant weight needs no communication."""
        if world.size == 1:
            return
        if self._same_everywhere and not self.detailed:
            self.weight *= world.size
            return
        names = sorted(self.others)
        values = [self.loss, self.weight, *(self.others[name] for name in names)]
        packed = torch.stack([as_tensor(v, world.device) for v in values])
        world.sum(packed)
        self.loss = packed[0]
        self.weight = self.weight * world.size if self._same_everywhere else packed[1]
        self.others = dict(zip(names, packed[2:], strict=True))

    def means(self) -> dict[str, Number]:
        """`train/loss` and the model's other scalars, each over all valid elements."""
        weight = floor(self.weight)
        named = {"loss": self.loss, **self.others}
        return {f"train/{name}": value / weight for name, value in named.items()}


class Gradient:
    """Turns summed gradients into the mean over all valid elements, clipped at `clip_norm`."""

    def __init__(self, optimizer: Optimizer, world: World, clip_norm: float | None) -> None:
        self._optimizer = optimizer
        self._world = world
        self._clip = clip_norm
        self._cut = any(map(is_sharded, optimizer.parameters))
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=world.device)

    def finish(self, step: int, sums: Sums) -> tuple[Number, torch.Tensor | None]:
        """Scale and clip in place; returns the norm before clipping, and the flag of a good update.

        On the CPU the flag is None and `first_bad` is up to date at once; on CUDA nothing is read.
        """
        gradients = self._optimizer.gradients()
        norm = self._norm(gradients)
        # DDP and FSDP have averaged over the ranks what is to be summed over them.
        scale = self._world.size / floor(sums.weight)
        if self._world.device.type == "cpu":
            return self._finish_here(step, sums, gradients, float(norm), float(scale)), None
        norm = norm * scale
        good = torch.isfinite(norm) & torch.isfinite(as_tensor(sums.loss, norm.device))
        self.first_bad = torch.where((self.first_bad < 0) & ~good, step, self.first_bad)
        factor = scale if self._clip is None else scale * clip_factor(norm, self._clip)
        torch._foreach_mul_(gradients, as_tensor(factor, norm.device))
        return norm, good

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Over all ranks, where `gradients` are this one's parts."""
        norm = total_norm(gradients)
        if self._cut:
            # In double precision: a square is infinite long before its root.
            norm = self._world.sum(norm.double().square()).sqrt().to(norm.dtype)
        return norm

    def _finish_here(
        self, step: int, sums: Sums, gradients: list[torch.Tensor], norm: float, scale: float
    ) -> float:
        norm *= scale
        if not (math.isfinite(norm) and math.isfinite(float(sums.loss))):
            self.first_bad.fill_(step)
        factor = scale if self._clip is None else scale * min(1.0, self._clip / (norm + 1e-6))
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        return norm


def clip_factor(norm: torch.Tensor, largest: float) -> torch.Tensor:
    """What brings a gradient of `norm` down to `largest` (as `torch.nn.utils.clip_grad_norm_`)."""
    return torch.clamp(largest / (norm + 1e-6), max=1.0)


def loss_of(out: Any, trained: bool) -> torch.Tensor:
    """The loss in what a model returned; `ConfigError` where that is not what is needed of it."""
    if not isinstance(out, Mapping) or "loss" not in out:
        raise ConfigError(
            f"model._target_: model(batch) returns {type(out).__name__}"
            + (f" with {', '.join(map(str, out))}" if isinstance(out, Mapping) else "")
            + "; it must return a dictionary with `loss`"
        )
    loss = out["loss"]
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shape = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise ConfigError(f"model._target_: `loss` is {shape}; it must be a tensor of one number")
    if trained and not loss.requires_grad:
        raise ConfigError(
            "model._target_: `loss` has no gradient, as after detach() or a conversion to whole "
            "numbers; it must depend on a parameter that is trained"
        )
    return loss.reshape(()) if loss.ndim else loss


def scalars(out: Mapping[str, Any]) -> dict[str, Number]:
    """What a model returned beside `loss` and `weight` that is one number."""
    return {
        name: value.detach() if isinstance(value, torch.Tensor) else value
        for name, value in out.items()
        if name not in ("loss", "weight")
        and (
            isinstance(value, int | float)
            or (isinstance(value, torch.Tensor) and value.numel() == 1)
        )
    }


def floor(weight: Number) -> Number:
    """`weight`, but never 0: an update without a valid element has gradient 0, not NaN."""
    return weight.clamp(min=_TINY) if isinstance(weight, torch.Tensor) else max(weight, _TINY)


def as_tensor(value: Number, device: torch.device) -> torch.Tensor:
    """`value` as a float32 scalar on `device`."""
    if isinstance(value, torch.Tensor):
        return value.detach().reshape(()).to(device, torch.float32)
    return torch.tensor(value, dtype=torch.float32, device=device)
