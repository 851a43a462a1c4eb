"""A study's folder: ``report.md`` with plots, ``geometry.json``, and the numbers by problem and by pair as CSV."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from rich.table import Table as RichTable

from g2rl.analysis.bands import Measured, entropy_bits
from g2rl.analysis.gradient_report import GradientStudy, gradient_section, gradient_table, study_gradients
from g2rl.analysis.measures import KINDS, MEASURES, SHARES
from g2rl.analysis.plots import plot_cosines, plot_kinds
from g2rl.bootstrap import Estimate
from g2rl.plots import STYLE
from g2rl.progress import rich_table
from g2rl.report import code, markdown_table, write_csv, write_sections

INTERVAL = "95 %, hierarchical bootstrap: a band's seeds, and problems, each with all of its pairs"
Found = Mapping[str, Mapping[str, Estimate | None]]
"""Estimates by band's label and measure."""


def write_results(folder: Path, measured: Measured) -> list[RichTable]:
    """Write all that was measured, in place of what was there, and return the tables that show it."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {band.label: measured.estimates(band) for band in measured.bands}
    with rc_context(STYLE):
        means = {label: estimates["cosine"] for label, estimates in found.items()}
        plot_cosines(measured.bands, means).savefig(folder / "cosines.png")
        plot_kinds(found).savefig(folder / "kinds.png")
    gradients = [study_gradients(folder, model) for model in measured.models if model.gradients]
    record = _record(measured, found) | {"gradients": {one.label: one.record for one in gradients}}
    (folder / "geometry.json").write_text(json.dumps(_plain(record), indent=1) + "\n")
    _write_problems(folder / "problems.csv", measured)
    header, rows = ("", *found), _rows(measured, found)
    _write_report(folder / "report.md", measured, [_headline(found), markdown_table(header, rows)], gradients)
    table = rich_table("geometry of responses, with 95 % intervals", header, rows)
    return [table, *map(gradient_table, gradients)]


def _record(measured: Measured, found: Found) -> dict[str, Any]:
    return {
        "settings": measured.settings,
        "interval": INTERVAL,
        "length edges": measured.edges,
        "bands": [
            {
                "label": band.label,
                "models": [{"label": m.label, "path": m.path, "weights": m.weights} for m in band.models],
                "measures": found[band.label],
                "seeds": measured.seeds(band),
                "minus first": measured.differences(band) if band is not measured.bands[0] else None,
                "distribution": band.distribution().tolist(),
                "distribution entropy": entropy_bits(band.distribution()),
            }
            for band in measured.bands
        ],
    }


def _plain(value: Any) -> Any:
    """As JSON has it: estimates as objects, numbers of five digits, and null for what is not finite."""
    if isinstance(value, Estimate):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def _rows(measured: Measured, found: Found) -> list[tuple[str, ...]]:
    """A line for each measure, a column for each band."""
    seeds = {band.label: measured.seeds(band) for band in measured.bands}
    rows = []
    for name, text in MEASURES.items():
        cells = []
        for label, estimates in found.items():
            values = [value for value in seeds[label][name] if value is not None]
            cells.append(cell(estimates[name], name in SHARES, values))
        rows.append((text, *cells))
    for text, name in (("pairs", "cosine"), *((f"pairs, {kind}", f"{kind} cosine") for kind in KINDS)):
        rows.append((text, *(str(measured.count(band, name)) for band in measured.bands)))
    entropies = [f"{entropy_bits(band.distribution()):.2f}" for band in measured.bands]
    return [*rows, ("entropy of the distribution of cosines, bits", *entropies)]


def cell(found: Estimate | None, share: bool = False, seeds: Sequence[float] = ()) -> str:
    """A value with its interval, if it has one, and from the least to the greatest of several seeds."""
    if found is None:
        return "-"

    def text(value: float) -> str:
        return f"{100 * value:.1f} %" if share else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"

    spread = f"; seeds {text(min(seeds))} to {text(max(seeds))}" if len(seeds) > 1 else ""
    interval = "" if math.isnan(found.low) else f" [{text(found.low)}, {text(found.high)}]"
    return f"{text(found.value)}{interval}{spread}"


def _write_problems(path: Path, measured: Measured) -> None:
    rows = []
    for band in measured.bands:
        found = band.sums(measured.edges)
        for i, model in enumerate(band.models):
            for p, problem in enumerate(measured.problems):
                both = [(totals[i, p], counts[i, p]) for totals, counts in found.values()]
                numbers = [f"{total / count:.4g}" if count else "" for total, count in both]
                rows.append((model.label, problem, *numbers, int(found["cosine"][1][i, p])))
    write_csv(path, ("model", "problem", *MEASURES, "pairs"), rows)


def _write_report(path: Path, measured: Measured, summary: list[str], gradients: Sequence[GradientStudy]) -> None:
    of_bands = [(f"models of {one.label}", ", ".join(code(m.path) for m in one.models)) for one in measured.bands]
    settings = [*of_bands, *((key, code(value)) for key, value in measured.settings.items())]
    low, high = measured.edges
    sections = [
        "# Geometry of responses",
        *summary,
        f"In brackets: {INTERVAL}. Pairs are those of one problem's different responses, unless the line says "
        "otherwise. Effective dimensions are of the eigenvalues of all responses' cosines, 1 to the number of "
        f"responses. Short and long: a pair's mean length up to {low:g} tokens, and above {high:g}.",
        "![Distribution of cosines](cosines.png)\n\n![Cosines by kind of pair](kinds.png)",
        _differences(measured),
        *(gradient_section(one) for one in gradients),
        f"## Settings\n\n{markdown_table(('', ''), settings)}",
    ]
    write_sections(path, sections)


def _headline(found: Found) -> str:
    said = [
        f"{label}: mean cosine {cell(one['cosine'])}, negative {cell(one['negative'], True)}"
        for label, one in found.items()
    ]
    return f"**{'; '.join(said)}.**"


def _differences(measured: Measured) -> str:
    """The bands against the first one, problem by problem."""
    first, *others = measured.bands
    if not others:
        return ""
    found = [measured.differences(band) for band in others]
    rows = [(text, *(cell(one[name], name in SHARES) for one in found)) for name, text in MEASURES.items()]
    table = markdown_table((f"more than {first.label}", *(band.label for band in others)), rows)
    return f"## Differences\n\n{table}\n\nProblems are drawn again for both bands together."
