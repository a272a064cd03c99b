"""The plan that `dry_run=true` prints; nothing is written and nothing is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atlas.run.directory import Run
from atlas.run.identity import effective_batch
from atlas.schedule import scaling
from atlas.system.terminal import table
from launchers.base import Launcher


def print_plan(run: Run, config: Mapping[str, Any], launcher: Launcher) -> None:
    """Print what the run would do, first the part that does not need torch."""
    print(outline(run, config, launcher), flush=True)
    from atlas.training.dry_run.plan import detail

    print(detail(config, launcher.world_size, launcher.is_remote))
    if script := launcher.script(run, config):
        print(f"\n{script}")


def outline(run: Run, config: Mapping[str, Any], launcher: Any) -> str:
    """Return the part of the plan that needs neither the model nor the data."""
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
            f"weights, gradients and optimizer state are sharded across {world} ranks"
            if world > 1
            else "one rank holds everything"
        )
    return table(rows)


def saves(trainer: Mapping[str, Any]) -> str:
    """Return when checkpoints are written, in words."""
    due = ["at the last step", "after every validation that is the best so far"]
    if trainer["save_minutes"]:
        due.insert(0, f"{trainer['save_minutes']:g} min after the last one")
    if trainer["save_interval"]:
        due.insert(0, f"every {trainer['save_interval']} steps")
    return ", ".join(due) + f"; the newest {trainer['keep']} and the best are kept"
