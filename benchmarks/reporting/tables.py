"""How numbers are shown: tables on a terminal, and the words and digits that README and plots share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from rich.markup import escape
from rich.table import Table

from benchmarks.cases.registry import KINDS, Op
from benchmarks.measuring.accuracy import BOUNDS
from benchmarks.reporting.reports import Row, times_out

# Column heads of errors; what is not named here is in the JSON alone.
ERRORS = {
    "phi_relative": "Phi rel",
    "phi_cosine": "1 - cos",
    "logp_absolute": "logp abs",
    "logp_relative": "logp rel",
    "entropy_absolute": "entropy",
    "hidden_relative": "dH rel",
    "hidden_of_bound": "dH/bound",
    "weight_relative": "dW rel",
    "weight_of_bound": "dW/bound",
    "advantages_absolute": "A",
    "scores_absolute": "nu",
    "similarity_absolute": "cosine",
}


def case_table(op: Op, label: str, kind: str, rows: list[Row]) -> Table:
    """One case: a row for each candidate that was measured, and below it why the others were not."""
    table = Table(title=f"\n{op.name} ({op.summary}), {label}; {KINDS.get(kind, kind)}", title_justify="left")
    heads, *lines = case_cells(op, rows, lambda text, style: f"[{style}]{text}[/]")
    for head in heads:
        table.add_column(head, justify="left" if head in (heads[0], heads[-1]) else "right", no_wrap=True)
    for cells in lines:
        table.add_row(*cells)
    reasons = not_timed(rows)
    table.caption = escape(f"not timed: {reasons}") if reasons else None
    table.caption_justify = "left"
    return table


def case_cells(op: Op, rows: list[Row], mark: Callable[[str, str], str] = lambda text, style: text) -> list[list[str]]:
    """Heads of a case's columns, and the cells of each candidate that could take part.

    Args:
        mark: gives a text its style, where there are styles.
    """
    measures = [measure for measure in ERRORS if any(measure in row.get("errors", {}) for row in rows)]
    columns: dict[str, Callable[[Row], str]] = {
        "candidate": lambda row: row["candidate"],
        "ms": lambda row: milliseconds(row.get("median_s")),
        "± IQR": lambda row: milliseconds(row.get("spread_s")),
    }
    if op.products:
        columns["x mm"] = lambda row: digits(row.get("times_floor"))
        columns["x out="] = lambda row: digits(times_out(row, rows))
    else:
        columns["x eager"] = lambda row: digits(row.get("times_eager"))
    columns |= {
        "GFLOP/s": lambda row: digits(row.get("gflops")),
        "% best": lambda row: digits(row.get("percent_of_best")),
        "extra MB": lambda row: megabytes(row.get("extra_bytes")),
        "% fp32 logits": lambda row: digits(row.get("percent_of_logits")),
    }
    if any(row.get("launch_s") is not None for row in rows):
        columns["launch ms"] = lambda row: milliseconds(row.get("launch_s"))
    if any("launches" in row for row in rows):
        columns["launches"] = lambda row: str(row.get("launches", ""))
    columns |= {ERRORS[measure]: partial(_error, measure, mark) for measure in measures}
    columns["bounds"] = partial(_verdict, mark)
    shown = [row for row in rows if row["status"] != "unavailable"]
    return [list(columns), *([cell(row) for cell in columns.values()] for row in shown)]


def markdown(lines: Iterable[list[str]]) -> str:
    """A table of these lines, of which the second is the rule below the heads."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def not_timed(rows: list[Row]) -> str:
    """Candidates without a time, by reason."""
    why_not: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] in ("unavailable", "failed"):
            why_not.setdefault(row["reason"], []).append(row["candidate"])
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in why_not.items())


def _verdict(mark: Callable[[str, str], str], row: Row) -> str:
    if row["role"] == "floor":
        return row["note"]
    return mark(row["status"], {"ok": "green", "outside bounds": "yellow", "failed": "bold red"}[row["status"]])


def _error(measure: str, mark: Callable[[str, str], str], row: Row) -> str:
    found = row.get("errors", {}).get(measure)
    if found is None:
        return ""
    text = f"{found:.2f}" if measure.endswith("of_bound") else f"{found:.1e}"
    within = measure not in BOUNDS or found <= BOUNDS[measure]
    return text if within else mark(text, "yellow")


def milliseconds(seconds: float | None) -> str:
    """Three significant digits, in ms."""
    return "" if seconds is None else digits(1e3 * seconds)


def megabytes(count: float | None) -> str:
    return "" if count is None else digits(count / 1e6)


def digits(value: float | None) -> str:
    """Three significant digits without an exponent."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"
