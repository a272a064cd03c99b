"""Updates per second with and without features that are computed once, on the same run.

python benchmarks/features.py --root FOLDER [--model vla_dino] [--steps 40] [-- OVERRIDES]

FOLDER holds recordings (see docs/data.md). Each kind of run is timed by its own journal, from the
first logged update to the last one; then the run is started once more with another rate, to see
how long it takes from its start to its first update with the features there already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, heading, run


def main() -> None:
    """Run, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", required=True, help="a folder of recordings")
    parser.add_argument("--model", default="vla_dino")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=3, help="measured in turns")
    parser.add_argument("overrides", nargs="*", help="after --, as for train.py")
    arguments = parser.parse_args()
    print(heading(f"Features computed once, model={arguments.model}"))
    with tempfile.TemporaryDirectory() as scratch:
        measured: dict[bool, list[float]] = {False: [], True: []}
        starts = []
        for pair in range(arguments.pairs):
            for cached in (False, True):
                rate, started = measure(arguments, Path(scratch), pair, cached)
                measured[cached].append(rate)
                starts += [started] if cached else []
                print(
                    f"pair {pair}, {'with' if cached else 'without':<8}{rate:8.2f} updates/s, "
                    f"first update logged after {started:.1f} s",
                    flush=True,
                )
    without, with_features = (statistics.median(measured[cached]) for cached in (False, True))
    print(
        f"\nupdates/s, medians: {without:.2f} without, {with_features:.2f} with: "
        f"{with_features / without:.2f} times as many"
    )
    print(f"seconds to the first update with features, to compute them: {starts[0]:.1f}", end="")
    print(f"; once they are there: {statistics.median(starts[1:]):.1f}" if starts[1:] else "")


def measure(
    arguments: argparse.Namespace, scratch: Path, pair: int, cached: bool
) -> tuple[float, float]:
    """Updates per second, and seconds from the start to the first logged update."""
    outputs = scratch / f"{pair}-{cached}"
    began = time.time()
    run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            f"model={arguments.model}",
            "data=lerobot",
            f"data.root={Path(arguments.root).resolve()}",
            f"data.cache_features={str(cached).lower()}",
            f"outputs={outputs}",
            f"trainer.steps={arguments.steps}",
            f"optim.lr={1e-4 * (1 + pair)}",  # another run, the same frozen vision
            "trainer.log_interval=1",
            "schedule.warmup=1",
            "data.val=null",
            "tracking=none",
            *arguments.overrides,
        ],
        ATLAS_CACHE=scratch / "cache",
    )
    (journal,) = outputs.glob("*/*/metrics.jsonl")
    times = [line["time"] for line in map(json.loads, journal.open()) if "train/loss" in line]
    return (len(times) - 1) / (times[-1] - times[0]), times[0] - began


if __name__ == "__main__":
    main()
