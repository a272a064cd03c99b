"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

LINE_S = 10.0


class Lines:
    """A line every ten seconds and for every validation."""

    def __init__(self, steps: int, start: int) -> None:
        self._steps = steps
        self._start = start
        self._began = time.monotonic()
        self._shown = float("-inf")

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Update `step` was taken."""
        if time.monotonic() - self._shown >= LINE_S or step == self._steps - 1:
            self._shown = time.monotonic()
            self.say(f"step {step + 1}/{self._steps}  {self._facts(step, metrics)}")

    def validated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        """A validation after `step` updates ended."""
        self.say(f"step {step}/{self._steps}  {validation_text(metrics, best)}")

    def say(self, text: str) -> None:
        """Anything else."""
        print(text, flush=True)

    def close(self) -> None:
        """Nothing is left open."""

    def _facts(self, step: int, metrics: Mapping[str, float]) -> str:
        done = step + 1 - self._start
        left = (time.monotonic() - self._began) / max(1, done) * (self._steps - step - 1)
        return f"{training_text(metrics)}  {duration(left)} left"


class Bar(Lines):
    """A progress bar by rich, with validations as lines above it."""

    def __init__(self, steps: int, start: int) -> None:
        super().__init__(steps, start)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
        )
        self._task = self._bar.add_task("", total=steps, completed=start, facts="")
        self._bar.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        self._bar.update(self._task, completed=step + 1, facts=self._facts(step, metrics))

    def validated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        self._bar.console.print(f"step {step}  {validation_text(metrics, best)}", highlight=False)

    def say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._bar.stop()


class Silent(Lines):
    """Ranks other than 0, and `trainer.progress=false`."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def validated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def open_progress(wanted: Any, main: bool, steps: int, start: int) -> Lines:
    """The display for `trainer.progress`; `auto` is a bar on a terminal and lines elsewhere."""
    if not main or wanted is False:
        return Silent(steps, start)
    bar = wanted is True or sys.stdout.isatty()
    return (Bar if bar else Lines)(steps, start)


def training_text(metrics: Mapping[str, float]) -> str:
    """Loss, the highest rate and the speed, as far as they are known."""
    rates = [value for key, value in metrics.items() if key.startswith("lr/")]
    words = []
    if "train/loss" in metrics:
        words.append(f"loss {metrics['train/loss']:.4g}")
    if rates:
        words.append(f"lr {max(rates):.3g}")
    if "samples_per_s" in metrics:
        words.append(f"{metrics['samples_per_s']:.0f} samples/s")
    return "  ".join(words)


def validation_text(metrics: Mapping[str, float], best: bool) -> str:
    """All validation metrics on one line."""
    values = "  ".join(
        f"{key} {value:.4g}" for key, value in metrics.items() if key != "val/time_s"
    )
    return f"{values}  ({metrics['val/time_s']:.1f} s)" + ("  best so far" if best else "")


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
