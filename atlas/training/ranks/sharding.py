"""Weights sharded across ranks with FSDP2: each rank holds a part of every tensor.

Weights are gathered unit by unit while the model runs. A unit is a child of an `nn.ModuleList`, which is
where encoders and decoders keep their layers; everything else is one more unit, the root. Frozen weights
are sharded as well. Rajbhandari et al. 2020 (ZeRO, stage 3); Zhao et al. 2023 (FSDP).
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
from atlas.training.ranks.joint_calls import Caller, JointCaller
from atlas.training.ranks.replica import Replica
from atlas.training.ranks.world import World, is_sharded
from atlas.training.saving.frozen import frozen_modules

KEY = "cluster.sharding=fsdp2"
UNSHARDED = "or set cluster.sharding=null"


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every unit, the innermost first; the root, named "", comes last."""
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


def unit_of(model: nn.Module) -> dict[str, str]:
    """Return the unit that each parameter is gathered with, by name; a shared one has several names."""
    names = [name for name, _ in units(model) if name]
    return {
        name: next((unit for unit in names if name.startswith(f"{unit}.")), "")
        for name, _ in model.named_parameters(remove_duplicate=False)
    }


def check_shardable(model: nn.Module) -> None:
    """Raise `ConfigError` if `model`, with its frozen parts frozen, cannot be sharded."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, str] = {}
    dtypes: dict[str, set[torch.dtype]] = {}
    problems = []
    for name, unit in unit_of(model).items():
        parameter = parameters[name]
        if parameter.ndim == 0:
            problems.append(f"{name} has no dimension to shard; make it a vector of one number")
        if not parameter.is_contiguous():
            problems.append(f"{name} is not contiguous in memory; make it so with .contiguous()")
        if owners.setdefault(id(parameter), unit) != unit:
            problems.append(
                f"{name} is shared by two units, {owners[id(parameter)] or 'the root'} and "
                f"{unit or 'the root'}; give each its own"
            )
        if parameter.requires_grad:
            dtypes.setdefault(unit, set()).add(parameter.dtype)
    problems += [
        f"{unit or 'the root'} is trained in several types, {', '.join(sorted(map(str, found)))}; "
        "keep its weights in one"
        for unit, found in dtypes.items()
        if len(found) > 1
    ]
    if problems := [*_unsupported(), *problems]:
        raise ConfigError([f"{KEY}: {problem}, {UNSHARDED}" for problem in problems])


def _unsupported() -> list[str]:
    """Return what this version of torch cannot do."""
    import torch.distributed.fsdp as fsdp

    if hasattr(fsdp, "register_fsdp_forward_method"):
        return []
    return [f"needs a newer torch than {torch.__version__}; tested with 2.13"]


def shard(
    parts: Parts,
    ema: Ema | None,
    world: World,
    make_optimizer: Callable[[], tuple[list[Group], Optimizer]],
) -> Ema | None:
    """Shard `parts` and the averages `ema` across ranks; return the sharded averages.

    Both are whole and the same on every rank. They may still be on the CPU, from where each unit goes
    to the device and is sharded before the next one. `make_optimizer` makes groups and optimizer
    again, since the parameters become other objects. `check_shardable` must have passed.
    """
    model, state = parts.model, parts.optimizer.inner.state_dict()
    _shard_model(model, world)
    parts.groups, parts.optimizer = make_optimizer()
    parts.optimizer.inner.load_state_dict(_sharded_state(parts.optimizer.inner, state))
    if ema is None:
        return None
    averages, own = ema.state_dict(), dict(model.named_parameters())
    sharded = Ema(model, ema.decay)
    sharded.load_state_dict(
        {name: _sharded_like(value, own[name]) for name, value in averages.items()}
    )
    return sharded


def _shard_model(model: nn.Module, world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(world.device.type, (world.size,))
    for name, unit in units(model):
        # The backward pass needs the root first, so it is not resharded.
        fully_shard(unit, mesh=mesh, reshard_after_forward=bool(name))
    if offers(model, Acts):  # called by policies, past `forward`
        register_fsdp_forward_method(model, "act")
    unused = getattr(
        model, "set_reduce_scatter_unused_params", None
    )  # newer versions of torch have it
    if unused is not None:  # or all wait for a rank whose loss leaves out a parameter
        unused(True)


def _sharded_state(optimizer: torch.optim.Optimizer, whole: dict[str, Any]) -> dict[str, Any]:
    """Return the `whole` state of an optimizer for an optimizer over sharded parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {name: _sharded_like(value, parameters[index]) for name, value in values.items()}
        for index, values in whole["state"].items()
    }
    return {**whole, "state": state}


def _sharded_like(value: Any, parameter: Any) -> Any:
    """Return `value` sharded like `parameter` if it has its shape, else replicated on all ranks.

    A tensor without dimensions, such as a count of steps, stays a plain tensor.
    """
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    alike = DTensor.from_local(value.to(parameter.device), mesh, [Replicate()], run_check=False)
    if value.shape != parameter.shape:
        return alike
    # A copy, since the part would keep all of it in memory.
    return alike.redistribute(placements=parameter.placements).clone()


def gather(value: Any, keep: bool) -> Any:
    """Return nested dictionaries and lists with every sharded tensor whole, on the CPU.

    All ranks must call this with the same nest; those that do not `keep` it get None for a tensor.
    """
    if isinstance(value, Mapping):
        return {key: gather(part, keep) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather(part, keep) for part in value)
    if not is_sharded(value):
        return value
    whole = value.full_tensor()  # one at a time, so that the device need not hold them all
    # A copy on the CPU too: a view of something longer would be saved with all of that.
    return whole.detach().to("cpu", copy=True) if keep else None


class ShardedReplica(Replica):
    """A model that is sharded across ranks.

    Gradients are averaged in every micro-batch: until the last one they would have to be kept whole
    on every rank.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(model, world, compiled=False)
        fixed = {id(b) for module in frozen_modules(model) for b in module.buffers()}
        self._buffers = [b for b in model.buffers() if id(b) not in fixed]
        self._is_first = True  # the next micro-batch begins an update
        self._units: list[Any] = [unit for _, unit in units(model)]

    def synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a micro-batch; an update begins with rank 0's buffers on all ranks, as in DDP."""
        if self._is_first:
            for buffer in self._buffers:
                dist.broadcast(buffer, src=0)
        self._is_first = last
        return contextlib.nullcontext()

    def warm_up(self, *_: Any) -> None:
        """Do nothing: gradients are summed in the same order from the first update on."""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Reshard at the end: after a forward pass the root stays whole for a backward pass."""
        try:
            yield
        finally:
            for unit in self._units:
                unit.reshard()

    def caller(self, call: Callable[[Any], Any]) -> Caller:
        """Return `call` as one that all ranks make together."""
        return JointCaller(call, self._world)

    def gathered(self, state: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the whole `state()` on rank 0; to be called on all ranks."""
        return gather(state(), keep=self._world.is_main)


def make_replica(model: nn.Module, world: World, compiled: bool) -> Replica:
    """Return the replica of `model` that the training loop calls: whole, or sharded by `shard`."""
    if any(map(is_sharded, model.parameters())):
        return ShardedReplica(model, world)
    return Replica(model, world, compiled)
