"""Parameter groups, their rates, the gradient's norm and the update."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atlas.errors import ConfigError, nearest
from atlas.schedule import LearningRate
from atlas.training.optimization.dynamo import bare_step, spare_compiler
from atlas.training.ranks.world import local_part

REST = "rest"  # the group of parameters that no multiplier path matches
_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._BatchNorm,
)


@dataclass(frozen=True)
class Group:
    """Parameters that share a multiplier: `name` is the path that matched, or `rest`."""

    name: str
    multiplier: float
    decayed: list[nn.Parameter]
    undecayed: list[nn.Parameter]

    @property
    def frozen(self) -> bool:
        return self.multiplier == 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.decayed, *self.undecayed]

    @property
    def count(self) -> int:
        """How many numbers the parameters hold."""
        return sum(p.numel() for p in self.parameters)


def group_parameters(model: nn.Module, multipliers: Mapping[str, float]) -> list[Group]:
    """Sort the parameters by the longest multiplier path that matches; raises `ConfigError`.

    A path matches a parameter whose dotted name starts with it. Biases, norms, embeddings and
    everything with fewer than two dimensions go without weight decay.
    """
    modules = [name for name, _ in model.named_modules() if name]
    names = [name for name, _ in model.named_parameters()]
    problems = [
        f"optim.lr_multipliers.{path} matches no parameter of the model{nearest(path, _tops(modules, names))}"
        for path in multipliers
        if not any(_matches(path, name) for name in names)
    ]
    if problems:
        raise ConfigError(problems)
    groups: dict[str, Group] = {}
    kept = _undecayed(model)
    for name, parameter in model.named_parameters():
        path = max((p for p in multipliers if _matches(p, name)), key=len, default=REST)
        factor = float(multipliers.get(path, 1.0))
        group = groups.setdefault(path, Group(path, factor, [], []))
        (group.undecayed if id(parameter) in kept else group.decayed).append(parameter)
    return list(groups.values())


def freeze(groups: list[Group]) -> None:
    """Take the gradients from groups with multiplier 0."""
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(not group.frozen and parameter.requires_grad)


class Optimizer:
    """The optimizer of a run: groups by module, rates as a function of the step, one guarded update."""

    def __init__(
        self,
        groups: list[Group],
        factory: Callable[..., torch.optim.Optimizer],
        *,
        rate: LearningRate,
    ) -> None:
        self._rate = rate
        trained = [g for g in groups if not g.frozen and any(p.requires_grad for p in g.parameters)]
        if not trained:
            raise ConfigError(
                "optim.lr_multipliers leaves nothing to train; give a module a factor above 0"
            )
        self.multipliers = {group.name: group.multiplier for group in trained}
        self.rates = rate.rates(0, self.multipliers)
        self.parameters = [p for g in trained for p in g.parameters if p.requires_grad]
        spare_compiler()
        self.inner = factory(list(self._inner_groups(trained)))
        self._step = bare_step(self.inner)
        self._accepts_found_inf = bool(getattr(self.inner, "_step_supports_amp_scaling", False))

    def set_rates(self, step: int) -> None:
        """Apply the rates of update `step`; `rates` holds them, by the group's name."""
        self.rates = self._rate.rates(step, self.multipliers)
        for group in self.inner.param_groups:
            group["lr"] = self.rates[group["name"]]

    def gradients(self) -> list[torch.Tensor]:
        """The gradients there are, this rank's parts where they are cut over the ranks.

        A parameter that the loss did not use has none.
        """
        return [local_part(p.grad) for p in self.parameters if p.grad is not None]

    def step(self, good: torch.Tensor | None) -> None:
        """Update the weights, unless the flag `good` on the device says that the gradient is bad.

        None: the caller has looked already. Fused optimizers skip a bad update on the device;
        the flag is read here only for others, which waits for the device once an update.
        """
        if good is not None and self._accepts_found_inf:
            self.inner.found_inf = (~good).to(torch.float32)  # type: ignore[attr-defined]
            self.inner.grad_scale = None  # type: ignore[attr-defined]
        if good is None or self._accepts_found_inf or bool(good):
            self._step()
        for parameter in self.parameters:
            parameter.grad = None

    def _inner_groups(self, trained: list[Group]) -> Iterator[dict[str, Any]]:
        for group in trained:
            base = {"name": group.name, "lr": self.rates[group.name]}
            decayed = [p for p in group.decayed if p.requires_grad]
            undecayed = [p for p in group.undecayed if p.requires_grad]
            if decayed:
                yield {**base, "params": decayed}
            if undecayed:
                yield {**base, "params": undecayed, "weight_decay": 0.0}


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm over all `gradients` as one scalar on their device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def check_fused(factory: Any, device: torch.device) -> None:
    """Raise `ConfigError` where the optimizer is told to be fused and cannot."""
    keywords = getattr(factory, "keywords", {})
    target = getattr(factory, "func", factory)
    if keywords.get("fused") and "fused" not in inspect.signature(target).parameters:
        raise ConfigError(
            f"optim.optimizer.fused=true and {target.__name__} has no fused form; "
            "take it out with ~optim.optimizer.fused"
        )


def _matches(path: str, name: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def _tops(modules: list[str], names: list[str]) -> list[str]:
    """What to offer for a path that matches nothing: modules down to the second level."""
    shallow = [name for name in modules if name.count(".") < 2]
    return shallow or names


def _undecayed(model: nn.Module) -> set[int]:
    """Ids of the parameters that go without weight decay."""
    kept: set[int] = set()
    for module in model.modules():
        plain = isinstance(module, (nn.Embedding, nn.EmbeddingBag, *_NORMS))
        for name, parameter in module.named_parameters(recurse=False):
            learned = any(word in name.lower() for word in ("bias", "embed", "token"))
            if plain or learned or parameter.ndim < 2:
                kept.add(id(parameter))
    return kept
