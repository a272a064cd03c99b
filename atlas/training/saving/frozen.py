"""What of a model is not trained: its modules, the names of their state, the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def frozen_modules(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that have parameters and none that is trained: in eval mode for good."""

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            yield module
        else:
            for child in module.children():
                yield from visit(child)

    return list(visit(model))


def frozen_names(model: nn.Module) -> set[str]:
    """State of the modules that are not trained at all: their parameters and buffers."""
    frozen = {id(m) for outer in frozen_modules(model) for m in outer.modules()}
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if id(module) in frozen
        for name in (*dict(module.named_parameters(recurse=False)), *persistent_buffers(module))
    }


def persistent_buffers(module: nn.Module) -> list[str]:
    """Names of `module`'s own buffers that belong to its state."""
    skipped = module._non_persistent_buffers_set
    return [name for name, _ in module.named_buffers(recurse=False) if name not in skipped]


def frozen_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of `model` that training never changes."""
    names = frozen_names(model)
    return {name: value for name, value in model.state_dict().items() if name in names}
