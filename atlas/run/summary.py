"""What a run will do, and what it did, in words for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atlas.run.directory import Run, when
from atlas.run.identity import effective_batch
from atlas.run.status import State
from atlas.schedule import LearningRate, scaling

BARS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 48


def summary(run: Run) -> str:
    """How the run stands, where its results are, and what to type next."""
    status = run.read_status()
    state = run.judge_state()
    done = f"run {run.id} is {state}"
    if status.reason:
        done += f" ({status.reason})"
    lines = [f"{done}: step {status.step} of {status.steps}, {when(status.updated or 0.0)}"]
    if best := status.best:
        lines.append(f"  best {best['metric']} {best['value']:.6g} at step {best['step']}")
    last = {k: v for k, v in status.last.items() if k.startswith("val/")}
    last.pop("val/time_s", None)
    if last:
        lines.append("  last " + "  ".join(f"{key} {value:.4g}" for key, value in last.items()))
    lines.append(f"  results {run.path}")
    if state is State.FINISHED:
        lines.append("  the same command with fresh=true starts over and keeps what is there")
    elif state and state.is_stopped:
        lines.append(
            f"  the same command goes on from here, and so does: python train.py resume={run.id}"
        )
    return "\n".join(lines)


def outline(run: Run, config: Mapping[str, Any], launcher: Any) -> str:
    """The part of the plan that can be told without the model and the data."""
    world = launcher.world_size
    batch = effective_batch(config, world)
    size, accumulate = config["data"]["batch_size"], config["trainer"]["accumulate"]
    optim = config["optim"]
    ratio = batch / optim["base_batch_size"]
    factor = scaling(optim["scale_lr"], batch, optim["base_batch_size"])
    state = run.judge_state()
    rows = {
        "run": run.id + (f" ({state}, step {run.read_status().step})" if state else " (new)"),
        "directory": str(run.path),
        "launcher": f"{launcher.name}: {launcher.nodes} node(s) x {launcher.nproc_per_node} rank(s), "
        f"device {config['cluster']['device']}",
        "effective batch": f"{batch} samples = {size} per GPU x {world} rank(s) x {accumulate} "
        "micro-batch(es)",
        "rate scaling": f"{config['optim']['scale_lr']}: r = {batch} / "
        f"{config['optim']['base_batch_size']} = {ratio:g}, so the base rate is "
        f"{config['optim']['lr']:g} x {factor:.4g} = {config['optim']['lr'] * factor:.4g}",
        "saves": saves(config["trainer"]),
    }
    if launcher.sharding:
        rows["sharding"] = f"{launcher.sharding}: " + (
            f"weights, gradients and optimizer state are cut over {world} ranks"
            if world > 1
            else "one rank holds everything, there is nobody to share with"
        )
    return table(rows)


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
    """`values` (of which the largest fills the line) as a row of bars."""
    top = max(*values, 1e-12)
    return "".join(BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] for value in values)


def saves(trainer: Mapping[str, Any]) -> str:
    """When checkpoints are written."""
    due = ["at the last step", "after every validation that is the best so far"]
    if trainer["save_minutes"]:
        due.insert(0, f"{trainer['save_minutes']:g} min after the last one")
    if trainer["save_interval"]:
        due.insert(0, f"every {trainer['save_interval']} steps")
    return ", ".join(due) + f"; the newest {trainer['keep']} and the best are kept"


def table(rows: Mapping[str, str]) -> str:
    """`rows` as aligned lines."""
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items())
