"""What a study found of true gradients, as numbers, tables, plots and sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from rich.table import Table as RichTable

from g2rl.analysis.agreement import MAIN, WAYS, agreement, norm_shares, pair_table, response_table, slope
from g2rl.analysis.bands import Model
from g2rl.analysis.gradients import ALL
from g2rl.analysis.plots import plot_layers, plot_pairs, plot_predictors
from g2rl.bootstrap import Estimate
from g2rl.plots import STYLE
from g2rl.progress import rich_table
from g2rl.report import markdown_table, write_csv


@dataclass(frozen=True)
class GradientStudy:
    """What was found of one model's gradients.

    Attributes:
        label: of the model.
        record: all of it, for JSON.
        plots: file stems that were drawn.
    """

    label: str
    record: dict[str, Any]
    plots: list[str]


def study_gradients(folder: Path, model: Model) -> GradientStudy:
    """Correlate a model's gradients with all predictors; writes ``LABEL-pairs.csv``, ``-responses.csv`` and plots."""
    pairs, responses = pair_table(model.gradients), response_table(model.gradients)
    for name, table in (("pairs", pairs), ("responses", responses)):
        rows = ([f"{value:.4g}" for value in row] for row in zip(*table.values(), strict=True))
        write_csv(folder / f"{model.label}-{name}.csv", table, rows)
    found, shares = agreement(pairs, responses), norm_shares(model.gradients)
    drawn = []
    with rc_context(STYLE):
        figures = {
            "pairs": plot_pairs(pairs),
            "predictors": plot_predictors(found["predictors"]),
            "layers": plot_layers(found["parts"], shares),
        }
        for name, figure in figures.items():
            if figure is not None:
                figure.savefig(folder / f"{model.label}-{name}.png")
                drawn.append(f"{model.label}-{name}")
    counts = {
        "problems": len(model.gradients),
        "responses": len(responses["problem"]),
        "pairs": len(pairs["problem"]),
    }
    return GradientStudy(model.label, {**counts, **found, "line": slope(pairs), "norm shares": shares}, drawn)


def cell(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.value:.2f}" + ("" if math.isnan(found.low) else f" [{found.low:.2f}, {found.high:.2f}]")


def _predictor_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, ways in record["predictors"].items():
        scores = cell(record["scores"].get(name))
        rows.append((name.replace("phi", "Φ"), *(cell(ways[way]) for way in WAYS), scores))
    return rows


_HEADER = ("cosine by", *WAYS, "scores ν, Spearman inside")


def gradient_table(found: GradientStudy) -> RichTable:
    """The predictors of one model's gradients, for the terminal."""
    title = f"{found.label}: correlation with the cosine of true gradients"
    return rich_table(title, _HEADER, _predictor_rows(found.record))


def gradient_section(found: GradientStudy) -> str:
    """One model's part of the report."""
    record, line = found.record, found.record["line"]
    shares, parts = record["norm shares"], record["parts"]
    names = [ALL, "embedding and head", "head", "embedding", "all layers", "all attention", "all mlp", "other"]
    rows = [
        (part, f"{100 * shares[part]:.1f} %", *(cell(one) for one in parts[part].values()))
        for part in names
        if part in parts
    ]
    products = [
        (f"{'averaged' if over == 'mean' else 'summed'} over tokens", *(cell(ways[way]) for way in WAYS))
        for over, ways in record["products"].items()
    ]
    return "\n\n".join(
        [
            f"## True gradients: {found.label}",
            "**Inside problems, the cosine of Φ correlates with the cosine of the whole model's gradients by "
            f"{cell(record['predictors']['phi'][MAIN])}** ({record['pairs']} pairs of {record['responses']} responses "
            f"to {record['problems']} problems).",
            markdown_table(_HEADER, _predictor_rows(record)),
            "Within: every problem apart, which is all that G2RL compares; pooled: all pairs alike. The last column: "
            "do exploration scores (eq. 11) rank a problem's responses as scores from gradients do?",
            f"All pairs: cos g = {line['intercept']:.3f} + {line['slope']:.2f} cos Φ; mean cosine "
            f"{line['mean phi']:.3f} of Φ and {line['mean gradient']:.3f} of gradients; negative "
            f"{100 * line['negative phi']:.1f} % and {100 * line['negative gradient']:.1f} %; the same sign in "
            f"{100 * line['same sign']:.1f} %.",
            markdown_table(("part of the model", "of |g|²", "pearson within", "spearman within"), rows),
            "Inner products in place of cosines, log p and Φ of a response:",
            markdown_table(("", *WAYS), products),
            *(f"![{name}]({name}.png)" for name in found.plots),
        ]
    )
