"""Progress of a training run as it is shown: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

LINE_S = 10.0  # seconds between two lines


class Lines:
    """Progress in lines: one every `LINE_S` seconds and one for every validation."""

    def __init__(self, steps: int, start: int) -> None:
        self._steps = steps
        self._start = start
        self._began = time.monotonic()
        self._shown = float("-inf")

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show update `step`, which is done, if a line is due."""
        if time.monotonic() - self._shown >= LINE_S or step == self._steps - 1:
            self._shown = time.monotonic()
            self.message(f"step {step + 1}/{self._steps}  {self._facts(step, metrics)}")

    def validated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        """Show a validation after `step` updates."""
        self.message(f"step {step}/{self._steps}  {validation_text(metrics, best)}")

    def message(self, text: str) -> None:
        """Show a line of text."""
        print(text, flush=True)

    def close(self) -> None:
        """Release the terminal."""

    def _facts(self, step: int, metrics: Mapping[str, float]) -> str:
        done = step + 1 - self._start
        left = (time.monotonic() - self._began) / max(1, done) * (self._steps - step - 1)
        return f"{training_text(metrics)}  {duration(left)} left"


class Bar(Lines):
    """Progress as a bar by rich; validations are lines above it."""

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
        """Move the bar to update `step`."""
        self._bar.update(self._task, completed=step + 1, facts=self._facts(step, metrics))

    def validated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        """Show a validation above the bar."""
        self._bar.console.print(f"step {step}  {validation_text(metrics, best)}", highlight=False)

    def message(self, text: str) -> None:
        """Show a line of text above the bar."""
        self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        """Stop the bar and release the terminal."""
        self._bar.stop()


class Silent(Lines):
    """No progress: for ranks other than 0 and `trainer.progress=false`."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show nothing."""

    def validated(self, step: int, metrics: Mapping[str, float], best: bool) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""


def open_progress(setting: Any, is_main: bool, steps: int, start: int) -> Lines:
    """Return the display for `trainer.progress`; `auto` is a bar on a terminal, lines elsewhere."""
    if not is_main or setting is False:
        return Silent(steps, start)
    has_bar = setting is True or sys.stdout.isatty()
    return (Bar if has_bar else Lines)(steps, start)


def training_text(metrics: Mapping[str, float]) -> str:
    """Return loss, highest learning rate and speed, as far as `metrics` has them."""
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
    """Return all validation metrics on one line."""
    values = "  ".join(
        f"{key} {value:.4g}" for key, value in metrics.items() if key != "val/time_s"
    )
    return f"{values}  ({metrics['val/time_s']:.1f} s)" + ("  best so far" if best else "")


def duration(seconds: float) -> str:
    """Return a time in seconds as `1:02:03` or `2:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
