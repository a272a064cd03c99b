"""What the default run learns: three seeds, and the same with every instruction blanked.

python benchmarks/tabletop.py [--seeds 0 1 2] [--outputs outputs]

Prints, for every run, the share of 50 new scenes in which the policy touches the named object, and the
L1 of its actions on held-out episodes over that of the mean action. Runs that are there are not run
again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import heading

ROOT = Path(__file__).resolve().parent.parent
NAME = "tabletop_benchmark"


def main() -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--outputs", default=str(ROOT / "outputs"))
    arguments = parser.parse_args()
    print(heading("What the default run learns"))
    print(f"{'':<12} {'seed':>4} {'success':>8} {'L1 / mean action':>17} {'seconds':>8}")
    for blank in (False, True):
        rows = [run(seed, blank, arguments.outputs) for seed in arguments.seeds]
        for seed, row in zip(arguments.seeds, rows, strict=True):
            tell("blanked" if blank else "default", str(seed), row)
        means = {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        tell("blanked" if blank else "default", "mean", means)


def run(seed: int, blank: bool, outputs: str) -> dict[str, float]:
    """Train with one seed; the last validation's success and L1 ratio, and the seconds it took."""
    began = time.monotonic()
    flags = [f"seed={seed}", f"data.blank_instruction={str(blank).lower()}"]
    command = [sys.executable, str(ROOT / "train.py"), f"name={NAME}", f"outputs={outputs}", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    last = read(Path(outputs) / NAME, flags)["last"]
    return {
        "success": last["val/success"],
        "ratio": last["val/l1_vs_mean_action"],
        "seconds": time.monotonic() - began,
    }


def read(folder: Path, flags: list[str]) -> dict[str, Any]:
    """The status of the run that was started with `flags`."""
    for file in folder.glob("*/status.json"):
        status: dict[str, Any] = json.loads(file.read_text())
        if all(flag in status["command"] for flag in flags) and ".old-" not in file.parent.name:
            return status
    raise FileNotFoundError(f"no run with {flags} in {folder}")


def tell(kind: str, seed: str, row: dict[str, float]) -> None:
    """One line of the table."""
    print(
        f"{kind:<12} {seed:>4} {row['success']:8.2f} {row['ratio']:17.3f} {row['seconds']:8.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
