"""The plots of a run's report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator, PercentFormatter

from g2rl.history import EVALUATION, REWARD, changes, evaluation_changes
from g2rl.metrics import STAGES, metric
from g2rl.progress import duration, printable
from g2rl.run import SMOOTHED, Run, moving_average, number_of, pairs_of, periods, problem_name

# Okabe and Ito's colours, which colour-blind readers can tell apart; series differ by marker or line style as well.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)
MARKERS = "osD^vP"
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e0e0e0",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "savefig.dpi": 130,
    "text.parse_math": False,  # a label that holds "$", as paths may, is no mathematics
}
LEGEND_COLUMNS = 4
SCATTER_POINTS = 4000


def figure_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], **options: Any) -> Legend:
    """A legend above all panels, in as many columns as fit the figure, which grows by its height.

    `options` are as of `Figure.legend`.
    """
    options = {"loc": "outside upper center", **options}
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in range(max(1, min(LEGEND_COLUMNS, len(labels))), 0, -1):
        legend = figure.legend(handles, labels, ncols=columns, **options)
        extent = legend.get_window_extent(renderer)
        if extent.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)
    return legend


# --- plots: each takes a run and returns a figure, or None where the run has nothing to draw ---


def _panels(rows: int, columns: int = 1, height: float = 3.0, width: float = 8.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=rows > 1 and columns == 1)
    return figure, [axes for row in grid for axes in row]


def _line(axes: Axes, run: Run, key: str, label: str, color: str, style: str = "-") -> None:
    """A metric over steps; long series get a moving average, their raw values stay behind it."""
    steps, values = run.series(key)
    if not steps:
        return
    if len(values) < SMOOTHED:
        axes.plot(steps, values, style, color=color, label=label, marker="o", markersize=4)
        return
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    axes.plot(steps, moving_average(values), style, color=color, label=label, linewidth=2)


def _held_out(axes: Axes, run: Run, prefix: str, marker: str, style: str) -> None:
    """Held-out metrics over steps; no line joins results of different ways of evaluating."""
    by = (*EVALUATION, *REWARD) if prefix == "eval/reward" else EVALUATION
    gaps = [(step - 0.5, math.nan) for step, _ in evaluation_changes(run.history, by)]
    for color, key in zip(CYCLE[1:] * 9, run.keys(prefix), strict=False):
        if key == "eval/maj@1":
            continue  # the same as pass@1, which it would cover
        steps, values = run.series(key)
        size = 6 if len(steps) <= 15 else 3
        points = sorted([*zip(steps, values, strict=True), *gaps])
        x, y = [step for step, _ in points], [value for _, value in points]
        axes.plot(x, y, style, color=color, marker=marker, markersize=size, label=f"held-out {key[5:]}")


def _finish(axes: Axes, ylabel: str, xlabel: str = "training step") -> None:
    """Labels, whole steps on the x axis, and a legend beside the data, which it cannot hide there."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def end_at_ticks(axes: Axes, bottom: float | None = None) -> None:
    """Widen the y axis to ticks below, or to `bottom`, and above all there is, and a little more for wide markers."""
    low, high = axes.get_ylim()
    if bottom is not None:
        axes.set_ylim(bottom, high)
    ticks = axes.get_yticks()
    first = bottom if bottom is not None else max((tick for tick in ticks if tick <= low), default=low)
    last = min((tick for tick in ticks if tick >= high), default=high)
    axes.set_yticks([tick for tick in ticks if first <= tick <= last])  # by the size once drawn there may be fewer
    axes.set_ylim(first, last + 0.01 * (last - first))


def plot_learning(run: Run) -> Figure | None:
    if not run.keys("train/") and not run.keys("eval/"):
        return None
    figure, (accuracy, reward) = _panels(2)
    _line(accuracy, run, "train/accuracy", "training", BLUE)
    _held_out(accuracy, run, "eval/pass@", "o", "-")
    _held_out(accuracy, run, "eval/maj@", "s", "--")
    accuracy.set_ylim(-0.03, 1.03)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    for i, (step, _) in enumerate(changes(run.history)):
        accuracy.axvline(step - 0.5, color="black", linestyle=":", label=None if i else "other settings")
    _finish(accuracy, "correct responses")
    punished = run.setting("objective.overlong") == "punish"
    _line(reward, run, "train/reward", "base reward, with\noverlong penalty" if punished else "base reward", BLUE)
    _line(reward, run, "train/shaped_reward", "shaped reward", RED, "--")
    _held_out(reward, run, "eval/reward", "o", "-")
    end_at_ticks(reward)
    _finish(reward, "mean reward")
    accuracy.label_outer()
    return figure


def plot_behaviour(run: Run) -> Figure | None:
    if not run.series("train/entropy")[0] and not run.series("train/response_length")[0]:
        return None
    figure, (entropy, length) = _panels(2)
    _line(entropy, run, "train/entropy", "training", BLUE)
    end_at_ticks(entropy, 0)
    _finish(entropy, "token entropy [nats]")
    _line(length, run, "train/response_length", "training", BLUE)
    steps, values = run.series("eval/response_length")
    if steps:
        length.plot(steps, values, "o--", color=ORANGE, label="held-out")
    limit = run.setting("rollout.max_new_tokens", None)
    if limit:
        length.axhline(limit, color="black", linestyle=":", label="token limit")
    end_at_ticks(length, 0)
    _finish(length, "response length [tokens]")
    entropy.label_outer()
    return figure


def plot_groups(run: Run) -> Figure | None:
    """Heat maps of up to four groups: two of the first and two of the last step that has any."""
    if not run.groups:
        return None
    shown = []
    for step in sorted({run.groups[0]["step"], run.groups[-1]["step"]}):
        groups = [group for group in run.groups if group["step"] == step]
        shown += sorted(groups, key=lambda group: len(set(group["rewards"])) == 1)[:2]  # mixed rewards first
    rows = (len(shown) + 1) // 2
    figure, panels = _panels(rows, min(2, len(shown)), height=4.4, width=9.5 if len(shown) > 1 else 5.5)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes, group in zip(panels, shown, strict=False):
        # Best rewards first, so that correct and wrong responses form blocks.
        order = sorted(range(len(group["rewards"])), key=lambda i: -(group["rewards"][i] or 0.0))
        cosines = [[number_of(group["similarity"][i][j]) for j in order] for i in order]
        image = axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
        if len(order) <= 8:
            for i, row in enumerate(cosines):
                for j, value in enumerate(row):
                    ink = "white" if abs(value) > 0.6 else "black"
                    axes.text(j, i, f"{value:z.2f}", ha="center", va="center", fontsize=8, color=ink)
        size = 10 if len(order) <= 8 else 8
        rewards = [f"{number_of(group['rewards'][i]):+.3g}" for i in order]
        scores = [f"{number_of(group['scores'][i]):.2f}" for i in order]
        axes.set_yticks(range(len(order)), rewards, fontsize=size)
        axes.set_xticks(range(len(order)), scores, fontsize=size, rotation=90 if len(order) > 8 else 0)
        axes.set(ylabel="reward of the response", xlabel="its exploration score ν")
        axes.grid(False)
        axes.set_title(f"step {group['step']}, problem {printable(problem_name(group['problem']), 24)}")
    figure.colorbar(image, ax=panels, label="cosine of the responses' features", shrink=0.7)
    figure.set_layout_engine("compressed")  # square panels would leave gaps otherwise
    return figure


def plot_cosines(run: Run) -> Figure | None:
    if not pairs_of(run.groups):
        return None
    figure, (axes,) = _panels(1, height=3.6)
    bins = [i / 20 for i in range(-20, 21)]
    for (name, groups), color, style in zip(periods(run), (BLUE, RED), ("-", "--"), strict=False):
        pairs = pairs_of(groups)
        if not pairs:
            continue
        mean = sum(pairs) / len(pairs)
        weights, label = [1 / len(pairs)] * len(pairs), f"{name}\n(mean {mean:.2f})"
        axes.hist(pairs, bins, weights=weights, color=color, alpha=0.25)
        axes.hist(pairs, bins, weights=weights, color=color, linestyle=style, histtype="step", lw=1.6, label=label)
        axes.axvline(mean, color=color, linestyle=style, linewidth=1.2)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _finish(axes, "share of pairs", "cosine of two responses of a group")
    axes.set_xlim(-1, 1)
    axes.xaxis.set_major_locator(MaxNLocator(9))
    return figure


def plot_scores(run: Run) -> Figure | None:
    if not run.scored:
        return None
    figure, (axes,) = _panels(1, height=4.0)
    points = run.scored[:: -(-len(run.scored) // SCATTER_POINTS)]
    alpha = max(0.15, min(0.8, 200 / len(points)))
    for correct, color, marker, label in ((True, BLUE, "o", "correct"), (False, RED, "x", "wrong")):
        x = [score for score, _, right in points if right is correct]
        y = [shaped for _, shaped, right in points if right is correct]
        axes.scatter(x, y, s=22, color=color, marker=marker, alpha=alpha)
        axes.scatter([], [], color=color, marker=marker, label=label)  # an opaque mark for the legend
    _finish(axes, "shaped reward", "exploration score ν")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    return figure


def plot_diagnostics(run: Run) -> Figure | None:
    if not run.keys("geometry/"):
        return None
    figure, (cosine, score, norm, groups) = _panels(2, 2, height=3.4, width=10)
    _line(cosine, run, "geometry/mean_cosine", "mean cosine", BLUE)
    _line(cosine, run, "geometry/negative_share", "share of negative pairs", RED, "--")
    end_at_ticks(cosine)
    _finish(cosine, "cosine, share")
    for axes, stem, label in ((score, "score", "exploration score ν"), (norm, "feature_norm", "norm of Φ")):
        _line(axes, run, f"geometry/{stem}_mean", "mean", BLUE)
        (steps, least), (same, most) = [run.series(f"geometry/{stem}_{end}") for end in ("min", "max")]
        if steps and steps == same:
            edge = 4 if len(steps) == 1 else 0  # a band one step wide has only its edge to show
            axes.fill_between(steps, least, most, color=SKY, alpha=0.3, linewidth=edge, label="least to greatest")
        _finish(axes, label)
    score.set_ylim(-0.03, 1.03)
    end_at_ticks(norm, 0)
    _line(groups, run, "groups/zero_variance_share", "equal rewards", BLUE)
    _line(groups, run, "groups/degenerate_share", "degenerate scores", RED, "--")
    groups.set_ylim(-0.03, 1.03)
    _finish(groups, "share of groups")
    for axes in (cosine, score, norm, groups):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def plot_time(run: Run) -> Figure | None:
    bars, whole = [], 0.0
    for key, indent in {**STAGES, "time/eval": "", "time/checkpoint": ""}.items():
        total, title = run.total(key), metric(key).title
        if total > 0 and key != "time/step":
            bars.append((f"of it: {title.lower()}", total, SKY) if indent else (title, total, BLUE))
            whole += 0.0 if indent else total
    if not bars:
        return None
    unit, seconds = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if whole >= 3 * s or u == "s")
    figure, (axes,) = _panels(1, height=0.8 + 0.42 * len(bars))
    names, totals, colors = zip(*bars, strict=True)
    drawn = axes.barh(range(len(bars)), [total / seconds for total in totals], color=colors)
    axes.bar_label(drawn, [f"{duration(t) if t >= 60 else f'{t:.2g} s'}, {t / whole:.1%}" for t in totals], padding=4)
    axes.set_yticks(range(len(bars)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.25)
    axes.set_xlabel(f"time over the run [{unit}]")
    return figure


PLOTS = (
    ("learning", "Accuracy and reward", plot_learning, "From 20 steps on: single steps faint, moving averages strong."),
    ("behaviour", "Entropy and response length", plot_behaviour, "Entropy near 0 means that sampling repeats itself."),
    ("diagnostics", "Geometry over steps", plot_diagnostics, "A norm of 0 belongs to a response without tokens."),
    ("groups", "Groups", plot_groups, "Cosines of the responses' gradient features; responses sorted by reward."),
    ("cosines", "Pairwise cosines", plot_cosines, "Lower and negative cosines: responses pull the model apart."),
    ("scores", "Exploration score and shaped reward", plot_scores, "Shaping uses ν relative to its group."),
    ("time", "Time per stage", plot_time, "Summed over the logged steps; the last checkpoint is saved after them."),
)
"""File stem, heading, drawing function and caption of every plot, in the report's order."""
