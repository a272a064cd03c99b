"""`report.png`: a run's loss, validation and rates in one picture."""

from __future__ import annotations

import bisect
import math
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas.config.secrets import mask_uris
from atlas.record import journal
from atlas.record.shipping.cursor import points
from atlas.record.shipping.writer import Writer
from atlas.run.directory import Run
from atlas.system.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT_LINES = 20_000  # of training; more than a picture can show
POINTS = 4_000  # in one curve
RATES = 12  # groups in one panel
FIRST = ("val/loss", "val/success", "val/l1")
LAST_PANELS = 9
NAMES = {
    "train/loss": "training loss",
    "grad_norm": "gradient norm",
    "val/loss": "validation loss",
    "val/l1": "validation L1",
    "val/success": "validation success",
}
INK, GREY, BEST, BAD = "#1f3b57", "#9db4c8", "#c8102e", "#e07b00"

Curve = tuple[list[int], list[float]]  # steps and values, in the order of the journal


def draw_as_they_end(runs: Sequence[Run], writer: Writer) -> None:
    """Draw the report of each of a pool's `runs` when it ends, or when the pool does."""
    waiting = list(runs)
    while waiting:
        closing = writer.gone()
        for run in list(waiting):
            state = run.judge_state()
            if closing or state is None or state.is_over:
                draw(run)
                waiting.remove(run)
        if waiting:
            writer.wait(0.2)


def draw(run: Run) -> Path:
    """Draw the journal as it is now; returns the picture, which is replaced as a whole.

    An empty or a missing journal gives a picture that says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    curves = read_curves(run.journal_file)
    panels = _panels(curves)
    columns = 1 if len(panels) < 2 else 2 if len(panels) <= 4 else 3
    rows = max(1, math.ceil(len(panels) / columns))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(5.6 * columns + 0.4, 3.5 * rows + 1.1), dpi=100, layout=layout)
    with warnings.catch_warnings(), atomic_path(run.report_file) as temporary:
        warnings.simplefilter("ignore")  # a glyph that the font lacks, an axis without extent
        _title(figure, run)
        for number, keys in enumerate(panels):
            _panel(figure.add_subplot(rows, columns, number + 1), keys, curves)
        if not panels:
            figure.text(0.5, 0.45, "nothing in metrics.jsonl yet", ha="center", color=INK, size=13)
        FigureCanvasAgg(figure).print_figure(temporary, format="png")
    return run.report_file


def read_curves(path: Path) -> dict[str, Curve]:
    """`{key: (steps, values)}` of a journal; a long one keeps every n-th line of training.

    Lines with validation are all kept.
    """
    curves: dict[str, Curve] = {}
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


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The median of the `width` values around each: no lag, and a spike stays where it was."""
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


def _panels(curves: dict[str, Curve]) -> list[list[str]]:
    """Which keys share a picture, in the order they are shown."""
    rates = [key for key in curves if key.startswith("lr/")]
    shown = {"val/time_s", *FIRST}
    others = sorted(key for key in curves if key.startswith("val/") and key not in shown)
    order = [["train/loss"], ["val/loss"], rates, *([key] for key in FIRST[1:])]
    order += [["grad_norm"], *([key] for key in others)]
    return [keys for keys in order if keys and keys[0] in curves][:LAST_PANELS]


def _panel(axes: Axes, keys: list[str], curves: dict[str, Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(color="#e6ebf0", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8, color=GREY)
    axes.set_xlabel("update", size=8, color="#556")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    if keys[0].startswith("lr/"):
        _draw_rates(axes, keys, curves)
    elif keys[0].startswith("val/"):
        _draw_validation(axes, keys[0], curves[keys[0]])
    else:
        _draw_noisy(axes, keys[0], curves[keys[0]])
    _mark_not_finite(axes, [curves[key] for key in keys])


def _draw_noisy(axes: Axes, key: str, curve: Curve) -> None:
    """Every value, pale, and their median over a thirtieth of the curve."""
    steps, values = _finite(curve)
    middle = smooth(values, len(values) // 30)
    axes.plot(*_thin(steps, values), color=GREY, linewidth=0.7, alpha=0.7, **_dots(steps))
    axes.plot(*_thin(steps, middle), color=INK, linewidth=1.6)
    _heading(axes, NAMES.get(key, _plain(key)), f"now {_last(middle):.4g}")
    _scale(axes, [max(values, default=0.0), *middle])


def _draw_validation(axes: Axes, key: str, curve: Curve) -> None:
    """Every value, and the best one of a loss or of a success marked."""
    steps, values = _finite(curve)
    axes.plot(*_thin(steps, values), color=INK, linewidth=1.4, marker="o", markersize=3)
    name = NAMES.get(key) or f"validation: {_plain(key.removeprefix('val/'))}"
    note = f"now {_last(values):.4g}"
    better = _better(key)
    if better and values:
        at = values.index(better(values))
        axes.plot(steps[at], values[at], marker="*", markersize=13, color=BEST, zorder=3)
        note = f"best {values[at]:.4g} at {steps[at]:,}"
    _heading(axes, name, note)
    if key == "val/success":
        axes.set_ylim(-0.03, 1.03)
    else:
        _scale(axes, values)


def _draw_rates(axes: Axes, keys: list[str], curves: dict[str, Curve]) -> None:
    peaks = [max(values, default=0.0) for _, values in map(_finite, (curves[k] for k in keys))]
    order = sorted(range(len(keys)), key=lambda n: -peaks[n])[:RATES]
    for place, n in enumerate(order):
        steps, values = _finite(curves[keys[n]])
        style = ("-", "--", ":")[place % 3]  # equal rates lie on one another
        axes.plot(
            *_thin(steps, values),
            linewidth=1.8,
            linestyle=style,
            label=_plain(keys[n].removeprefix("lr/")).replace("$", r"\$"),  # not mathematics
            **_dots(steps),
        )
    top = max(peaks, default=0.0)
    _heading(axes, "learning rate", f"peak {top:.3g}")
    positive = [peak for peak in peaks if peak > 0]
    if positive and top / min(positive) > 30:
        axes.set_yscale("symlog", linthresh=min(positive) / 5)  # zero is a rate too
        axes.set_ylim(0, top * 1.5)
    else:
        axes.set_ylim(0, top * 1.05 or 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    axes.legend(fontsize=7, frameon=False, ncols=1 if len(order) < 5 else 2)


def _mark_not_finite(axes: Axes, curves: Iterable[Curve]) -> None:
    bad = [s for steps, values in curves for s, v in zip(steps, values, strict=True) if _bad(v)]
    if bad:
        axes.axvline(min(bad), color=BAD, linewidth=1, linestyle="--")
        axes.annotate(
            f"NaN or inf from {min(bad):,}",
            (min(bad), 0.97),
            xycoords=("data", "axes fraction"),
            color=BAD,
            size=8,
            ha="right",
            va="top",
            rotation=90,
        )


def _heading(axes: Axes, name: str, note: str) -> None:
    axes.set_title(name, loc="left", size=10, color=INK, weight="bold", parse_math=False)
    axes.set_title(note, loc="right", size=9, color="#556", parse_math=False)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the curve spans more than a factor of thirty."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low > 0 and high / low > 30:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)


def _title(figure: Figure, run: Run) -> None:
    """Name, id, state and progress; below, the overrides as typed."""
    status, overrides = run.read_status(), _overrides(run)
    head = f"{status.name or run.path.parent.name} · {run.id}"
    state = run.judge_state() or "no status"
    at = f" at {status.step:,} of {status.steps:,} updates" if status.steps is not None else ""
    lines = textwrap.wrap(mask_uris(" ".join(overrides)) or "(defaults)", 110)
    if len(lines) > 3:
        lines = [*lines[:2], lines[2][:106] + " …"]
    text = figure.suptitle(
        "\n".join([f"{head} · {state}{at}", *lines]), size=10, color=INK, ha="left", x=0.012
    )
    text.set_parse_math(False)


def _overrides(run: Run) -> list[str]:
    if not run.exists():
        return []
    head: dict[str, Any] = run.read_config().get("run") or {}
    return [str(each) for each in head.get("overrides") or []]


def _better(key: str) -> Any:
    """The function that picks the best value, None where that is not known."""
    if any(word in key for word in ("loss", "l1", "error", "mse")):
        return min
    return max if any(word in key for word in ("success", "accuracy")) else None


def _finite(curve: Curve) -> Curve:
    pairs = [(s, v) for s, v in zip(*curve, strict=True) if not _bad(v)]
    return [s for s, _ in pairs], [v for _, v in pairs]


def _thin(steps: list[int], values: list[float]) -> Curve:
    """At most POINTS of them, the last one always."""
    stride = math.ceil(len(steps) / POINTS) or 1
    if stride == 1:
        return steps, values
    return [*steps[::stride], steps[-1]], [*values[::stride], values[-1]]


def _dots(steps: list[int]) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(steps) < 3 else {}  # a line needs two


def _last(values: Sequence[float]) -> float:
    return values[-1] if values else math.nan


def _bad(value: float) -> bool:
    return not math.isfinite(value) or abs(value) > 1e300  # Agg's arithmetic overflows there


def _plain(key: str) -> str:
    """A key for a person; a legend would leave out a label that begins with `_`."""
    return key.replace("_", " ").strip() or key
