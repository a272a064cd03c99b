"""What a sweep costs over the work in it: 16 runs of one second on two places.

python benchmarks/sweep.py [--rounds 3]

The job waits a second in all (20 steps of 0.05 s), so that what is measured is what surrounds it.
Beside it the same job with Hydra's joblib launcher (`pip install hydra-joblib-launcher`), which
keeps no record, checkpoint or report. Also: how long 100 runs take to be composed and created.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time

from measure import TINY, atlas, heading, run

RUNS, PLACES, STEPS, PAUSE = 16, 2, 20, 0.05
WORK_S = RUNS / PLACES * STEPS * PAUSE


def main() -> None:
    """Take turns and print what a run costs over its work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(heading(f"A sweep of {RUNS} runs of {STEPS * PAUSE:g} s on {PLACES} places"))
    kinds = {
        "Atlas, tracking=none": lambda: sweep("tracking=none"),
        "Atlas with MLflow": lambda: sweep(),
    }
    if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher"):
        kinds["hydra-joblib-launcher"] = joblib
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, measure in kinds.items():
            taken[name].append(measure())
    for name, seconds in taken.items():
        cost = [(each - WORK_S) * PLACES / RUNS for each in seconds]
        print(
            f"{name:<24} {statistics.median(cost):6.3f} s a run over the work "
            f"({min(cost):.3f} to {max(cost):.3f}); {statistics.median(seconds):.1f} s in all"
        )


def sweep(*overrides: str) -> float:
    """Seconds that the sweep takes with Atlas, from start to table."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = f"seed={','.join(map(str, range(RUNS)))}"
        own = [f"trainer.steps={STEPS}", f"model.pause={PAUSE}", "schedule.warmup=5"]
        places = [f"cluster.runs_at_once={PLACES}", f"outputs={folder}", "data=vectors"]
        return seconds(atlas("-m", *own, *places, seeds, *overrides), BENCHMARK_MARK="/dev/null")


def joblib() -> float:
    """Seconds that it takes with joblib."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = f"seed={','.join(map(str, range(RUNS)))}"
        own = [
            "hydra/launcher=joblib",
            f"hydra.launcher.n_jobs={PLACES}",
            f"hydra.sweep.dir={folder}",
        ]
        return seconds([sys.executable, str(TINY / "joblib_app.py"), "-m", *own, seeds])


def seconds(command: list[str], **environment: object) -> float:
    """How long `command` takes."""
    began = time.monotonic()
    run(command, **environment)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
