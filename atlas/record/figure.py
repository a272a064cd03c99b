"""The picture of a report, drawn with matplotlib without its global state (pyplot).

It has to survive what a journal can hold: values that are not finite, keys with the characters of
mathematics, a curve of a single point, a million points.
"""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from atlas.system.files import atomic_path

POINTS = 4_000  # in one curve
RATES = 12  # parameter groups in one panel
WIDE = 30  # what spans more than this factor gets a logarithmic axis
LARGEST = 1e300  # Agg's arithmetic overflows above
NAMES = {
    "train/loss": "training loss",
    "grad_norm": "gradient norm",
    "val/loss": "validation loss",
    "val/l1": "validation L1",
    "val/success": "validation success",
}
INK, GREY, NOTE, BEST, BAD = "#1f3b57", "#9db4c8", "#556", "#c8102e", "#e07b00"

Array = NDArray[Any]


class Curve:
    """The values of one key and their steps; `is_finite` says which of them can be drawn."""

    def __init__(self, steps: ArrayLike, values: ArrayLike) -> None:
        self.all_steps = np.asarray(steps, dtype=np.int64)
        all_values = np.asarray(values, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            self.is_finite = np.abs(all_values) <= LARGEST  # False for NaN
        self.steps = self.all_steps[self.is_finite]
        self.values = all_values[self.is_finite]

    @property
    def peak(self) -> float:
        """The largest value; 0 for an empty curve."""
        return float(self.values.max()) if len(self.values) else 0.0

    def thinned(self, values: ArrayLike | None = None) -> tuple[Array, Array]:
        """Return steps and `values` to draw: at most POINTS of them, always with the last one."""
        stride = math.ceil(len(self.steps) / POINTS) or 1
        kept = np.arange(0, len(self.steps), stride)
        if stride > 1:
            kept = np.append(kept, len(self.steps) - 1)
        return self.steps[kept], np.asarray(self.values if values is None else values)[kept]

    def dots(self) -> dict[str, Any]:
        """Return the style of markers for a curve that is too short for a line."""
        return {"marker": "o", "markersize": 3} if len(self.steps) < 3 else {}


def draw(
    path: Path,
    title: str,
    panels: Sequence[Sequence[str]],
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
) -> None:
    """Draw `panels`, each of one or several keys of `curves`, and replace the picture at `path`."""
    columns = 1 if len(panels) < 2 else 2 if len(panels) <= 4 else 3
    rows = max(1, math.ceil(len(panels) / columns))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(5.6 * columns + 0.4, 3.5 * rows + 1.1), dpi=100, layout=layout)
    with warnings.catch_warnings(), atomic_path(path) as temporary:
        warnings.simplefilter("ignore")  # a glyph that the font does not have, an empty axis
        text = figure.suptitle(title, size=10, color=INK, ha="left", x=0.012)
        text.set_parse_math(False)
        for number, keys in enumerate(panels):
            axes = figure.add_subplot(rows, columns, number + 1)
            _panel(axes, {key: Curve(*curves[key]) for key in keys})
        if not panels:
            figure.text(0.5, 0.45, "nothing in metrics.jsonl yet", ha="center", color=INK, size=13)
        FigureCanvasAgg(figure).print_figure(temporary, format="png")


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Return the median of the `width` values around each: no lag, and a spike stays in place.

    A window that is kept sorted: numpy would sort each of them, a gigabyte in a long curve.
    """
    half = width // 2
    window: list[float] = sorted(values[:half])
    out = []
    for at in range(len(values)):
        if at + half < len(values):
            bisect.insort(window, values[at + half])
        if at - half > 0:
            window.pop(bisect.bisect_left(window, values[at - half - 1]))
        out.append(window[len(window) // 2])
    return out


def _panel(axes: Axes, curves: Mapping[str, Curve]) -> None:
    axes.grid(color="#e6ebf0", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8, color=GREY)
    axes.set_xlabel("update", size=8, color=NOTE)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    key, curve = next(iter(curves.items()))
    if key.startswith("lr/"):
        _draw_rates(axes, curves)
    elif key.startswith("val/"):
        _draw_validation(axes, key, curve)
    else:
        _draw_noisy(axes, key, curve)
    _mark_not_finite(axes, list(curves.values()))


def _draw_noisy(axes: Axes, key: str, curve: Curve) -> None:
    """Draw every value, pale, and their median over a thirtieth of the curve."""
    middle = smooth(curve.values.tolist(), len(curve.values) // 30)
    axes.plot(*curve.thinned(), color=GREY, linewidth=0.7, alpha=0.7, **curve.dots())
    axes.plot(*curve.thinned(middle), color=INK, linewidth=1.6)
    _heading(axes, NAMES.get(key, _readable(key)), f"now {_last(middle):.4g}")
    _scale(axes, [curve.peak, *middle])


def _draw_validation(axes: Axes, key: str, curve: Curve) -> None:
    """Draw every value, and mark the best one of a loss or of a success."""
    steps, values = curve.steps, curve.values
    axes.plot(*curve.thinned(), color=INK, linewidth=1.4, marker="o", markersize=3)
    name = NAMES.get(key) or f"validation: {_readable(key.removeprefix('val/'))}"
    note = f"now {_last(values):.4g}"
    find_best = _find_best(key)
    if find_best and len(values):
        best = int(find_best(values))
        axes.plot(steps[best], values[best], marker="*", markersize=13, color=BEST, zorder=3)
        note = f"best {values[best]:.4g} at {steps[best]:,}"
    _heading(axes, name, note)
    if key == "val/success":
        axes.set_ylim(-0.03, 1.03)
    else:
        _scale(axes, values)


def _draw_rates(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Draw the highest rates, in styles that show equal ones on one another."""
    shown = sorted(curves, key=lambda key: -curves[key].peak)[:RATES]
    for place, key in enumerate(shown):
        axes.plot(
            *curves[key].thinned(),
            linewidth=1.8,
            linestyle=("-", "--", ":")[place % 3],
            label=_readable(key.removeprefix("lr/")).replace("$", r"\$"),  # not mathematics
            **curves[key].dots(),
        )
    _scale_rates(axes, [curve.peak for curve in curves.values()])
    axes.legend(fontsize=7, frameon=False, ncols=1 if len(shown) < 5 else 2)


def _scale_rates(axes: Axes, peaks: Sequence[float]) -> None:
    top = max(peaks, default=0.0)
    lowest = min((peak for peak in peaks if peak > 0), default=0.0)
    _heading(axes, "learning rate", f"peak {top:.3g}")
    if lowest and top / lowest > WIDE:
        axes.set_yscale("symlog", linthresh=lowest / 5)  # zero is a rate too
        axes.set_ylim(0, top * 1.5)
    else:
        axes.set_ylim(0, top * 1.05 or 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")


def _mark_not_finite(axes: Axes, curves: Sequence[Curve]) -> None:
    bad = np.concatenate([curve.all_steps[~curve.is_finite] for curve in curves])
    if len(bad):
        axes.axvline(bad.min(), color=BAD, linewidth=1, linestyle="--")
        axes.annotate(
            f"NaN or inf from {bad.min():,}",
            (bad.min(), 0.97),
            xycoords=("data", "axes fraction"),
            color=BAD,
            size=8,
            ha="right",
            va="top",
            rotation=90,
        )


def _heading(axes: Axes, name: str, note: str) -> None:
    axes.set_title(name, loc="left", size=10, color=INK, weight="bold", parse_math=False)
    axes.set_title(note, loc="right", size=9, color=NOTE, parse_math=False)


def _scale(axes: Axes, values: Sequence[float] | Array) -> None:
    """Make the axis logarithmic if the curve spans a wide range."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low > 0 and high / low > WIDE:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)


def _find_best(key: str) -> Callable[[Array], Any] | None:
    """Return the function that finds the best value, or None if that is unknown for `key`."""
    if any(word in key for word in ("loss", "l1", "error", "mse")):
        return np.argmin
    return np.argmax if any(word in key for word in ("success", "accuracy")) else None


def _last(values: Sequence[float] | Array) -> float:
    return float(values[-1]) if len(values) else math.nan


def _readable(key: str) -> str:
    """Return a key without underscores; a legend omits a label that begins with one."""
    return key.replace("_", " ").strip() or key
