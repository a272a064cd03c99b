"""The part of a plan that needs the model and the data in hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from atlas.config.schema import Settings
from atlas.errors import ConfigError
from atlas.models.pretrained import without_weights
from atlas.schedule import LearningRate
from atlas.system.terminal import table
from atlas.training.build import CPU, build, doubts, learning_rate
from atlas.training.dry_run.memory import Estimate, estimate
from atlas.training.dry_run.preflight import META
from atlas.training.optimization.precision import check_precision
from atlas.training.parts import Parts
from atlas.training.ranks.world import choose_device
from atlas.training.trainer import validation_interval

BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 48  # characters


def detail(settings: Settings, world_size: int, elsewhere: bool = False) -> str:
    """Data, parameters and rates of a run; builds its model and data, and writes nothing.

    `elsewhere`: the run is for another machine, so that what this one can compute on and in which
    precision does not matter.
    """
    wanted = settings.cluster.device
    device = CPU if elsewhere else choose_device(wanted, 0)
    if not elsewhere:
        check_precision(settings.trainer.precision, device)
    parts = hollow(settings, world_size)
    memory = estimate(settings, parts, world_size)
    multipliers = {group.name: group.multiplier for group in parts.groups}
    return "\n".join(
        [
            *(f"warning: {doubt}" for doubt in doubts(settings.data.raw, parts)),
            table(data_rows(settings, parts, world_size, wanted if elsewhere else str(device))),
            "",
            parameters(parts),
            "",
            memory.text(),
            *room(memory, device),
            "",
            rates(learning_rate(settings, world_size), multipliers, settings.schedule.warmup or 0),
        ]
    )


def hollow(settings: Settings, world_size: int) -> Parts:
    """The run's parts; a plan needs no weights, so they are neither read nor have memory.

    A model that does not let itself be built so gets some, at random.
    """
    spared = replace(settings, trainer=replace(settings.trainer, precision="fp32"))
    with without_weights():
        try:
            return build(spared, world_size, META)
        except ConfigError:
            raise
        except Exception:  # what a constructor may do with tensors, meta tensors cannot all
            return build(spared, world_size, CPU)


def room(memory: Estimate, device: torch.device) -> list[str]:
    """What this machine's GPU has to say to it; nothing where the run is for another one."""
    if device.type != "cuda":
        return []
    free, whole = torch.cuda.mem_get_info(device)
    left = f"{free / 1e9:.1f} GB of {whole / 1e9:.1f} are free on {device}"
    if memory.total <= free:
        return [f"  {left}; CUDA takes about 1 GB of them for itself"]
    return [f"  warning: this is more than there is, {left}"]


def data_rows(settings: Settings, parts: Parts, world_size: int, device: str) -> dict[str, str]:
    """Devices, sizes of the data sets, and when the run validates."""
    samples, batch = len(parts.train), settings.effective_batch(world_size)
    steps = settings.trainer.steps
    interval = validation_interval(settings.trainer.val_interval, samples)
    if parts.val is None:
        validates = "never; there is no data.val"
    else:
        every = f"every {interval} steps and " if interval else ""
        validates = f"{every}at the last step, on {len(parts.val)} samples"
    return {
        "device": device,
        "data": f"{samples} training samples, {samples / batch:.1f} updates an epoch, "
        f"{steps} updates = {steps * batch / samples:.1f} epochs",
        "validates": validates,
    }


def parameters(parts: Parts) -> str:
    """Trained and frozen parameters of every module at the top of the model, and of all."""
    model = parts.model
    rows = [(name, *count(module)) for name, module in model.named_children()]
    own = [p for p in model.parameters(recurse=False)]
    if own:
        trained = sum(p.numel() for p in own if p.requires_grad)
        rows.append(("(own)", trained, sum(p.numel() for p in own) - trained))
    rows.append(("all", *count(model)))
    width = max(len("parameters"), *(len(name) for name, *_ in rows))
    lines = [f"{'parameters'.ljust(width)}{'trained':>14}{'frozen':>14}"]
    lines += [f"{name.ljust(width)}{trained:14,}{frozen:14,}" for name, trained, frozen in rows]
    return "\n".join(lines)


def count(module: nn.Module) -> tuple[int, int]:
    """How many numbers of `module` are trained, and how many are frozen."""
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in module.parameters()) - trained


def rates(rate: LearningRate, multipliers: Mapping[str, float], warmup: int) -> str:
    """Return a table of every group's rate at the steps that show the schedule, and its curve."""
    shown = sorted({0, warmup // 2, warmup, rate.steps // 2, rate.steps - 1})
    width = max([len("learning rate"), *(len(name) for name in multipliers)])
    lines = ["learning rate".ljust(width) + "".join(f"{f'step {s}':>12}" for s in shown)]
    columns = [rate.rates(step, multipliers) for step in shown]
    for name, multiplier in multipliers.items():
        values = (f"{c[name]:12.3g}" if multiplier else f"{'frozen':>12}" for c in columns)
        lines.append(name.ljust(width) + "".join(values))
    steps = (round(i * (rate.steps - 1) / (CURVE_WIDTH - 1)) for i in range(CURVE_WIDTH))
    factors = [rate.schedule(step, rate.steps) for step in steps]
    lines.append(f"{''.ljust(width)}  {curve(factors)}")
    return "\n".join(lines)


def curve(values: list[float]) -> str:
    """Return `values` as a row of bars, of which the highest has full height."""
    top = max(*values, 1e-12)
    return "".join(BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] for value in values)
