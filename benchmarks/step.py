"""The time of a step of a tiny MLP: Atlas's loop against one written by hand, in turns.

python benchmarks/step.py [--pairs 20] [--segment 2000] [--batch-size 32]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sqlite3
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import measure

VARIANTS = {
    "without tracking": ("tracking=none", "trainer.log_interval=1000000000"),
    "every step tracked": ("tracking=mlflow", "trainer.log_interval=1", "tracking.wait_s=1800"),
}
BARS = {"without tracking": 1.05, "every step tracked": 1.15}


def main() -> None:
    """Measure both variants and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20, help="turns of each loop")
    parser.add_argument("--segment", type=int, default=2000, help="steps in a turn")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    print(measure.heading(f"Step, MLP 64-256-64, batch {args.batch_size}"))
    print(f"{args.pairs} turns of {args.segment} steps each; median of the ratios (quartiles)")
    for name, overrides in VARIANTS.items():
        folder = Path(tempfile.mkdtemp(prefix="atlas-step-"))
        try:
            times = turns(folder, args, overrides)
            print(row(name, times, args.segment), flush=True)
            if "tracked" in name:
                print(f"  {stored(folder)}", flush=True)
        finally:
            shutil.rmtree(folder)


def turns(folder: Path, args: argparse.Namespace, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Run `train.py` with the data set that takes turns; the seconds of every segment."""
    steps = (args.pairs + 1) * args.segment + 1  # the first turn warms up
    command = measure.atlas(
        "data=turns",
        f"data.segment={args.segment}",
        f"data.batch_size={args.batch_size}",
        f"outputs={folder}",
        f"trainer.steps={steps}",
        "schedule.warmup=100",
        "trainer.save_interval=null",
        "trainer.progress=false",
        *overrides,
    )
    measure.run(command, BENCHMARK_TURNS=folder / "turns.json")
    times = json.loads((folder / "turns.json").read_text())
    # A turn of Atlas lies between two of the plain loop: it is compared with the one before it.
    return {"atlas": times["atlas"][1:], "plain": times["plain"][1:-1]}


def row(name: str, times: dict[str, Any], segment: int) -> str:
    """Ratios by wall and processor time, and the median microseconds of a step."""
    wall = {who: [pair[0] for pair in pairs] for who, pairs in times.items()}
    cpu = {who: [pair[1] for pair in pairs] for who, pairs in times.items()}
    micro = {who: 1e6 * statistics.median(all_) / segment for who, all_ in wall.items()}
    return (
        f"{name:20} {measure.ratios(wall['atlas'], wall['plain'])}, bar {BARS[name]}; "
        f"by processor time of the training thread {measure.ratios(cpu['atlas'], cpu['plain'])}; "
        f"of all turns {sum(wall['atlas']) / sum(wall['plain']):.3f}; "
        f"a step {micro['atlas']:.0f} and {micro['plain']:.0f} us"
    )


def stored(folder: Path) -> str:
    """Whether every point of the journal is in MLflow's store, once."""
    (journal,) = folder.glob("*/*/metrics.jsonl")
    wanted: Counter[Any] = Counter()
    for line in map(json.loads, journal.read_text().splitlines()):
        step, when = line.pop("step"), int(line.pop("time") * 1000)
        wanted.update((key, step, when, value) for key, value in line.items())
    with sqlite3.connect(folder / "mlflow.db") as store:
        found = Counter(store.execute("select key, step, timestamp, value from metrics"))
    missing, extra = (wanted - found).total(), (found - wanted).total()
    return (
        f"{wanted.total():,} points in the journal: {missing} missing in MLflow, {extra} too many"
    )


if __name__ == "__main__":
    main()
