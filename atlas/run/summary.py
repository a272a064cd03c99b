"""What a run did, in words: printed when it ends, and when its command is typed again."""

from __future__ import annotations

import datetime

from atlas.run.directory import Run
from atlas.run.status import State


def summary(run: Run) -> str:
    """Return how the run ended or where it is, where its results are, and what to type next."""
    status = run.read_status()
    state = run.judge_state()
    head = f"run {run.id} is {state}" + (f" ({status.reason})" if status.reason else "")
    lines = [f"{head}: step {status.step} of {status.steps}, {local_time(status.updated or 0.0)}"]
    if best := status.best:
        lines.append(f"  best {best['metric']} {best['value']:.6g} at step {best['step']}")
    last = {k: v for k, v in status.last.items() if k.startswith("val/") and k != "val/time_s"}
    if last:
        lines.append("  last " + "  ".join(f"{key} {value:.4g}" for key, value in last.items()))
    lines.append(f"  results {run.path}")
    if state is State.FINISHED:
        lines.append("  to start over: the same command with fresh=true (this run is kept)")
    elif state and state.is_stopped:
        lines.append(f"  to resume it: the same command, or python train.py resume={run.id}")
    return "\n".join(lines)


def local_time(seconds: float) -> str:
    """Return a time stamp (seconds since 1970) as local time."""
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
