"""Running Atlas as a person does: whole processes on a folder of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OWN = ROOT / "tests" / "own"
# A line of an error that tells of one problem: alone, or in a list of several.
PROBLEM = re.compile(r"^(?:error: | +- )([A-Za-z_][\w./]*)", re.M)


def environment(**more: str) -> dict[str, str]:
    """The environment of a test's process: one thread, and no tracking server from outside."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "SLURM_", "HYDRA_"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *arguments]


def train(*arguments: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """`python train.py ARGUMENTS`, which has to end with `code`."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(**more), timeout=240
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def quick(outputs: Path, *arguments: str) -> list[str]:
    """The arguments of a run that takes a second, with parts that are not Atlas's."""
    return [f"--config-dir={OWN}", "experiment=quick", f"outputs={outputs}", *arguments]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )


def only_run(outputs: Path) -> Path:
    """The directory of the one run below `outputs`."""
    found = [p.parent for p in outputs.glob("*/*/config.yaml") if ".old-" not in p.parent.name]
    assert len(found) == 1, found
    return found[0]


def wait_for_step(outputs: Path, step: int, timeout: float = 60.0) -> Path:
    """Wait until a run below `outputs` has saved a checkpoint of `step` updates or more."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        for path in outputs.glob("*/*/checkpoints/[0-9]*"):
            if int(path.name) >= step:
                return path.parent.parent
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step} after {timeout} s")


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> str:
    """Send a signal and return what the process printed."""
    process.send_signal(number)
    return process.communicate(timeout=60)[0]


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def points(run: Path) -> dict[tuple[int, str], float]:
    """Every (step, key) of the journal, which must stand there once, less what is a timing."""
    from atlas.record.journal import TIMINGS

    found: dict[tuple[int, str], float] = {}
    for line in lines(run / "metrics.jsonl"):
        for key, value in line.items():
            if key == "step" or key in TIMINGS:
                continue
            assert (line["step"], key) not in found, (line["step"], key)
            found[line["step"], key] = value
    return found


def weights(run: Path) -> dict[str, Any]:
    """Everything in the newest checkpoint."""
    import torch

    newest = max((run / "checkpoints").glob("[0-9]*"))
    return dict(torch.load(newest / "state.pt", weights_only=True))


def same(a: Any, b: Any) -> bool:
    """Equality to the bit, through dictionaries, lists and tensors."""
    import torch

    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def unnamed(text: str, *parts: object) -> list[str]:
    """Those of `parts` that `text` does not name: keys, values, numbers, paths; not sentences.

    A part is found where no longer word or number holds it. One that is given twice has to be named
    twice: a choice that is suggested, and listed with the others.
    """
    return [
        part
        for part, times in Counter(map(str, parts)).items()
        if len(re.findall(rf"(?<![\w.]){re.escape(part)}(?!\w|\.\d)", text)) < times
    ]


def problem_keys(error: str) -> list[str]:
    """The key that each problem in the text of an error begins with, in order of the alphabet."""
    return sorted(PROBLEM.findall(error))
