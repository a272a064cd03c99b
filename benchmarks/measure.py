"""What the benchmarks share: who measured, runs in turns, and ratios."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "benchmarks" / "tiny"


def heading(title: str) -> str:
    """Title, date, machine and versions: what a number is worth nothing without."""
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    names = ("torch", "mlflow", "hydra-core", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return (
        f"{title}, {now}, Atlas {commit()}\n"
        f"{cpu()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, {versions}"
    )


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str:
    """The commit of this clone, with a plus where the tree is not clean."""
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(described, capture_output=True, text=True).stdout.strip() or "unknown"


def environment(**more: object) -> dict[str, str]:
    """The environment of a measured process: one thread, so that cores are not fought over."""
    base = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    base.pop("MLFLOW_TRACKING_URI", None)
    return {**base, **{name: str(value) for name, value in more.items()}}


def atlas(*overrides: str) -> list[str]:
    """The command line of a tiny run."""
    train = [sys.executable, str(ROOT / "train.py"), "--config-dir", str(TINY), "model=tiny"]
    return [*train, "cluster.device=cpu", "trainer.accumulate=1", *overrides]


def run(command: Sequence[str], **more: object) -> None:
    """Run `command` in the environment of a benchmark; raises with its output where it fails."""
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The median of the ratios of pairs taken in turns, and the quartiles around it."""
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    if len(pairs) < 2:
        return f"{pairs[0]:.3f}"
    low, middle, high = statistics.quantiles(pairs, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"
