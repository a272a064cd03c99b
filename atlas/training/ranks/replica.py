"""The model as the training loop calls it: compiled, and replicated over the ranks."""

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
from atlas.training.ranks.joint_calls import Calls
from atlas.training.ranks.world import World


class Replica:
    """Calls `model`; with several ranks its gradients are averaged over them on the last micro-batch."""

    def __init__(self, model: nn.Module, world: World, compiled: bool) -> None:
        self._model = model
        self._world = world
        self._call: Any = model
        if compiled:
            compile_in_place(model)

    def __call__(self, batch: Any) -> Any:
        return self._call(batch)

    def synchronised(self, yes: bool) -> contextlib.AbstractContextManager[Any]:
        """The context of a micro-batch whose gradients are averaged over the ranks, or not yet."""
        if yes or self._world.size == 1:
            return contextlib.nullcontext()
        return self._call.no_sync()

    def evaluating(self) -> contextlib.AbstractContextManager[Any]:
        """The context of an evaluation."""
        return contextlib.nullcontext()

    def calls(self, call: Callable[[Any], Any]) -> Calls:
        """`call`, of the model with a batch, as an evaluation makes it."""
        return Calls(call)

    def gathered(self, state: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `state` gives on rank 0, which alone writes; nothing on the others."""
        return state() if self._world.is_main else {}

    def settle(
        self,
        batch: Any,
        step: int,
        seeds: StepSeeds,
        autocast: contextlib.AbstractContextManager[Any],
    ) -> None:
        """Wrap the model for several ranks, in the state that it will stay in; `batch` is any.

        DDP sorts its buckets anew after the first backward pass, and another order of summation
        differs in the last bits: a resumed run would not equal the undisturbed one. Two backward
        passes whose gradients are thrown away put both behind that point.
        """
        if self._world.size == 1:
            return
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}

        def backward() -> None:
            seeds.training(step, 0)
            with autocast:
                out = self._call(batch)
            out["loss"].backward()

        backward()
        unused = self._some_unused()
        self._forget_gradients()
        self._wrap(find_unused=unused)
        for _ in range(2):
            backward()
            self._forget_gradients()
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])

    def _wrap(self, find_unused: bool) -> None:
        # What is frozen needs neither gradients nor the broadcast of weights and buffers.
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

    def _some_unused(self) -> bool:
        """Whether the loss leaves some trained parameter out, on any rank."""
        none = any(p.requires_grad and p.grad is None for p in self._model.parameters())
        flag = torch.tensor(int(none))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._world.cpu_group)
        return bool(flag)

    def _forget_gradients(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None
