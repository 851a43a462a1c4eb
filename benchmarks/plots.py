"""Draw every file of results/: time, memory and error of all candidates; cost against one size; stages of a step.

python -m benchmarks.plots
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
from collections.abc import Callable
from itertools import cycle
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.e2e import STAGES
from benchmarks.measuring.accuracy import BOUNDS
from benchmarks.reporting.reports import FOLDER, Report, Row, label, load, timed
from benchmarks.reporting.tables import digits

COLOURS = {"ours": "#1b7f5c", "peer": "#8a8f98", "floor": "#c9a227"}
_STYLES = ("-", "--", "-.", ":")
# Parts of "update", which as a whole would count them twice.
_PARTS = [stage for stage in STAGES if stage != "update"]


def draw_cases(report: Report) -> Figure | None:
    """For each set of inputs on which features were measured: time, memory and error of every candidate."""
    cases = [rows for rows in report.cases() if rows[0]["op"] == "sequence_features" and len(timed(rows)) > 1]
    if not cases:
        return None
    height = sum(0.8 + 0.28 * len(timed(rows)) for rows in cases)
    figure, grid = plt.subplots(
        len(cases), 3, figsize=(14, 0.8 + height), squeeze=False, sharex="col", sharey="row", layout="constrained"
    )
    for axes, rows in zip(grid, cases, strict=True):
        shown = timed(rows)[::-1]
        _bars(axes[0], shown, lambda row: row.get("times_floor"), 0.3)
        _bars(axes[1], shown, lambda row: row.get("percent_of_logits"), 0.5)
        _bars(axes[2], shown, lambda row: row["errors"].get("phi_relative"), 1e-8)
        axes[1].axvline(5, color="black", linewidth=0.8, linestyle=":")
        axes[2].axvline(BOUNDS["phi_relative"], color="black", linewidth=0.8, linestyle=":")
        axes[0].axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes[0].set_title(f"{label(rows[0])}, {rows[0]['kind']}", loc="left", fontsize=10)
    names = ("time / torch.mm of the same shapes", "peak extra memory, % of fp32 logits", "Phi, worst relative error")
    for axes, name in zip(grid[-1], names, strict=True):
        axes.set_xlabel(name)
    _title(figure, "log p, entropy and Phi; dotted: goal or bound", report)
    return figure


def _bars(axes: Axes, rows: list[Row], value: Callable[[Row], float | None], left: float) -> None:
    """Bars on a logarithmic axis from `left` on; candidates without a value keep their line."""
    values = [value(row) for row in rows]
    widths = [max(v or 0.0, left) - left for v in values]
    colours = [COLOURS[row["role"]] for row in rows]
    bars = axes.barh([row["candidate"] for row in rows], widths, left=left, color=colours)
    shown = ["" if v is None else digits(v) if v > 1e-2 else f"{v:.0e}" for v in values]
    axes.bar_label(bars, shown, padding=3, fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.2)


def draw_sweep(report: Report) -> Figure:
    """Time and memory of each candidate against the size that varies."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curves: dict[str, list[Row]] = {}
    for rows in report.cases():
        for row in timed(rows) if rows[0]["op"] == report.rows[0]["op"] else ():
            curves.setdefault(row["candidate"], []).append(row)
    styles = {role: cycle(_STYLES) for role in COLOURS}
    for name, rows in curves.items():
        sizes = [row["sizes"][report.sweep] for row in rows]
        role = rows[0]["role"]
        style: dict[str, Any] = {"color": COLOURS[role], "linestyle": next(styles[role]), "marker": "o", "label": name}
        left.plot(sizes, [1e3 * row["median_s"] for row in rows], **style)
        if all(row.get("extra_bytes") for row in rows):
            right.plot(sizes, [row["extra_bytes"] / 1e6 for row in rows], **style)
    for axes, what in ((left, "ms"), (right, "peak extra memory, MB")):
        axes.set(xscale="log", yscale="log", xlabel=report.sweep, ylabel=what)
        sizes = sorted({row["sizes"][report.sweep] for rows in curves.values() for row in rows})
        axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8)
    _title(figure, f"{report.rows[0]['op']} against {report.sweep}; first point {label(report.rows[0])}", report)
    return figure


def draw_step(report: Report) -> Figure:
    """Stages of a training step, one bar a variant."""
    figure, axes = plt.subplots(figsize=(11, 3.2), layout="constrained")
    variants = report.content["step"]["seconds"]
    left = dict.fromkeys(variants, 0.0)
    for stage in _PARTS:
        widths = [statistics.median(stages[stage]) if stages.get(stage) else 0.0 for stages in variants.values()]
        axes.barh(list(variants), widths, left=list(left.values()), label=stage)
        left = {name: start + width for (name, start), width in zip(left.items(), widths, strict=True)}
    axes.set_xlabel("seconds")
    figure.legend(*axes.get_legend_handles_labels(), ncols=len(_PARTS), fontsize=8, loc="outside lower center")
    _title(figure, f"one training step, {report.content['config']['file']}", report)
    return figure


def _title(figure: Figure, text: str, report: Report) -> None:
    figure.suptitle("\n".join([text, *textwrap.wrap(report.machine, 130)]), fontsize=10)


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.plots", description=(__doc__ or "").split("\n")[0]).parse_args()
    for report in load():
        if "step" in report.content:
            figure: Figure | None = draw_step(report)
        elif report.sweep is not None and report.rows:
            figure = draw_sweep(report)
        else:
            figure = draw_cases(report)
        if figure is None:
            continue
        path = FOLDER / f"{report.name}.png"
        figure.savefig(path, dpi=100)
        plt.close(figure)
        print(path.name)


if __name__ == "__main__":
    main()
