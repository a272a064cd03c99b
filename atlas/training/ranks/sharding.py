"""Weights cut over the ranks with FSDP2: each holds a part of every tensor, and gathers a block to run it.

A block is a child of an `nn.ModuleList`, which is where encoders and decoders keep their layers; what
is in none of them is one more, the root. Frozen weights are cut as well. Rajbhandari et al. 2020
(ZeRO, stage 3); Zhao et al. 2023 (FSDP).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from atlas.errors import ConfigError
from atlas.models.protocol import Acts
from atlas.protocol import offers
from atlas.training.optimization.ema import Ema
from atlas.training.optimization.optimizer import Group, Optimizer
from atlas.training.parts import Parts
from atlas.training.ranks.joint_calls import Calls, SharedCalls
from atlas.training.ranks.replica import Replica
from atlas.training.ranks.world import World, is_cut
from atlas.training.saving.frozen import frozen_modules

KEY = "cluster.sharding=fsdp2"
WHOLE = "or set cluster.sharding=null"


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of what is gathered at once, the innermost first; the root, named "", last."""
    listed = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for child in module
        if not isinstance(child, nn.ModuleList | nn.ModuleDict)  # these have no forward
    }
    for name, module in reversed(list(model.named_modules())):
        if not name or (id(module) in listed and any(True for _ in module.parameters())):
            yield name, module


def block_of(model: nn.Module) -> dict[str, str]:
    """The block that each parameter is gathered with, by their names; shared ones have one a name."""
    names = [name for name, _ in blocks(model) if name]
    return {
        name: next((block for block in names if name.startswith(f"{block}.")), "")
        for name, _ in model.named_parameters(remove_duplicate=False)
    }


def check(model: nn.Module) -> None:
    """Raise `ConfigError` where `model`, with what is frozen frozen, cannot be cut."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, str] = {}
    dtypes: dict[str, set[torch.dtype]] = {}
    problems = []
    for name, block in block_of(model).items():
        parameter = parameters[name]
        if parameter.ndim == 0:
            problems.append(f"{name} has no dimension to cut; make it a vector of one number")
        if not parameter.is_contiguous():
            problems.append(f"{name} is not contiguous in memory; make it so with .contiguous()")
        if owners.setdefault(id(parameter), block) != block:
            problems.append(
                f"{name} is shared by two blocks, {owners[id(parameter)] or 'the root'} and "
                f"{block or 'the root'}; give each its own"
            )
        if parameter.requires_grad:
            dtypes.setdefault(block, set()).add(parameter.dtype)
    problems += [
        f"{block or 'the root'} is trained in several types, {', '.join(sorted(map(str, found)))}; "
        "keep its weights in one"
        for block, found in dtypes.items()
        if len(found) > 1
    ]
    if problems := [*_lacking(), *problems]:
        raise ConfigError([f"{KEY}: {problem}, {WHOLE}" for problem in problems])


def _lacking() -> list[str]:
    """What this version of torch does not offer."""
    import torch.distributed.fsdp as fsdp

    if hasattr(fsdp, "register_fsdp_forward_method"):
        return []
    return [f"needs a newer torch than {torch.__version__}; 2.13 has been tried"]


def shard(
    parts: Parts,
    ema: Ema | None,
    world: World,
    arrange: Callable[[], tuple[list[Group], Optimizer]],
) -> Ema | None:
    """Cut `parts` and the averages over the ranks; returns the averages that belong to them.

    Both are whole, and the same on every rank; they may still be on the CPU, from where each block
    goes to the device and is cut before the next. `check` has found nothing. `arrange` makes groups
    and optimizer anew, since the parameters are other objects then.
    """
    model, state = parts.model, parts.optimizer.inner.state_dict()
    _cut(model, world)
    parts.groups, parts.optimizer = arrange()
    parts.optimizer.inner.load_state_dict(_cut_state(parts.optimizer.inner, state))
    if ema is None:
        return None
    averages, own = ema.state_dict(), dict(model.named_parameters())
    cut = Ema(model, ema.decay)
    cut.load_state_dict({name: _part(value, own[name]) for name, value in averages.items()})
    return cut


def _cut(model: nn.Module, world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    for name, block in blocks(model):
        # The root is needed again first in the backward pass.
        fully_shard(block, mesh=mesh, reshard_after_forward=bool(name))
    if offers(model, Acts):  # the other way into a policy
        register_fsdp_forward_method(model, "act")
    unused = getattr(model, "set_reduce_scatter_unused_params", None)  # of newer versions of torch
    if unused is not None:  # or ranks would wait for one whose loss leaves a parameter out
        unused(True)


def _cut_state(optimizer: torch.optim.Optimizer, whole: dict[str, Any]) -> dict[str, Any]:
    """The `whole` state of an optimizer for the one over cut parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {name: _part(value, parameters[index]) for name, value in values.items()}
        for index, values in whole["state"].items()
    }
    return {**whole, "state": state}


def _part(value: Any, parameter: Any) -> Any:
    """This rank's part of `value` where it has the parameter's shape; else all of it, on all ranks.

    What has no dimension, as a count of steps, is a plain tensor beside cut parameters too.
    """
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    alike = DTensor.from_local(value.to(parameter.device), mesh, [Replicate()], run_check=False)
    if value.shape != parameter.shape:
        return alike
    # A copy: the part would hold on to all of it.
    return alike.redistribute(placements=parameter.placements).clone()


def gathered(value: Any, keep: bool) -> Any:
    """`value`, a nest of dictionaries and lists, with what is cut put together on the CPU.

    To be called on all ranks with the same nest; those that do not `keep` it get None in its place.
    """
    if isinstance(value, Mapping):
        return {key: gathered(part, keep) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(part, keep) for part in value)
    if not is_cut(value):
        return value
    whole = value.full_tensor()  # one after the other: the device need not hold all of them
    # A copy on the CPU too, where it can be a view of something longer, which would be saved.
    return whole.detach().to("cpu", copy=True) if keep else None


class Shards(Replica):
    """Calls a model that is cut over the ranks.

    Gradients are averaged in every micro-batch: kept until the last one, they would be whole on
    every rank.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(model, world, compiled=False)
        fixed = {id(b) for module in frozen_modules(model) for b in module.buffers()}
        self._buffers = [b for b in model.buffers() if id(b) not in fixed]
        self._updated = True  # since the last micro-batch
        self._blocks: list[Any] = [block for _, block in blocks(model)]

    def synchronised(self, yes: bool) -> contextlib.AbstractContextManager[Any]:
        """Before an update's first micro-batch, rank 0's buffers everywhere, as DDP does it."""
        if self._updated:
            for buffer in self._buffers:
                dist.broadcast(buffer, src=0)
        self._updated = yes
        return contextlib.nullcontext()

    def settle(self, *_: Any) -> None:
        """Nothing: a block's gradients are summed in the same order from the first update on."""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Cut again at the end: the root stays whole after a forward pass, for a backward one."""
        try:
            yield
        finally:
            for block in self._blocks:
                block.reshard()

    def calls(self, call: Callable[[Any], Any]) -> Calls:
        return SharedCalls(call, self._world)

    def gathered(self, state: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The `state` put together, to be called on all ranks; only rank 0's has everything."""
        return gathered(state(), keep=self._world.is_main)


def replicated(model: nn.Module, world: World, compiled: bool) -> Replica:
    """How the training loop calls `model`: whole on every rank, or in parts where `shard` has cut it."""
    if any(map(is_cut, model.parameters())):
        return Shards(model, world)
    return Replica(model, world, compiled)
