"""Keeping torch's compiler out of runs that compile nothing: its import takes longer than torch's.

torch imports `torch._dynamo` when an optimizer is made and when it steps, only to tell the compiler
to leave that code alone. Both are spared here, with torch 2.6 to 2.13; where a later torch has other
names inside, nothing is spared and nothing breaks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from atlas.models.protocol import Untraced
from atlas.protocol import offers

_UNCOMPILED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def spare_compiler() -> None:
    """Let `torch.optim.Optimizer` call its methods as they are.

    `torch._disable_dynamo` looks for the marked function on the function itself before it imports
    the compiler to make one.
    """
    for name in _UNCOMPILED:
        plain: Any = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            vars(plain)["__dynamo_disable"] = plain


def bare_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """`optimizer.step` without its wrappers, where they have nothing to do.

    They run hooks, name the step in a profile, and break the compiler's graph: about 80 µs. Only
    torch's own optimizers are stepped bare, and only while nobody has put a hook on them.
    """
    step: Any = type(optimizer).step
    own = step.__module__.startswith("torch.optim.") and not optimizer.defaults.get(
        "differentiable"
    )
    while hasattr(step, "__wrapped__"):
        step = step.__wrapped__

    def bare() -> None:
        if _hooked(optimizer):
            optimizer.step()
            return
        with torch.no_grad():
            step(optimizer)

    return bare if own else optimizer.step


def _hooked(optimizer: Any) -> bool:
    module: Any = sys.modules["torch.optim.optimizer"]  # torch.optim hides the module's name
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or module._global_optimizer_pre_hooks
        or module._global_optimizer_post_hooks
    )


def compile_in_place(model: nn.Module) -> None:
    """`torch.compile` `model`; names in its state stay as they are.

    A module's `untraced` names methods that hold nothing to compile, such as those on text.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        for name in module.untraced if offers(module, Untraced) else ():
            setattr(module, name, torch.compiler.disable(getattr(module, name)))
    model.compile()
