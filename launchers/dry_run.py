"""The plan that `dry_run=true` prints; nothing is written and nothing is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atlas.config.schema import Settings, TrainerSettings
from atlas.run.directory import Run
from atlas.schedule import scaling
from atlas.system.terminal import table
from launchers.base import Launcher


def print_plan(run: Run, config: Mapping[str, Any], launcher: Launcher) -> None:
    """Print what the run would do, first the part that does not need torch."""
    settings = Settings.of(config)
    print(outline(run, settings, launcher), flush=True)
    from atlas.training.dry_run.plan import detail

    print(detail(settings, launcher.world_size, launcher.is_remote))
    if script := launcher.script(run, config):
        print(f"\n{script}")


def outline(run: Run, settings: Settings, launcher: Any) -> str:
    """Return the part of the plan that needs neither the model nor the data."""
    world = launcher.world_size
    batch, optim = settings.effective_batch(world), settings.optim
    ratio = batch / optim.base_batch_size
    factor = scaling(optim.scale_lr, batch, optim.base_batch_size)
    state = run.judge_state()
    rows = {
        "run": run.id + (f" ({state}, step {run.read_status().step})" if state else " (new)"),
        "directory": str(run.path),
        "launcher": f"{launcher.name}: {launcher.nodes} node(s) x {launcher.nproc_per_node} rank(s), "
        f"device {settings.cluster.device}",
        "effective batch": f"{batch} samples = {settings.data.batch_size} per GPU x {world} rank(s) x "
        f"{settings.trainer.accumulate} micro-batch(es)",
        "rate scaling": f"{optim.scale_lr}: r = {batch} / {optim.base_batch_size} = {ratio:g}, so the "
        f"base rate is {optim.lr:g} x {factor:.4g} = {optim.lr * factor:.4g}",
        "saves": saves(settings.trainer),
    }
    if launcher.sharding:
        rows["sharding"] = f"{launcher.sharding}: " + (
            f"weights, gradients and optimizer state are sharded across {world} ranks"
            if world > 1
            else "one rank holds everything"
        )
    return table(rows)


def saves(trainer: TrainerSettings) -> str:
    """Return when checkpoints are written, in words."""
    due = ["at the last step", "after every validation that is the best so far"]
    if trainer.save_minutes:
        due.insert(0, f"{trainer.save_minutes:g} min after the last one")
    if trainer.save_interval:
        due.insert(0, f"every {trainer.save_interval} steps")
    return ", ".join(due) + f"; the newest {trainer.keep} and the best are kept"
