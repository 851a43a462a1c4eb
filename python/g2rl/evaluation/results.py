"""What an evaluation shows: tables, ``results.json``, ``results.txt`` and the plot of pass@k."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from g2rl.bootstrap import Estimate
from g2rl.config import ConfigError
from g2rl.evaluation.samples import check_same
from g2rl.evaluation.scores import MODES, Scores
from g2rl.evaluation.suite import Settings
from g2rl.files import write_durably
from g2rl.plots import CYCLE, MARKERS, STYLE, end_at_ticks, figure_legend
from g2rl.progress import rich_table

# In one table.
_COMPARED = ("temperature", "top_p", "max_tokens", "system_prompt", "instruction", "limit", "seed", "problems")


def read_results(folder: Path, models: Sequence[str], suite: Sequence[Settings]) -> dict[str, Any]:
    """Return what ``results.json`` holds beside what is about to be evaluated; of no file, nothing.

    Args:
        models: labels of those that are evaluated now.
        suite: what on.

    Raises:
        ConfigError: it is damaged, or has other models' results on one of the data sets with other settings.
    """
    path = folder / "results.json"
    if not path.is_file():
        return {"settings": [], "results": []}
    try:
        found = json.loads(path.read_bytes())
        settings = {one["name"]: one for one in found["settings"]}
        earlier = [_scores(entry) for entry in found["results"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"out: expected results of g2rl eval, found damage in {path}: {error!r}; remove it"
        ) from error
    now = {one.name: asdict(one) for one in suite}
    kept = [entry for entry in earlier if entry.model not in models or entry.name not in now]
    for name in sorted({entry.name for entry in kept} & now.keys()):
        check_same(path, settings.get(name, {}), {key: now[name][key] for key in _COMPARED})
    return {"settings": [one for name, one in settings.items() if name not in now], "results": kept}


def write_results(
    folder: Path, scores: Sequence[Scores], suite: Sequence[Settings], earlier: Mapping[str, Any]
) -> list[Table]:
    """Write results beside `earlier` ones, which `read_results` has found, and return the tables that show them all."""
    scores = [*earlier["results"], *scores]
    record = {
        "judge": {"lenient": "the answer in any clear form", "strict": "the answer in a box, as the training reward"},
        "interval": "95 %, percentile bootstrap over problems; null where all problems have the same value",
        "settings": [*earlier["settings"], *map(asdict, suite)],
        "results": [asdict(entry) for entry in scores],
    }
    record = json.loads(json.dumps(record), parse_constant=lambda _: None)  # JSON has no NaN
    write_durably(folder / "results.json", [json.dumps(record, indent=2) + "\n"])
    shown = [summary(scores), details(scores)]
    text = StringIO()
    console = Console(file=text, width=160)
    for table in shown:
        console.print(table)
    write_durably(folder / "results.txt", [text.getvalue()])
    drawn = BytesIO()
    with rc_context(STYLE):
        plot_pass_at_k(scores).savefig(drawn)
    write_durably(folder / "pass_at_k.png", drawn.getvalue())
    return shown


def _scores(entry: Mapping[str, Any]) -> Scores:
    """What `asdict` made of scores, with NaN for null."""

    def estimate(ends: Mapping[str, float | None]) -> Estimate:
        return Estimate(**{name: math.nan if end is None else end for name, end in ends.items()})

    metrics = {mode: {key: estimate(one) for key, one in keys.items()} for mode, keys in entry["metrics"].items()}
    single = {name: estimate(entry[name]) for name in ("response_length", "truncated_share")}
    return Scores(**{**entry, "metrics": metrics, **single})


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f}"


def _interval(estimate: Estimate) -> str:
    ends = "-" if math.isnan(estimate.low) else f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    return f"{_percent(estimate)}\n{ends}"


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def summary(scores: Sequence[Scores]) -> Table:
    """A row a model, a column a data set: pass@1 / maj@n / pass@n in percent, as papers print them."""
    names = _unique([entry.name for entry in scores])
    sizes = {name: _unique([str(entry.samples) for entry in scores if entry.name == name]) for name in names}
    rows = []
    for model in _unique([entry.model for entry in scores]):
        cells = dict.fromkeys(names, "-")
        for entry in (e for e in scores if e.model == model):
            keys = ("pass@1", f"maj@{entry.samples}", f"pass@{entry.samples}")
            cells[entry.name] = " / ".join(_percent(entry.metrics[MODES[0]][key]) for key in keys)
        rows.append((model, *cells.values()))
    header = ("model", *(f"{name} (n = {' or '.join(found)})" for name, found in sizes.items()))
    return rich_table(f"pass@1 / maj@n / pass@n in percent, {MODES[0]} judge", header, rows)


def details(scores: Sequence[Scores]) -> Table:
    """Every data set with its models below each other: intervals, both modes of the judge, length, truncation."""
    title = "in percent, with 95 % intervals: bootstrap over problems"
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("problems x n\nmodel", overflow="fold", min_width=len("problems"))
    for head in ("pass@1", "maj@n", "pass@n"):
        table.add_column(head, justify="right", min_width=len("[100.0,"))  # narrow, an interval takes two lines
    for head in ("pass@1\nstrict", "tokens", "cut\noff"):
        table.add_column(head, justify="right", min_width=len("100.0"))
    for name in _unique([entry.name for entry in scores]):
        for entry in (e for e in scores if e.name == name):
            lenient, strict = (entry.metrics[mode] for mode in MODES)
            table.add_row(
                f"{name}  {entry.problems} x {entry.samples}\n{entry.model}",
                *(_interval(lenient[key]) for key in ("pass@1", f"maj@{entry.samples}", f"pass@{entry.samples}")),
                _percent(strict["pass@1"]),
                f"{entry.response_length.value:.0f}",
                _percent(entry.truncated_share),
            )
    return table


def plot_pass_at_k(scores: Sequence[Scores]) -> Figure:
    """A panel a data set: pass@k against k, a line a model, its interval as a band."""
    names = _unique([entry.name for entry in scores])
    columns = 2 if len(names) in (2, 4) else min(len(names), 3)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(6.5, 4.2 * columns), 0.3 + 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    models = _unique([entry.model for entry in scores])
    for axes, name in zip(panels, names, strict=False):
        for entry in (e for e in scores if e.name == name):
            place = models.index(entry.model)
            color, marker = CYCLE[place % len(CYCLE)], MARKERS[place % len(MARKERS)]
            points = {int(key[5:]): v for key, v in entry.metrics[MODES[0]].items() if key.startswith("pass@")}
            ks = sorted(points)
            axes.plot(ks, [points[k].value for k in ks], color=color, marker=marker, markersize=5, label=entry.model)
            low, high = [points[k].low for k in ks], [points[k].high for k in ks]
            axes.fill_between(ks, low, high, color=color, alpha=0.15, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        end_at_ticks(axes, 0)
        axes.set_ylim(top=min(1.03, axes.get_ylim()[1]))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(title=name, xlabel="k", ylabel="pass@k")
    drawn = [axes.get_legend_handles_labels() for axes in panels]
    handles = {label: handle for both in drawn for handle, label in zip(*both, strict=True)}
    figure_legend(figure, [handles[model] for model in models], models, loc="outside lower center")
    return figure
