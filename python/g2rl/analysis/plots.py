"""The plots of a study: cosines of features, by kind and length of a pair, and what they say of true gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from g2rl.analysis.agreement import MAIN, Table
from g2rl.analysis.bands import BINS, Band
from g2rl.analysis.gradients import ALL
from g2rl.analysis.measures import KINDS, LENGTHS
from g2rl.analysis.representations import BASELINES
from g2rl.bootstrap import Estimate
from g2rl.plots import BLUE, CYCLE, GREEN, MARKERS, ORANGE, RED, figure_legend

_LINES = ("-", "--", "-.", ":")


def plot_cosines(bands: Sequence[Band], means: Mapping[str, Estimate | None]) -> Figure:
    """The share of pairs by their cosine of Phi, a line a band, its mean as a tick."""
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    for k, band in enumerate(bands):
        counts = band.distribution()
        mean = means[band.label]
        label = f"{band.label}, mean {mean.value:.3f}" if mean else f"{band.label}, no pair"
        color, line = CYCLE[k % len(CYCLE)], _LINES[k % len(_LINES)]
        axes.stairs(counts / max(1, counts.sum()), BINS, label=label, linewidth=2, color=color, linestyle=line)
    axes.set(xlabel="cosine of two different responses' Φ", ylabel="share of pairs", xlim=(-1, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="best")
    return figure


def plot_kinds(estimates: Mapping[str, Mapping[str, Estimate | None]]) -> Figure:
    """Mean cosine by correctness and by length of a pair, with intervals; `estimates` by band."""
    figure = Figure(figsize=(9.5, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, names, title in ((left, KINDS, "answers"), (right, LENGTHS, "length of the responses")):
        for k, (label, found) in enumerate(estimates.items()):
            offset = (k - (len(estimates) - 1) / 2) * 0.12
            _points(axes, [found[f"{name} cosine"] for name in names], offset, k, label)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_xlabel(title)
        axes.axhline(0, color="black", linewidth=0.8)
    left.set_ylabel("mean cosine of Φ")
    handles, labels = left.get_legend_handles_labels()
    figure_legend(figure, handles, labels)
    return figure


def _points(axes: Axes, found: Sequence[Estimate | None], offset: float, k: int, label: str) -> None:
    known = [(x + offset, e) for x, e in enumerate(found) if e is not None]
    x, y = [x for x, _ in known], [e.value for _, e in known]
    errors = [[e.value - e.low for _, e in known], [e.high - e.value for _, e in known]]
    color, marker = CYCLE[k % len(CYCLE)], MARKERS[k % len(MARKERS)]
    axes.errorbar(x, y, np.maximum(errors, 0), fmt=marker, color=color, capsize=3, label=label)


def plot_pairs(pairs: Table) -> Figure:
    """The whole gradient's cosine against that of Phi: all pairs, and relative to their problem's mean."""
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    x, y = pairs["phi"], pairs[f"gradient {ALL}"]
    centred = [_centred(values, pairs["problem"]) for values in (x, y)]
    for axes, (a, b), title in zip(
        figure.subplots(1, 2), ((x, y), centred), ("all pairs", "relative to the problem's mean"), strict=True
    ):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.plot([a.min(), a.max()], [a.min(), a.max()], color=RED, linestyle="--", linewidth=1, label="equal")
        axes.scatter(a, b, s=12, color=BLUE, alpha=0.5, label="pair")
        if np.ptp(a) > 0:
            ends = np.array([a.min(), a.max()])
            axes.plot(ends, np.polyval(np.polyfit(a, b, 1), ends), color=ORANGE, linewidth=2, label="least squares")
        axes.set(xlabel="cosine of Φ", ylabel="cosine of the whole model's gradients", title=title)
        axes.legend(loc="best")
    return figure


def _centred(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    means = {group: values[groups == group].mean() for group in np.unique(groups)}
    return values - np.array([means[group] for group in groups])


def plot_predictors(found: Mapping[str, Mapping[str, Estimate | None]]) -> Figure:
    """What correlates with the whole gradient's cosine, and how much, best first."""
    known = [(name, ways[MAIN]) for name, ways in found.items()]
    rows = sorted(((name, e) for name, e in known if e is not None), key=lambda row: row[1].value)
    figure = Figure(figsize=(8.0, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (name, e) in enumerate(rows):
        color, marker = (BLUE, "o") if name == "phi" else (ORANGE, "s") if name in BASELINES else (GREEN, "D")
        errors = [[max(0.0, e.value - e.low)], [max(0.0, e.high - e.value)]]
        axes.errorbar(e.value, y, xerr=errors, fmt=marker, color=color, capsize=3)
    axes.set_yticks(range(len(rows)), [name.replace("phi", "Φ") for name, _ in rows])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("correlation with the gradients' cosine, inside problems")
    return figure


def plot_layers(found: Mapping[str, Mapping[str, Estimate | None]], shares: Mapping[str, float]) -> Figure | None:
    """How much cos(Phi) says of each layer's gradient, and which part of |g|^2 each has; None without layers."""
    layers = sorted(int(part[6:]) for part in found if part.startswith("layer "))
    if not layers:
        return None
    figure = Figure(figsize=(8.0, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    known: list[Any] = [(layer, found[f"layer {layer}"][MAIN]) for layer in layers]
    known = [(layer, e) for layer, e in known if e is not None]
    x = [layer for layer, _ in known]
    above.plot(x, [e.value for _, e in known], color=BLUE, marker="o", markersize=4, label="layer")
    above.fill_between(x, [e.low for _, e in known], [e.high for _, e in known], color=BLUE, alpha=0.2, linewidth=0)
    others = [part for part in ("embedding and head", "head", "embedding", ALL) if found.get(part, {}).get(MAIN)]
    for k, part in enumerate(others):
        e = found[part][MAIN]
        assert e is not None
        label = "whole model" if part == ALL else part
        above.axhline(e.value, color=CYCLE[k + 1], linestyle=_LINES[k % 4], label=label)
    above.axhline(0, color="black", linewidth=0.8)
    above.set_ylabel("correlation of cos Φ with\nthe gradients' cosine")
    above.legend(loc="best")
    below.bar(layers, [shares[f"layer {layer}"] for layer in layers], color=BLUE)
    below.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set(xlabel="layer, from the input to the head", ylabel="share of |g|²")
    return figure
