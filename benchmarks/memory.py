"""Memory of all processes of the default run, and of a finished run that is issued again.

python benchmarks/memory.py [--steps 600]

PSS (a page that n processes share counts 1/n in each) over `train.py` and everything that it
started, the shipper too.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import measure

MB = 1e6
BARS = {"run": 1500, "again": 100, "seconds": 1.0}


def main() -> None:
    """Run, issue it again, and print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="updates (the default run: 1500)")
    args = parser.parse_args()
    print(measure.heading(f"Memory of the default run, {args.steps} steps"))
    with tempfile.TemporaryDirectory(prefix="atlas-memory-") as outputs:
        command = [
            str(measure.ROOT / "train.py"),
            f"outputs={outputs}",
            f"trainer.steps={args.steps}",
            f"schedule.warmup={args.steps // 4}",
            f"trainer.val_interval={args.steps // 3}",
        ]
        peak, took, processes = watched([sys.executable, *command], every_s=0.1)
        assert list(Path(outputs).glob("mlflow.db")), "nothing was sent to MLflow"
        print(
            f"run: peak {peak:.0f} MB over {processes} processes (bar {BARS['run']}), {took:.0f} s"
        )
        again = [watched([sys.executable, *command], every_s=0.005) for _ in range(7)]
        print(
            f"the finished run again: peak {max(a[0] for a in again):.0f} MB (bar {BARS['again']}), "
            f"{statistics.median(a[1] for a in again):.2f} s (bar {BARS['seconds']}), "
            f"imports of torch or mlflow: {', '.join(heavy(command)) or 'none'}"
        )


def watched(command: list[str], every_s: float) -> tuple[float, float, int]:
    """Run `command`; its peak PSS in MB, its seconds, and how many processes there were at most."""
    began = time.monotonic()
    child = subprocess.Popen(command, env=measure.environment(), stdout=subprocess.DEVNULL)
    tree: set[int] = {child.pid}
    peak, most = 0.0, 0
    while child.poll() is None:
        tree = set(grown(tree))
        sizes = [size for size in map(pss, tree) if size]
        peak, most = max(peak, sum(sizes)), max(most, len(sizes))
        time.sleep(every_s)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return peak / MB, time.monotonic() - began, most


def grown(tree: set[int]) -> Iterator[int]:
    """The living processes of `tree`, and what they have started meanwhile."""
    waiting = list(tree)
    while waiting:
        pid = waiting.pop()
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            started = [int(n) for task in tasks for n in (task / "children").read_text().split()]
        except OSError:
            continue  # it has ended
        yield pid
        waiting += [n for n in started if n not in tree]


def pss(pid: int) -> int:
    """The proportional set size of a process in bytes, 0 where it has ended."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def heavy(command: list[str]) -> list[str]:
    """Which of torch and mlflow the command imports."""
    timed = [sys.executable, "-X", "importtime", *command]
    done = subprocess.run(timed, env=measure.environment(), capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    return sorted({"torch", "mlflow"} & imported)


if __name__ == "__main__":
    main()
