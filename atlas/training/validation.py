"""Validation: every sample once at any world size, and rollouts where the data set can play them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from atlas.data.protocol import HasBaselines, scenes_of
from atlas.protocol import offers
from atlas.run.signals import StopWaiting
from atlas.training.feeding.randomness import StepSeeds
from atlas.training.feeding.stream import ValidationStream, to_device
from atlas.training.feeding.workers import ending, following
from atlas.training.optimization.gradient import loss_of, scalars
from atlas.training.ranks.joint_calls import Caller
from atlas.training.ranks.world import World


class Interrupted(Exception):
    """The ranks agreed to stop while they validated."""


class Validation:
    """Measures a model on the validation set; the same for every cut over ranks up to rounding."""

    def __init__(
        self,
        dataset: Any,
        train: Any,
        world: World,
        seeds: StepSeeds,
        autocast: contextlib.AbstractContextManager[Any],
        *,
        seed: int,
        batch_size: int,
        workers: int,
        batches: int | None,
        on_bad: str | None = None,
    ) -> None:
        self._dataset = dataset
        self._train = train
        self._baselines: dict[str, float] | None = None
        self._world = world
        self._seeds = seeds
        self._autocast = autocast
        self._rounds = rounds(len(dataset), batch_size, batches, world.size)
        self._stream = ValidationStream(
            dataset,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            batches=batches,
            world=world,
            on_bad=on_bad,
        )

    @torch.no_grad()
    def run(
        self,
        model: nn.Module,
        caller: Callable[[Callable[[Any], Any]], Caller],
        interrupted: Callable[[], bool],
        wait: Callable[[Callable[[], Any]], Any],
    ) -> dict[str, float]:
        """`val/loss` and the model's other scalars, each the mean over all valid elements.

        The model is called through `caller`. `interrupted` is asked on all ranks the same number of
        times; where it says yes, `Interrupted` is raised on all of them. Data is waited for by
        `wait`, as in training.
        """
        began = time.perf_counter()
        forward = caller(self._on_device(model))
        with ending(iter(self._stream)) as batches:
            sums = self._measure(forward, interrupted, lambda: wait(lambda: _next(batches)))
        # The mean of nothing, where every sample was left out, is no loss of 0.
        weight = sums.pop("weight") or math.nan
        metrics = {f"val/{name}": value / weight for name, value in sums.items()}
        metrics.update(self._against_baselines(metrics))
        metrics.update(self._rollouts(model, caller))
        metrics["val/time_s"] = time.perf_counter() - began
        return metrics

    def _measure(
        self, forward: Caller, interrupted: Callable[[], bool], following: Callable[[], Any]
    ) -> dict[str, float]:
        sums: dict[str, Any] = {"weight": 0.0, "loss": 0.0}
        for _ in range(self._rounds):
            if interrupted():
                raise Interrupted
            try:
                chunk, count, batch = following()
            except StopWaiting:
                batch = None  # the other ranks have begun this round, and hear of it in the next
            if batch is None:
                forward.skip()
                continue
            self._seeds.validation(chunk)
            out = forward(batch)
            loss = loss_of(out, trained=False)
            weight = out.get("weight", float(count))
            sums["weight"] = sums["weight"] + weight
            for name, value in {"loss": loss, **scalars(out)}.items():
                # In float64 and on the device: exact enough for any size, and nothing waits.
                sums[name] = sums.get(name, 0.0) + double(value) * double(weight)
        for _ in range(2):  # asked, and answered: a rank may have left out a batch
            if interrupted():
                raise Interrupted
        return self._over_ranks({name: float(value) for name, value in sums.items()})

    def _against_baselines(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """`val/l1_vs_<baseline>` for every trivial prediction that the data set knows the L1 of."""
        if "val/l1" not in metrics or not offers(self._dataset, HasBaselines):
            return {}
        if self._baselines is None:
            self._baselines = self._dataset.baselines(self._train)
        return {
            f"val/l1_vs_{name}": metrics["val/l1"] / error
            for name, error in self._baselines.items()
            if error > 0
        }

    def _rollouts(
        self, model: Any, caller: Callable[[Callable[[Any], Any]], Caller]
    ) -> dict[str, float]:
        """The mean of each outcome over the data set's scenes, such as `val/success`."""
        scenes = range(scenes_of(self._dataset))
        if not scenes:
            return {}
        policy = caller(self._on_device(model.act))

        def act(batch: Mapping[str, Any]) -> torch.Tensor:
            actions: torch.Tensor = policy(batch)
            return actions.float().cpu()

        # As for one more chunk: what a policy draws is the same in every validation.
        self._seeds.validation(self._rounds * self._world.size + self._world.rank)
        mine = list(scenes)[self._world.rank :: self._world.size]
        outcomes = self._dataset.rollout(act, mine) if mine else {}
        while policy.skip():  # others can act for longer
            pass
        sums = self._over_ranks({name: float(values.sum()) for name, values in outcomes.items()})
        return {f"val/{name}": value / len(scenes) for name, value in sums.items()}

    def _on_device(self, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`call` with batches that are still in the machine's own memory."""

        def called(batch: Any) -> Any:
            with self._autocast:
                return call(to_device(batch, self._world.device))

        return called

    def _over_ranks(self, sums: dict[str, float]) -> dict[str, float]:
        if self._world.size == 1:
            return sums
        every: list[Any] = [None] * self._world.size
        dist.all_gather_object(every, sums, group=self._world.cpu_group)
        # In the order of the ranks, so that the sum is the same everywhere and every time.
        names = list(dict.fromkeys(name for part in every for name in part))
        return {name: sum(part.get(name, 0.0) for part in every) for name in names}


def _next(batches: Iterator[tuple[int, int, Any]]) -> tuple[int, int, Any]:
    """This rank's next batch; None for one where others have more."""
    try:
        return following(batches)
    except StopIteration:
        return 0, 0, None


def rounds(samples: int, batch_size: int, batches: int | None, world_size: int) -> int:
    """How many batches the busiest rank validates."""
    chunks = -(-samples // batch_size)
    return -(-min(chunks, batches or chunks) // world_size)


def double(value: Any) -> Any:
    """`value` in double precision."""
    return value.double() if isinstance(value, torch.Tensor) else float(value)
