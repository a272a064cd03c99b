"""The model as the training loop calls it: compiled, and replicated over the ranks.

Why DDP is warmed up twice: after its first backward pass, DDP rebuilds its buckets in the order in which
gradients became ready. Another order of buckets is another order of floating-point sums, which differs in
the last bits. A run that resumes at step 500 would take its first update with the buckets of a new
process, where the uninterrupted run had rebuilt buckets, and the two would no longer be bit-identical.
Two backward passes before the first update, whose gradients are thrown away, put every process behind
that point: the first makes DDP rebuild, the second runs with the rebuilt buckets and shows that they
stay. Buffers (such as batch statistics) are restored afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from atlas.training.feeding.randomness import StepSeeds
from atlas.training.optimization.dynamo import compile_in_place
from atlas.training.ranks.joint_calls import Caller
from atlas.training.ranks.world import World


class Replica:
    """A whole model on every rank; gradients are averaged over the ranks on the last micro-batch."""

    def __init__(self, model: nn.Module, world: World, compiled: bool) -> None:
        self._model = model
        self._world = world
        self._call: Any = model
        if compiled:
            compile_in_place(model)

    def __call__(self, batch: Any) -> Any:
        return self._call(batch)

    def synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of a micro-batch; gradients are averaged over the ranks in the `last` one."""
        if last or self._world.size == 1:
            return contextlib.nullcontext()
        return self._call.no_sync()

    def evaluating(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of an evaluation."""
        return contextlib.nullcontext()

    def caller(self, call: Callable[[Any], Any]) -> Caller:
        """Return `call`, of the model with a batch, in the form that an evaluation uses."""
        return Caller(call)

    def gathered(self, state: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return `state()` on rank 0, which alone writes, and nothing on other ranks."""
        return state() if self._world.is_main else {}

    def warm_up(
        self,
        batch: Any,
        step: int,
        seeds: StepSeeds,
        autocast: contextlib.AbstractContextManager[Any],
    ) -> None:
        """Wrap the model in DDP and bring it into the state that it stays in; any `batch` will do."""
        if self._world.size == 1:
            return
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}

        def backward() -> None:
            seeds.training(step, 0)
            with autocast:
                out = self._call(batch)
            out["loss"].backward()

        backward()
        unused = self._has_unused()
        self._drop_gradients()
        self._wrap(find_unused=unused)
        for _ in range(2):
            backward()
            self._drop_gradients()
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])

    def _wrap(self, find_unused: bool) -> None:
        # Frozen parameters need neither gradients nor the broadcast of weights and buffers.
        trained = {name for name, p in self._model.named_parameters() if p.requires_grad}
        ignored = [n for n, _ in self._model.named_parameters() if n not in trained]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self._model, ignored)
        device = self._world.device
        self._call = DistributedDataParallel(
            self._model,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=find_unused,
            gradient_as_bucket_view=True,
        )

    def _has_unused(self) -> bool:
        """Return whether the loss leaves out a trained parameter on any rank."""
        none = any(p.requires_grad and p.grad is None for p in self._model.parameters())
        flag = torch.tensor(int(none))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._world.cpu_group)
        return bool(flag)

    def _drop_gradients(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None
