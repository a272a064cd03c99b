"""A picture of predicted against true actions along an episode."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atlas.system.files import atomic_path

MOST_PANELS = 9
TRUE, PREDICTED = "#1f3b57", "#e07b00"

Array = NDArray[Any]


@dataclass(frozen=True)
class Episode:
    """The samples of an episode in order: actions and predictions [N, T, A], mask [N, T].

    `offsets` [T]: how long after its sample each target is, `period` how long samples are apart,
    both in `unit`.
    """

    title: str
    actions: Array
    predictions: Array
    mask: Array
    names: Sequence[str]
    offsets: Array
    period: float
    unit: str


def draw(episode: Episode, path: Path) -> None:
    """A panel for each of the actions that move most: the true course, and chunk after chunk.

    Each chunk is predicted from what was recorded at its dot, so the chunks do not follow from
    each other. The picture at `path` is replaced as a whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    chosen = _most_moved(episode)
    columns = min(3, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(4.6 * columns + 0.4, 2.5 * rows + 0.9), dpi=100, layout=layout)
    with warnings.catch_warnings(), atomic_path(path) as temporary:
        warnings.simplefilter("ignore")  # a glyph that the font lacks, an axis without extent
        figure.suptitle(episode.title, fontsize=11)
        for number, joint in enumerate(chosen):
            axes = figure.add_subplot(rows, columns, number + 1)
            _panel(axes, episode, joint)
            if number >= len(chosen) - columns:
                axes.set_xlabel(episode.unit, fontsize=8)
            if number == 0:
                axes.legend(fontsize=7, frameon=False)
        FigureCanvasAgg(figure).print_figure(temporary, format="png")


def _panel(axes: Any, episode: Episode, joint: int) -> None:
    times = np.arange(len(episode.actions)) * episode.period
    axes.plot(times + episode.offsets[0], episode.actions[:, 0, joint], color=TRUE, label="true")
    # One chunk begins where the one before it ends, so that each can be seen by itself.
    every = max(1, round((episode.offsets[-1] - episode.offsets[0]) / episode.period) + 1)
    for start in range(0, len(times), every):
        valid = episode.mask[start]
        at = times[start] + episode.offsets[valid]
        chunk = episode.predictions[start, valid, joint]
        label = "predicted, in chunks" if start == 0 else None
        axes.plot(at, chunk, color=PREDICTED, linewidth=1.2, label=label)
        axes.plot(at[:1], chunk[:1], ".", color=PREDICTED, markersize=4)
    axes.set_title(episode.names[joint], fontsize=9)
    axes.tick_params(labelsize=7)


def _most_moved(episode: Episode) -> list[int]:
    """The actions that span most of the values, in their own order."""
    first = episode.actions[:, 0]
    spans = np.nanmax(first, axis=0) - np.nanmin(first, axis=0)  # a sample left out is NaN
    return sorted(np.argsort(-spans, kind="stable")[:MOST_PANELS].tolist())
