"""A study's folder: ``report.md`` with plots, ``geometry.json``, and the numbers by problem and by pair as CSV."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from rich import box
from rich.table import Table as RichTable

from g2rl.analysis.gradient_report import GradientStudy, gradient_section, gradient_table, study_gradients
from g2rl.analysis.measures import MEASURES, SHARES
from g2rl.analysis.plots import plot_cosines, plot_kinds
from g2rl.analysis.study import Study, differences, distribution, entropy_bits, estimates, seed_values, totals
from g2rl.evaluation.scores import Estimate
from g2rl.plots import STYLE
from g2rl.report import code, markdown_table, write_sections

INTERVAL = "95 %, percentile bootstrap over problems, whole problems with all of their pairs"


def write_study(folder: Path, study: Study) -> list[RichTable]:
    """Write all that a study found, in place of an older one, and return the tables that show it."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {band.label: estimates(band, study.edges) for band in study.bands}
    with rc_context(STYLE):
        plot_cosines(study.bands, {label: band["cosine"] for label, band in found.items()}).savefig(
            folder / "cosines.png"
        )
        plot_kinds(found).savefig(folder / "kinds.png")
    gradients = [study_gradients(folder, model) for model in study.models if model.gradients]
    record = _record(study, found) | {"gradients": {one.label: one.record for one in gradients}}
    (folder / "geometry.json").write_text(json.dumps(_plain(record), indent=1) + "\n")
    _write_problems(folder / "problems.csv", study)
    rows = _rows(study, found)
    header = ("", *(band.label for band in study.bands))
    _write_report(folder / "report.md", study, markdown_table(header, rows), gradients)
    return [_table("geometry of responses", header, rows), *map(gradient_table, gradients)]


def _record(study: Study, found: Mapping[str, Mapping[str, Estimate | None]]) -> dict[str, Any]:
    first = study.bands[0]
    return {
        "settings": study.settings,
        "interval": INTERVAL,
        "length edges": study.edges,
        "models": [{"label": m.label, "path": m.path, "weights": m.weights} for m in study.models],
        "bands": [
            {
                "label": band.label,
                "models": [model.label for model in band.models],
                "measures": found[band.label],
                "seeds": seed_values(band, study.edges),
                "minus first": differences(band, first, study.edges) if band is not first else None,
                "distribution": distribution(band).tolist(),
                "distribution entropy": entropy_bits(distribution(band)),
            }
            for band in study.bands
        ],
    }


def _plain(value: Any) -> Any:
    """As JSON has it: estimates as objects of five digits, and null for what is not finite."""
    if isinstance(value, Estimate):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def _rows(study: Study, found: Mapping[str, Mapping[str, Estimate | None]]) -> list[tuple[str, ...]]:
    rows = []
    for name, text in MEASURES.items():
        cells = []
        for band in study.bands:
            values = [v for v in seed_values(band, study.edges)[name] if v is not None]
            cells.append(cell(found[band.label][name], name in SHARES, values))
        rows.append((text, *cells))
    entropies = [f"{entropy_bits(distribution(band)):.2f}" for band in study.bands]
    return [*rows, ("entropy of the distribution of cosines, bits", *entropies)]


def cell(found: Estimate | None, share: bool = False, seeds: Sequence[float] = ()) -> str:
    """A value with its interval, and from the least to the greatest of several seeds."""
    if found is None:
        return "-"

    def text(value: float) -> str:
        return f"{100 * value:.1f} %" if share else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"

    spread = f"; seeds {text(min(seeds))} to {text(max(seeds))}" if len(seeds) > 1 else ""
    return f"{text(found.value)} [{text(found.low)}, {text(found.high)}]{spread}"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> RichTable:
    table = RichTable(title=title, box=box.SIMPLE_HEAD)
    for k, name in enumerate(header):
        table.add_column(name, justify="left" if k == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _write_problems(path: Path, study: Study) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "problem", *MEASURES, "pairs"))
        for model in study.models:
            values = totals(model, study.edges)
            for p, problem in enumerate(study.problems):
                numbers = [f"{v[0, p] / v[1, p]:.4g}" if v[1, p] else "" for v in values.values()]
                writer.writerow((model.label, problem, *numbers, int(values["cosine"][1, p])))


def _write_report(path: Path, study: Study, table: str, gradients: Sequence[GradientStudy]) -> None:
    settings = [(key, code(value)) for key, value in study.settings.items()]
    low, high = study.edges
    lines = [
        "# Geometry of responses",
        _headline(study),
        table,
        f"In brackets: {INTERVAL}. Pairs are those of one problem's different responses, unless the line says otherwise. "
        "Effective dimensions are of the eigenvalues of all responses' cosines, 1 to the number of responses. Short and "
        f"long: a pair's mean length up to {low:g} tokens, and above {high:g}.",
        _differences(study),
        "![Distribution of cosines](cosines.png)\n\n![Cosines by kind of pair](kinds.png)",
        *(gradient_section(one) for one in gradients),
        f"## Settings\n\n{markdown_table(('', ''), settings)}",
    ]
    write_sections(path, lines)


def _headline(study: Study) -> str:
    said = []
    for band in study.bands:
        found = estimates(band, study.edges)
        said.append(f"{band.label}: mean cosine {cell(found['cosine'])}, negative {cell(found['negative'], True)}")
    return f"**{'; '.join(said)}.**"


def _differences(study: Study) -> str:
    """The bands against the first one, problem by problem."""
    first, *others = study.bands
    if not others:
        return ""
    rows = []
    for name, text in MEASURES.items():
        found = [differences(band, first, study.edges)[name] for band in others]
        rows.append((text, *(cell(one, name in SHARES) for one in found)))
    header = (f"more than {first.label}", *(band.label for band in others))
    note = "Problems are drawn again for both bands together; that other seeds would differ is not in the intervals."
    return f"## Differences\n\n{markdown_table(header, rows)}\n\n{note}"
