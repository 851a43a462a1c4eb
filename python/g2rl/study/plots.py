"""A study's plots: curves with seeds as bands, and differences to the baseline with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from g2rl.comparison.bands import Band, Curve
from g2rl.comparison.plots import draw_curve, label_axes, plot_bands
from g2rl.plots import CYCLE, STYLE, figure_legend
from g2rl.study.results import Results

KEYS = ("eval/reward", "train/response_length", "train/entropy", "geometry/mean_cosine")
"""What a task's own plot shows below held-out pass@k."""


def bands(results: Results, task: str) -> list[Band]:
    """A band for each method with a finished run, labelled as the study does."""
    found = ((method, results.of(task, method)) for method in results.study.methods)
    return [Band(method, [f.log for f in of], {}) for method, of in found if of]


def overview(results: Results) -> Figure:
    """Held-out pass@1 over training steps, a panel a task."""
    study = results.study
    columns = min(2, len(study.tasks))
    rows = -(-len(study.tasks) // columns)
    size = (max(8.0, 5.0 * columns + 0.5), 3.0 * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(study.tasks) :]:
        axes.set_visible(False)
    for axes, task in zip(panels, study.tasks, strict=False):
        by_label = {band.label: band for band in bands(results, task)}
        for i, method in enumerate(study.methods):
            curve = by_label[method].curve("eval/pass@1") if method in by_label else None
            if curve is not None:
                draw_curve(axes, curve, i, len(study.methods))
        label_axes(axes, "eval/pass@1")
        axes.set_title(task)
    handles = [draw_curve(panels[0], Curve([], [[]]), i, len(study.methods)) for i in range(len(study.methods))]
    figure_legend(figure, handles, study.methods, handlelength=4)
    return figure


def plot_differences(content: dict[str, Any], metric: str) -> Figure | None:
    """Each method's difference to the baseline on each task and on all, with its interval; None without any."""
    groups = {
        label: {method: of["differences"].get(metric) for method, of in task["methods"].items()}
        for label, task in content["tasks"].items()
    }
    if len(groups) > 1:
        groups["all tasks"] = {method: of.get(metric) for method, of in content["all_tasks"].items()}
    methods = list(next(iter(content["tasks"].values()))["methods"])
    lines = [(group, m, found) for group, of in groups.items() for m in methods if (found := of.get(m))]
    if not lines:
        return None
    figure = Figure(figsize=(8.0, 0.28 * (len(lines) + len(groups)) + 1.0), layout="constrained")
    axes = figure.subplots()
    place, ticks, names = 0.0, [], []
    for i, (group, method, found) in enumerate(lines):
        place += 0.6 if i and lines[i - 1][0] != group else 0.0
        color = CYCLE[methods.index(method) % len(CYCLE)]
        if found["low"] is not None:
            axes.plot([found["low"], found["high"]], [place, place], color=color, linewidth=2)
        axes.plot(found["value"], place, "o", color=color)
        ticks.append(place)
        names.append(f"{group}: {method}")
        place += 1
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(ticks, names)
    axes.set_ylim(place - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.set_xlabel(f"held-out {metric} less that of {content['baseline']} [percentage points]")
    return figure


def draw(results: Results, content: dict[str, Any], folder: Path) -> dict[str, str]:
    """Write the plots that there is data for; returns their files by what they show, tasks by their labels."""
    with rc_context(STYLE):
        figures: dict[str, tuple[str, Figure | None]] = {"overview": ("overview.png", overview(results))}
        for metric in results.headlines(results.study.tasks[0]):
            name = metric.replace("@", "")
            figures[metric] = (f"differences-{name}.png", plot_differences(content, metric))
        for task in results.study.tasks:
            keys = [*(f"eval/{metric}" for metric in results.headlines(task)), *KEYS]
            name = _free_name(task.replace(" ", "-"), [name for name, _ in figures.values()])
            figures[f"task {task}"] = (name, plot_bands(bands(results, task), keys))
        drawn = {}
        for what, (name, figure) in figures.items():
            if figure is not None:
                _save(figure, folder / name)
                drawn[what] = name
    return drawn


def _free_name(stem: str, taken: Sequence[str]) -> str:
    """A file of its own for a task, which may be labelled like another plot, or like a task but for space or case."""
    folded = {name.casefold() for name in taken}
    names = (f"{stem}{f'-{number}' if number > 1 else ''}.png" for number in count(1))
    return next(name for name in names if name.casefold() not in folded)


def _save(figure: Figure, path: Path) -> None:
    """With 256 colours, a third of the bytes; they are chosen far apart, so that a few points keep theirs."""
    figure.savefig(path, dpi=90)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    small.save(path, optimize=True)
