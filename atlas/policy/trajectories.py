"""A picture of predicted and true actions along an episode."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atlas.data.arrays import Array
from atlas.system.files import atomic_path

MOST_PANELS = 9
TRUE, PREDICTED = "#1f3b57", "#e07b00"


@dataclass(frozen=True)
class Trajectory:
    """The samples of an episode in order: actions and predictions [N, T, A], mask [N, T].

    `offsets` [T]: the time from a sample to each action of its chunk; `period`: the time between
    successive samples; both in `unit`.
    """

    title: str
    actions: Array
    predictions: Array
    mask: Array
    names: Sequence[str]
    offsets: Array
    period: float
    unit: str


def draw(trajectory: Trajectory, path: Path) -> None:
    """Draw the true values and the predicted chunks of the actions that move most, a panel each.

    Each chunk is predicted from the recorded sample at its dot, so it does not depend on the chunk
    before it. The picture at `path` is replaced atomically.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    chosen = _most_moved(trajectory)
    columns = min(3, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(4.6 * columns + 0.4, 2.5 * rows + 0.9), dpi=100, layout=layout)
    with warnings.catch_warnings(), atomic_path(path) as temporary:
        warnings.simplefilter("ignore")  # about a missing glyph, or an axis without extent
        figure.suptitle(trajectory.title, fontsize=11)
        for number, joint in enumerate(chosen):
            axes = figure.add_subplot(rows, columns, number + 1)
            _panel(axes, trajectory, joint)
            if number >= len(chosen) - columns:
                axes.set_xlabel(trajectory.unit, fontsize=8)
            if number == 0:
                axes.legend(fontsize=7, frameon=False)
        FigureCanvasAgg(figure).print_figure(temporary, format="png")


def _panel(axes: Any, trajectory: Trajectory, joint: int) -> None:
    offsets, actions = trajectory.offsets, trajectory.actions
    times = np.arange(len(actions)) * trajectory.period
    axes.plot(times + offsets[0], actions[:, 0, joint], color=TRUE, label="true")
    # A chunk starts where the one before it ends, so that they do not overlap.
    every = max(1, round((offsets[-1] - offsets[0]) / trajectory.period) + 1)
    for start in range(0, len(times), every):
        valid = trajectory.mask[start]
        at = times[start] + offsets[valid]
        chunk = trajectory.predictions[start, valid, joint]
        label = "predicted, in chunks" if start == 0 else None
        axes.plot(at, chunk, color=PREDICTED, linewidth=1.2, label=label)
        axes.plot(at[:1], chunk[:1], ".", color=PREDICTED, markersize=4)
    axes.set_title(trajectory.names[joint], fontsize=9)
    axes.tick_params(labelsize=7)


def _most_moved(trajectory: Trajectory) -> list[int]:
    """Return the indices of the actions with the largest ranges, ascending."""
    first = trajectory.actions[:, 0]
    spans = np.nanmax(first, axis=0) - np.nanmin(first, axis=0)  # samples left out are NaN
    return sorted(np.argsort(-spans, kind="stable")[:MOST_PANELS].tolist())
