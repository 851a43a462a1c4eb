"""Curves of several bands in one plot: a line for the mean over seeds, a band from the least to the greatest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from g2rl.comparison.bands import Band, Curve
from g2rl.metrics import metric
from g2rl.plots import CYCLE, figure_legend

# Line styles and markers beside colours, for print and for colour-blind readers; the lengths have no common divisor, so
# that no two of many bands look the same.
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MARKS = 8
"""Markers on a long line."""

PLOTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("learning", "Accuracy and reward", ("eval/reward", "train/accuracy", "train/reward")),
    ("behaviour", "Entropy, length, gradient", ("train/entropy", "train/response_length", "train/grad_norm")),
    ("geometry", "Geometry", ("geometry/mean_cosine", "geometry/negative_share", "groups/zero_variance_share")),
)
"""File stem, heading and metrics of every plot; the first one begins with the held-out results."""


def plot_bands(bands: Sequence[Band], keys: Sequence[str]) -> Figure | None:
    """A panel for each metric that a band has; None where none has any."""
    curves = {key: [band.curve(key) for band in bands] for key in keys}
    drawn = [key for key in keys if any(curves[key])]
    if not drawn:
        return None
    figure = Figure(figsize=(8.0, 2.7 * len(drawn) + 0.4), layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False, sharex=True)[:, 0]
    for axes, key in zip(panels, drawn, strict=True):
        for i, curve in enumerate(curves[key]):
            if curve is not None:
                draw_curve(axes, curve, i, len(bands))
        label_axes(axes, key)
        axes.label_outer()
    handles = [draw_curve(panels[0], Curve([], [[]]), i, len(bands)) for i in range(len(bands))]
    names = [f"{band.label} ({len(band.runs)} seed{'s' * (len(band.runs) > 1)})" for band in bands]
    figure_legend(figure, handles, names, handlelength=4)
    return figure


def draw_curve(axes: Axes, curve: Curve, i: int, bands: int) -> Line2D:
    """Draw one band's curve, and return what stands for it in the legend."""
    color, style, marker = CYCLE[i % len(CYCLE)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
    every = max(1, len(curve.steps) // MARKS)
    offset = i * every // bands  # markers of bands that lie on each other stay apart
    (line,) = axes.plot(curve.steps, curve.mean, color=color, linestyle=style, marker=marker, markevery=(offset, every))
    if len(curve.values) > 1 and len(curve.steps) > 1:
        axes.fill_between(curve.steps, curve.least, curve.greatest, color=color, alpha=0.2, linewidth=0)
        for edge in (curve.least, curve.greatest):
            axes.plot(curve.steps, edge, color=color, linestyle=style, linewidth=0.6)
    elif len(curve.values) > 1 and curve.steps:
        axes.vlines(curve.steps, curve.least, curve.greatest, color=color, linewidth=2)
    return line


def label_axes(axes: Axes, key: str) -> None:
    """Name the axes of a metric's panel, with units."""
    item = metric(key)
    title = f"held-out {key[5:]}" if "@" in key else item.title[0].lower() + item.title[1:]
    title = f"training {title}" if key in ("train/accuracy", "train/reward") else title
    axes.set_ylabel(title if item.unit in ("", "share", "reward") else f"{title} [{item.unit}]")
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if item.unit == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        low, high = axes.get_ylim()
        axes.set_ylim(max(0.0, low), min(1.0, high))
