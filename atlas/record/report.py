"""`report.png`: what it shows of a run, and when it is drawn again. `figure.py` draws it."""

from __future__ import annotations

import math
import textwrap
import time
from pathlib import Path
from typing import Any

from atlas.config.secrets import mask_uris
from atlas.record import journal
from atlas.record.shipping.cursor import points
from atlas.record.shipping.log import reason
from atlas.run.directory import Run

REDRAW_S = 30.0
KEPT_LINES = 20_000  # of training; more than a picture can show
FIRST = ("val/loss", "val/success", "val/l1")
LAST_PANELS = 9

Curves = dict[str, tuple[list[int], list[float]]]  # steps and values, in the order of the journal


class Report:
    """The report of a run that is being written: drawn now and then, and at the end."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._drawn: tuple[int, bool] | None = None  # the size of the journal, whether at the end
        self._due = time.monotonic() + REDRAW_S

    def update(self, is_over: bool) -> str | None:
        """Draw the report if it is due and has changed; return why that failed, or None.

        It is no error: a picture must not keep the points from being sent.
        """
        wanted = (journal.size(self._run.journal_file), is_over)
        if wanted == self._drawn or (not is_over and time.monotonic() < self._due):
            return None
        self._drawn, self._due = wanted, time.monotonic() + REDRAW_S
        try:
            draw(self._run)
        except Exception as error:
            return reason(error)
        return None


def draw(run: Run) -> Path:
    """Draw the journal as it is now; return the picture, which is replaced as a whole.

    An empty or a missing journal gives a picture that says so.
    """
    from atlas.record import figure  # matplotlib takes half a second to import

    curves = read_curves(run.journal_file)
    figure.draw(run.report_file, _title(run), _panels(curves), curves)
    return run.report_file


def read_curves(path: Path) -> Curves:
    """Return `{key: (steps, values)}` of a journal; of a long one only every n-th training line.

    Lines with validation are all kept.
    """
    curves: Curves = {}
    stride = max(1, math.ceil(journal.count_lines(path) / KEPT_LINES))
    for number, (raw, end) in enumerate(journal.read_raw(path)):
        if number % stride and b'"val/' not in raw:
            continue  # not even parsed: a long run has millions of lines
        entry = journal.parse(path, raw, end) or {}
        for key, value in points(entry).items():
            steps, values = curves.setdefault(key, ([], []))
            steps.append(entry["step"])
            values.append(value)
    return curves


def _panels(curves: Curves) -> list[list[str]]:
    """Return which keys share a panel, in the order they are shown."""
    rates = [key for key in curves if key.startswith("lr/")]
    shown = {"val/time_s", *FIRST}
    others = sorted(key for key in curves if key.startswith("val/") and key not in shown)
    order = [["train/loss"], ["val/loss"], rates, *([key] for key in FIRST[1:])]
    order += [["grad_norm"], *([key] for key in others)]
    return [keys for keys in order if keys and keys[0] in curves][:LAST_PANELS]


def _title(run: Run) -> str:
    """Return name, id, state and progress; below, the overrides as typed."""
    status, overrides = run.read_status(), _overrides(run)
    head = f"{status.name or run.path.parent.name} · {run.id}"
    state = run.judge_state() or "no status"
    at = f" at {status.step:,} of {status.steps:,} updates" if status.steps is not None else ""
    lines = textwrap.wrap(mask_uris(" ".join(overrides)) or "(defaults)", 110)
    if len(lines) > 3:
        lines = [*lines[:2], lines[2][:106] + " …"]
    return "\n".join([f"{head} · {state}{at}", *lines])


def _overrides(run: Run) -> list[str]:
    if not run.exists():
        return []
    head: dict[str, Any] = run.read_config().get("run") or {}
    return [str(each) for each in head.get("overrides") or []]
