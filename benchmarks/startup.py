"""From the start of the process to the end of the first step: Atlas against a plain script.

python benchmarks/startup.py [--rounds 10]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure

PLAIN = [sys.executable, str(measure.TINY / "plain.py")]
BAR = 1.15


def main() -> None:
    """Start everything in turns, and print the ratios to the plain script of the same round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    print(measure.heading("Start to the end of the first step, MLP 64-256-64, batch 32"))
    with tempfile.TemporaryDirectory(prefix="atlas-startup-") as name:
        starts = commands(Path(name))
        for command in starts.values():  # reads from disk what is read for the first time
            seconds(command(), Path(name))
        times: dict[str, list[tuple[float, float]]] = {who: [] for who in starts}
        for _ in range(args.rounds):
            for who, command in starts.items():
                times[who].append(seconds(command(), Path(name)))
    print(f"{args.rounds} rounds; median of the ratios to the plain script (quartiles)")
    for who, values in times.items():
        print(row(who, values, times["plain script"]))


def row(who: str, values: list[tuple[float, float]], plain: list[tuple[float, float]]) -> str:
    """Ratios by wall and processor time, and the median seconds."""
    (wall, cpu), (plain_wall, plain_cpu) = zip(*values), zip(*plain)
    bar = f", bar {BAR}" if who.startswith("Atlas") else ""
    return (
        f"{who:38} {measure.ratios(wall, plain_wall)}{bar}; by processor time "
        f"{measure.ratios(cpu, plain_cpu)}; {statistics.median(wall):.2f} s"
    )


def commands(folder: Path) -> dict[str, Callable[[], list[str]]]:
    """What to start, by name; every call gives the command of a run that is not there yet."""
    count = itertools.count(1)

    def atlas(outputs: str, tracking: str) -> list[str]:
        seed = next(count)
        return measure.atlas(
            "data=vectors",
            f"tracking={tracking}",
            f"seed={seed}",
            f"outputs={folder / outputs.format(seed)}",
            "trainer.steps=3",
            "schedule.warmup=1",
        )

    def plain(store: str) -> list[str]:
        return [*PLAIN, "--mlflow", f"sqlite:///{folder / store.format(next(count))}"]

    return {
        "plain script": lambda: PLAIN,
        "Atlas, tracking=none": lambda: atlas("none", "none"),
        "Atlas with MLflow, store there": lambda: atlas("there", "mlflow"),
        "Atlas with MLflow, new store": lambda: atlas("new-{}", "mlflow"),
        "plain script with MLflow, store there": lambda: plain("there.db"),
        "plain script with MLflow, new store": lambda: plain("new-{}.db"),
    }


def seconds(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall and processor time of `command` until the end of its first step; waits for its end."""
    mark = folder / "mark"
    mark.unlink(missing_ok=True)
    given = ["--mark", str(mark)] if command[: len(PLAIN)] == PLAIN else []
    began = time.monotonic()
    measure.run([*command, *given], BENCHMARK_MARK=mark)
    ended, cpu = map(float, mark.read_text().split())
    return ended - began, cpu


if __name__ == "__main__":
    main()
