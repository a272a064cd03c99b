"""What a GPU holds while it trains, worked out before it does.

Weights, gradients, optimizer state and averages are counted tensor by tensor. For the rest, one
micro-batch goes forward and backward through the model with tensors that have sizes and no memory, by
the kernels of the CPU, and what is alive at once is added up.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from atlas.config.schema import Settings
from atlas.data.protocol import HasFrames
from atlas.models.pretrained import without_weights
from atlas.protocol import offers
from atlas.training.build import CPU, arrange, build_optimizer, create_model
from atlas.training.dry_run.preflight import META, room
from atlas.training.feeding.stream import Fetcher, Order
from atlas.training.optimization.gradient import Sums
from atlas.training.optimization.optimizer import Group
from atlas.training.optimization.precision import autocast
from atlas.training.parts import Parts
from atlas.training.ranks import sharding
from atlas.training.saving.frozen import frozen_modules

T = TypeVar("T")
MOST = 8  # samples that are read; what larger batches take is extrapolated from this and half of it
SMALL = (2, 4)  # samples, where the model has to compute; one alone is refused by batch norm


@dataclass
class Estimate:
    """Bytes on one GPU by what they are for, in the order of a training step.

    `weights`: the same of the weights by type; `missing`: what could not be told, and why.
    """

    sizes: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.sizes.values())

    def add(self, name: str, count: Callable[[], float]) -> None:
        """Enter what `count` gives; an error in it, which can be a person's own, is told instead."""
        try:
            self.sizes[name] = count()
        except Exception as error:
            said = (str(error).strip() or "no message").splitlines()[0]
            self.missing.append(f"{name} ({type(error).__name__}: {said})")

    def text(self) -> str:
        """For a person, in a line or a few."""
        unit, size = ("GB", 1e9) if self.total >= 1e9 else ("MB", 1e6)
        terms = [f"{name} {value / size:.2f}" for name, value in self.sizes.items()]
        terms[0] += f" {unit}"
        lines = [f"memory per GPU, estimated: {' + '.join(terms)} = {self.total / size:.2f} {unit}"]
        kinds = ", ".join(f"{kind} {value / size:.2f}" for kind, value in self.weights.items())
        lines.append(f"  weights: {kinds}")
        lines += [f"  not included: {what}" for what in self.missing]
        return "\n".join(lines)


def estimate(settings: Settings, parts: Parts, world_size: int) -> Estimate:
    """Of a run of `parts`, whose model may be without memory (on the meta device)."""
    ranks = world_size if settings.cluster.is_sharded(world_size) else 1
    model, found = parts.model, Estimate()
    found.weights = weights(model, ranks)
    # With DDP too: its buckets are the gradients' own memory.
    trained = float(sum(held(p, ranks) for p in model.parameters() if p.requires_grad))
    found.sizes = {"weights": sum(found.weights.values()), "gradients": trained}
    found.add("optimizer", lambda: optimizer_state(settings, parts.groups, world_size, ranks))
    if settings.trainer.ema:
        found.sizes["average"] = trained
    if ranks > 1:
        found.sizes["gathered"] = gathered(model)
    batch = settings.data.batch_size
    found.add("batch", lambda: at(batch, [(n, size_of(b)) for n, b in examples(settings, parts)]))
    if "batch" in found.sizes:
        found.add("activations", lambda: at(batch, activations(settings, parts)))
    return found


def size(tensor: torch.Tensor) -> int:
    """Bytes of all its elements."""
    return tensor.numel() * tensor.element_size()


def size_of(nested: Any) -> int:
    """Bytes of all tensors in it."""
    return sum(size(leaf) for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor))


def largest_part(shape: torch.Size, ranks: int) -> list[int]:
    """The shape of what the first of `ranks` holds of a tensor that is cut along its first dimension."""
    return [-(-shape[0] // ranks), *shape[1:]] if shape else []


def held(tensor: torch.Tensor, ranks: int) -> int:
    """Bytes of the largest part."""
    return int(np.prod(largest_part(tensor.shape, ranks))) * tensor.element_size()


def weights(model: nn.Module, ranks: int) -> dict[str, float]:
    """Bytes by whether they are trained, and by type; buffers are whole on every rank."""
    found: dict[str, float] = {}
    for parameter in model.parameters():
        trained = "trained" if parameter.requires_grad else "frozen"
        kind = f"{trained} {str(parameter.dtype).removeprefix('torch.')}"
        found[kind] = found.get(kind, 0.0) + held(parameter, ranks)
    buffers = float(sum(map(size, model.buffers())))
    return {**found, **({"buffers": buffers} if buffers else {})}


def optimizer_state(settings: Settings, groups: list[Group], world_size: int, ranks: int) -> float:
    """Bytes of the optimizer's state after an update, taken over tensors of the same shapes."""
    chosen = dict(settings.optim.optimizer)
    if "fused" in chosen:  # the same state, by kernels that there are for real tensors alone
        chosen["fused"] = False
    unfused = replace(settings, optim=replace(settings.optim, optimizer=chosen))

    def state(place: torch.device) -> float:
        alike = [_alike(group, ranks, place) for group in groups]
        optimizer = build_optimizer(unfused, alike, world_size, place)
        for parameter in optimizer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.inner.step()
        return float(size_of([dict(state) for state in optimizer.inner.state.values()]))

    try:
        return state(META)
    except Exception:  # it looks at its numbers
        if 4 * sum(size(p) for group in groups for p in group.parameters) > room():
            raise
        return state(CPU)


def _alike(group: Group, ranks: int, place: torch.device) -> Group:
    def zeros(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        shapes = [(largest_part(p.shape, ranks), p) for p in parameters]
        return [
            nn.Parameter(torch.zeros(shape, dtype=p.dtype, device=place), p.requires_grad)
            for shape, p in shapes
        ]

    return Group(group.name, group.multiplier, zeros(group.decayed), zeros(group.undecayed))


def gathered(model: nn.Module) -> float:
    """Bytes of what is whole at once in the backward pass of a model that is cut.

    The root, whose gradients are complete last; and of blocks, one that runs and one that comes next,
    the former's gradients and what they are sent away from.
    """
    block_of = sharding.unit_of(model)
    found: dict[str, int] = {"": 0}
    for name, parameter in model.named_parameters():
        both = size(parameter) * (2 if parameter.requires_grad else 1)
        found[block_of[name]] = found.get(block_of[name], 0) + both
    root = found.pop("")
    return float(root + 2 * max(found.values(), default=0))


def examples(settings: Settings, parts: Parts) -> Iterator[tuple[int, Any]]:
    """Batches as the model gets them, with their sizes: of the run's size where that is small."""
    wanted = settings.data.batch_size
    for count in (wanted,) if wanted <= MOST else (MOST // 2, MOST):
        yield count, example(settings, parts, count)


def example(settings: Settings, parts: Parts, count: int) -> Any:
    """A batch of `count` samples. Images are made up where a data set can leave them out.

    To read those could mean to decode videos, which writes files.
    """
    data, seed = parts.train, settings.seed
    ids = Order(len(data), seed).ids(0, count)
    if not offers(data, HasFrames):
        return Fetcher(data, seed, settings.data.on_bad).good(ids, range(count), refill=True)[1]
    batch, views = data.batch(ids, images=False), len(data.spec["cameras"])
    if settings.data.cache_features:
        vision: Any = parts.model.vision
        patches = (int(np.prod(vision.grid)), int(vision.width))
        return {**batch, "features": torch.zeros(count, views, *patches, dtype=torch.float16)}
    pixels = (3, *data.spec["image_size"])
    return {**batch, "images": torch.zeros(count, views, *pixels, dtype=torch.uint8)}


def activations(settings: Settings, parts: Parts) -> list[tuple[int, int]]:
    """Samples and the bytes that are alive at once in a step of them.

    With a model that computes, in memory of this machine, where it decides by values that tensors
    without memory do not have; raises what went wrong where that would be too large.
    """
    precision = settings.trainer.precision
    batches = list(examples(settings, parts))  # of real numbers: data are read as they always are
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            model = blank(parts.model)
            return [
                (
                    count,
                    alive(model, tree_map_only(torch.Tensor, fake.from_tensor, batch), precision),
                )
                for count, batch in batches
            ]
    except Exception:  # what a model may do with numbers, it cannot do without
        if sum(map(size, parts.model.parameters())) > room():
            raise
    with without_weights():
        model = create_model(settings.model.raw, parts.spec, settings.seed)
    arrange(settings, model, 1, CPU)  # to freeze what is frozen
    return [(n, alive(model, example(settings, parts, n), precision)) for n in SMALL]


def blank(model: nn.Module) -> nn.Module:
    """`model`, or for one on the meta device a copy on the CPU, within `FakeTensorMode`."""
    if not any(p.is_meta for p in model.parameters()):
        return model
    copies: dict[int, Any] = {id(b): torch.empty_like(b, device=CPU) for b in model.buffers()}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device=CPU)
        copies[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    return copy.deepcopy(model, copies)


def alive(model: nn.Module, batch: Any, precision: str) -> int:
    """The most bytes at once in a step, less weights, `batch`, and gradients that are complete."""
    model.train()
    for module in frozen_modules(model):
        module.eval()
    live = Live()
    for tensor in [*model.parameters(), *model.buffers(), *tree_leaves(batch)]:
        if isinstance(tensor, torch.Tensor):
            live.leave_out(tensor)
    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(live.leave_out_gradient) for p in trained]
    with live:
        with autocast(precision, CPU):
            out = model(batch)
        Sums(detailed=False).add(out).backward()
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    return live.most


def at(count: int, points: list[tuple[int, int]]) -> float:
    """The value at `count`, by the straight line through the last two of `points`."""
    x, y = points[-1]
    if x == count or len(points) == 1:
        return float(y)
    before, below = points[-2]
    return y + (count - x) * (y - below) / (x - before)


class Live(TorchDispatchMode):
    """Within this context, adds up the memory of all tensors that are alive; `most` is its peak.

    Memory that a kernel takes and gives back by itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._sizes: dict[int, int] = {}  # of storages that are alive

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._enter(leaf.untyped_storage(), leaf.untyped_storage().nbytes())
        return out

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Count the memory of `tensor` as nothing, from now on."""
        storage = tensor.untyped_storage()
        self._now -= self._sizes.get(storage._cdata, 0)
        self._enter(storage, 0)
        self._sizes[storage._cdata] = 0

    def leave_out_gradient(self, parameter: torch.Tensor) -> None:
        """The same of the gradient of `parameter`."""
        assert parameter.grad is not None
        self.leave_out(parameter.grad)

    def _enter(self, storage: Any, count: int) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = count
        self._now += count
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)
