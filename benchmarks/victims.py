"""Small runs to be struck by faults, and what is left of them when they have ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from measure import ROOT, environment

OWN = ROOT / "tests" / "own"
TIMINGS = ("time", "samples_per_s", "step_time_ms", "data_wait_share", "val/time_s")
PATIENCE_S = 120.0


sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
from atlas import worker  # noqa: E402


class Forked:
    """One start of a run by `atlas.worker`, in a process forked from this one, which has torch."""

    def __init__(self, run: Path, log: int, tracked: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(tracked)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os._exit(_train(run))

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code, once it has ended."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise SystemExit(f"process {self.pid} does not end")
            time.sleep(0.001)
        return code

    def send_signal(self, number: int) -> None:
        """As it says."""
        os.kill(self.pid, number)


class Victim:
    """A run of `tests/own` in a folder of its own, started again until it has finished.

    The first start is `train.py`; those of a single process that follow are forks, in a tenth of
    the time.
    """

    def __init__(self, outputs: Path, *overrides: str) -> None:
        self.outputs = outputs
        # The report at the end need not be waited for.
        counted = "optim.optimizer._target_=own_parts.Tallied"
        self.overrides = ["tracking.wait_s=0", counted, *overrides]
        self.environment = environment(TALLY=str(outputs / "tally"))
        self.forks = not any("nproc_per_node" in text for text in overrides)
        self.process: subprocess.Popen[bytes] | Forked | None = None

    def command(self) -> list[str]:
        """Its command line."""
        own = [f"--config-dir={OWN}", "experiment=quick", f"outputs={self.outputs}"]
        return [sys.executable, str(ROOT / "train.py"), *own, *self.overrides]

    def start(self, code: int | None = None) -> int | None:
        """Start; with `code`, wait and raise where it ends otherwise."""
        self.outputs.mkdir(parents=True, exist_ok=True)
        with open(self.outputs / "said.log", "ab") as log:
            if self.forks and any(self.outputs.glob("*/*/lock.json")):
                self.process = Forked(self.run, log.fileno(), self.environment)
                return None if code is None else self.wait(code)
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        return None if code is None else self.wait(code)

    def wait(self, code: int) -> int:
        """Wait for the end, which has to be with `code`."""
        assert self.process
        found = self.process.wait(PATIENCE_S)
        if found != code:
            raise SystemExit(f"{self.outputs}: exit {found}\n{self.said()[-3000:]}")
        return found

    def said(self) -> str:
        """All that its processes have printed."""
        return (self.outputs / "said.log").read_text()

    def until(self, ready: Callable[[], Any]) -> bool:
        """Wait for `ready` while the process lives; whether it came."""
        assert self.process
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            if ready():
                return True
            time.sleep(0.001)
        return False

    def strike(self, number: int = signal.SIGKILL) -> bool:
        """Send a signal, and SIGKILL to all that is left; whether it found the process alive."""
        assert self.process
        alive = self.process.poll() is None
        if alive:
            self.process.send_signal(number)
        self.process.wait(PATIENCE_S)
        if number == signal.SIGKILL:
            self._wait_for_ranks()
        return alive

    def _wait_for_ranks(self) -> None:
        """Ranks end with their launcher, but not before it."""
        lock = next(self.outputs.glob("*/*/lock.json"), None)
        pid = json.loads(lock.read_text())["pid"] if lock else 0
        deadline = time.monotonic() + 20
        while pid and Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    @property
    def run(self) -> Path:
        """The run's directory."""
        return next(self.outputs.glob("*/*/config.yaml")).parent

    def saved(self) -> int:
        """Updates in the newest checkpoint."""
        names = self.outputs.glob("*/*/checkpoints/[0-9]*")
        return max((int(path.name) for path in names), default=0)

    @property
    def taken(self) -> int:
        """Updates that were taken so far, in all starts."""
        tally = self.outputs / "tally"
        return tally.stat().st_size if tally.exists() else 0

    @property
    def repeated(self) -> int:
        """Updates of the finished run that were taken again."""
        return self.taken - self.saved()

    def lost(self, twin: Victim) -> dict[str, int]:
        """What differs from the undisturbed `twin`: all zero where nothing was lost."""
        mine, theirs = points(self.run), points(twin.run)
        first = {at: values[0] for at, values in mine.items()}
        return {
            "missing": len(theirs.keys() - mine.keys()),
            "doubled": sum(len(values) - 1 for values in mine.values()),
            "other values": sum(first[at] != theirs[at][0] for at in first.keys() & theirs.keys()),
            "sample ids": _differ(self.run / "samples.jsonl", twin.run / "samples.jsonl"),
            "weights": int(not same_state(self.run, twin.run)),
            "unreadable": unreadable(self.run),
        }


def _train(run: Path) -> int:
    try:
        return worker.main(run)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()


def points(run: Path) -> dict[tuple[int, str], list[Any]]:
    """Every value of the journal by (step, key), less timings."""
    found: dict[tuple[int, str], list[Any]] = {}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for key, value in line.items():
            if key != "step" and key not in TIMINGS:
                found.setdefault((line["step"], key), []).append(value)
    return found


def same_state(one: Path, other: Path) -> bool:
    """Whether the newest checkpoints hold the same to the bit."""
    from atlas.training.saving.comparison import first_difference

    return first_difference(one / "checkpoints", other / "checkpoints") is None


def unreadable(run: Path) -> int:
    """Checkpoints whose checksum is not that of their file."""
    from atlas.training.saving.checkpoint import Checkpoints, is_intact

    return sum(not is_intact(path) for path in Checkpoints(run / "checkpoints").steps())


def _differ(one: Path, other: Path) -> int:
    ours, theirs = one.read_text().splitlines(), other.read_text().splitlines()
    return sum(a != b for a, b in zip(ours, theirs)) + abs(len(ours) - len(theirs))
