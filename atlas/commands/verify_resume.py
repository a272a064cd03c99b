"""`atlas verify-resume`: run a model straight and with a kill, and compare both bit by bit."""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from atlas.errors import EXIT_DONE, EXIT_FAILED, AtlasError
from atlas.record import journal
from atlas.run.directory import Run
from atlas.version import ROOT

HELP = "run a model straight and with a kill, and compare both bit by bit"
POLL_S = 0.0005  # a step of a tiny model takes about a millisecond
ATTEMPTS = 3
END_S = 20.0  # for the processes of a killed run to end
HYDRA_OPTIONS = ("config_dir", "config_name")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the overrides of train.py, and what is done with them."""
    _options(parser)
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, help="what you would give to train.py"
    )


def run(args: argparse.Namespace) -> int:
    """Train twice in a temporary folder, once with a kill; return 0 if both runs are equal."""
    rest = argparse.ArgumentParser(prog="atlas verify-resume")
    _options(rest)
    args, overrides = rest.parse_known_args(args.overrides, args)
    if args.steps < 3:
        raise AtlasError(f"--steps {args.steps} must be at least 3: before, at and after the kill")
    options = [
        text
        for name in HYDRA_OPTIONS
        if (value := getattr(args, name))
        for text in (f"--{name.replace('_', '-')}", value)
    ]
    folder = Path(tempfile.mkdtemp(prefix="atlas-verify-"))
    try:
        trial = Trial.of(folder, options, overrides, args.steps, args.kill_at)
        return trial.verdict()
    finally:
        if args.keep:
            print(f"both runs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _options(parser: argparse.ArgumentParser) -> None:
    suppressed = argparse.SUPPRESS
    parser.add_argument("--steps", type=int, default=24, help="updates (default: %(default)s)")
    parser.add_argument("--kill-at", type=int, help="updates before the kill (default: random)")
    parser.add_argument("--keep", action="store_true", help="leave both runs where they are")
    parser.add_argument("--config-dir", help="as for train.py: the folder of your own parts")
    parser.add_argument("--config-name", help=suppressed)


@dataclass(frozen=True)
class Trial:
    """One command line, to be run straight and with a SIGKILL after about `kill_at` updates."""

    folder: Path
    command: list[str]
    steps: int
    kill_at: int

    @classmethod
    def of(
        cls,
        folder: Path,
        options: Sequence[str],
        overrides: Sequence[str],
        steps: int,
        at: int | None,
    ) -> Trial:
        """Return the trial of `overrides`, shortened to `steps` updates."""
        command = [sys.executable, str(ROOT / "train.py"), *options, *overrides]
        kill_at = random.randint(2, max(2, 2 * steps // 3)) if at is None else at
        if not 1 <= kill_at < steps:
            raise AtlasError(f"--kill-at {kill_at} must be from 1 to {steps - 1}, below --steps")
        short = shortened(composed(command), steps, kill_at)
        return cls(folder, [*command, *short], steps, kill_at)

    def verdict(self) -> int:
        """Run both, print how they compare, and return the exit code."""
        print(f"{self.steps} updates straight …", flush=True)
        straight = self._finish("straight")
        print(f"{self.steps} updates with a SIGKILL after {self.kill_at} …", flush=True)
        killed_at = next(filter(None, (self._kill() for _ in range(ATTEMPTS))), 0)
        if not killed_at:
            raise AtlasError(
                f"the run always ended before a kill after {self.kill_at} updates; give "
                f"a smaller --kill-at or more --steps than {self.steps}"
            )
        resumed = self._finish("killed")
        difference = first_difference(straight, resumed)
        if difference:
            print(
                f"NOT REPRODUCIBLE: killed after update {killed_at} and resumed, the run differs."
                f"\n  first difference (straight, resumed): {difference}\n"
                "  see docs/reliability.md; on CUDA give trainer.deterministic=true"
            )
            return EXIT_FAILED
        print(
            f"BIT-IDENTICAL: killed after update {killed_at} of {self.steps} and resumed; "
            f"{compared(straight)}"
        )
        return EXIT_DONE

    def _command(self, name: str) -> list[str]:
        return [*self.command, f"outputs={self.folder / name}"]

    def _finish(self, name: str) -> Run:
        """Run to the end; raise `AtlasError` with the output of a run that fails."""
        done = subprocess.run(self._command(name), capture_output=True, text=True)
        if done.returncode:
            raise AtlasError(f"the run fails without a kill:\n{done.stdout}{done.stderr}")
        return self._run(name)

    def _run(self, name: str) -> Run:
        return Run(next(self.folder.glob(f"{name}/*/*/config.yaml")).parent)

    def _kill(self) -> int:
        """Start, kill after `kill_at` saved updates, and return how many; 0 if it had ended."""
        shutil.rmtree(self.folder / "killed", ignore_errors=True)
        with open(self.folder / "killed.log", "w") as log:
            process = subprocess.Popen(
                self._command("killed"), stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_for_save(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        run = self._run("killed")
        self._wait_for_end(run)
        saved = _saved(self.folder / "killed")
        return saved if saved < self.steps else 0

    def _wait_for_save(self, process: subprocess.Popen[Any]) -> None:
        """Wait until the checkpoint exists, and then into the middle of some step."""
        while process.poll() is None and _saved(self.folder / "killed") < self.kill_at:
            time.sleep(POLL_S)
        time.sleep(random.uniform(0, 0.001))
        if process.poll():
            raise AtlasError(
                f"the run failed before the kill:\n{(self.folder / 'killed.log').read_text()}"
            )

    def _wait_for_end(self, run: Run) -> None:
        deadline = time.monotonic() + END_S
        while run.lock.live_holder() and time.monotonic() < deadline:
            time.sleep(0.05)


def composed(command: Sequence[str]) -> Mapping[str, Any]:
    """Return the configuration that Hydra composes; raise its message as `AtlasError`."""
    done = subprocess.run([*command, "--cfg", "job"], capture_output=True, text=True)
    if done.returncode:
        raise AtlasError((done.stderr or done.stdout).strip().removeprefix("error: "))
    config: Mapping[str, Any] = yaml.safe_load(done.stdout)
    target = str(config["cluster"].get("_target_"))
    if not target.startswith("launchers.local."):
        raise AtlasError(f"cluster is {target}: the check runs on this machine; use cluster=local")
    if config["resume"]:
        raise AtlasError(
            f"resume={config['resume']}: the check trains new runs; give instead what "
            "the run was started with"
        )
    return config


def shortened(config: Mapping[str, Any], steps: int, kill_at: int) -> Iterator[str]:
    """Yield overrides that make a run of `steps` updates, of which everything can be compared."""
    yield from (f"trainer.steps={steps}", "tracking=none", "trainer.progress=false")
    yield from ("fresh=false", "dry_run=false")
    yield from ("trainer.log_interval=1", "trainer.log_samples=true", "trainer.keep=1")
    yield from (f"trainer.save_interval={kill_at}", "trainer.max_time=null")
    if config["init_from"]:  # a path: an id would be looked up in the outputs of these runs
        yield f"init_from='{Run.find(str(config['init_from']), config['outputs']).path}'"
    warmup = (config.get("schedule") or {}).get("warmup")
    if isinstance(warmup, int) and warmup >= steps:
        yield f"schedule.warmup={steps // 4}"
    interval = config["trainer"].get("val_interval")
    if config["data"].get("val") is not None and not (
        isinstance(interval, int) and interval < steps
    ):
        yield f"trainer.val_interval={max(1, steps // 2)}"


def first_difference(straight: Run, resumed: Run) -> str | None:
    """Return the first loss, rate, sample id, weight or other state that differs, or None."""
    found = itertools.chain(_samples_differ(straight, resumed), _points_differ(straight, resumed))
    if text := next(found, None):
        return text
    from atlas.training.saving.comparison import first_difference as of_checkpoints

    return of_checkpoints(straight.checkpoints, resumed.checkpoints)


def compared(run: Run) -> str:
    """Return how much was compared, in words."""
    updates = sum(1 for _ in journal.read(run.samples_file))
    return (
        f"{len(_points(run))} points (losses, rates, norms), the sample ids of {updates} updates, "
        "weights, optimizer, average"
    )


def _samples_differ(straight: Run, resumed: Run) -> Iterator[str]:
    pairs = itertools.zip_longest(
        journal.read(straight.samples_file), journal.read(resumed.samples_file)
    )
    for one, other in pairs:
        if one != other:
            yield f"samples of update {(one or other or {}).get('step')}: {one} and {other}"


def _points_differ(straight: Run, resumed: Run) -> Iterator[str]:
    one, other = _points(straight), _points(resumed)
    for step, key in sorted({*one, *other}):
        a, b = one.get((step, key)), other.get((step, key))
        if a != b and not (a != a and b != b):
            yield f"step {step}, {key}: {a!r} and {b!r}"


def _points(run: Run) -> dict[tuple[int, str], Any]:
    """Return every value of the journal but timings; a value that is recorded twice is a list."""
    found: dict[tuple[int, str], Any] = {}
    for line in journal.read(run.journal_file):
        for key, value in line.items():
            if key != "step" and key not in journal.TIMINGS:
                at = (line["step"], key)
                found[at] = [found[at], value] if at in found else value
    return found


def _saved(outputs: Path) -> int:
    """Return how many updates the newest checkpoint below `outputs` has."""
    names = (path.name for path in outputs.glob("*/*/checkpoints/[0-9]*"))
    return max(map(int, names), default=0)
