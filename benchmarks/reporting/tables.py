"""How numbers are shown: tables on a terminal, and the words and digits that README and plots share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.cases.registry import KINDS, Op
from benchmarks.measuring.accuracy import BOUNDS

Row = Mapping[str, Any]

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


def case_table(op: Op, label: str, kind: str, rows: list[dict[str, Any]]) -> Table:
    """One case: a row for each candidate that was measured, and below it why the others were not."""
    measures = [measure for measure in ERRORS if any(measure in row.get("errors", {}) for row in rows)]
    launches = any("launches" in row for row in rows)
    launch = any(row.get("launch_s") is not None for row in rows)
    table = Table(title=f"\n{op.name} ({op.summary}), {label}; {KINDS.get(kind, kind)}", title_justify="left")
    table.add_column("candidate", no_wrap=True)
    heads = [
        "ms",
        "± IQR",
        "x torch.mm" if op.products else "x eager",
        "GFLOP/s",
        "% best",
        "extra MB",
        "% fp32 logits",
    ]
    heads += ["launch ms"] if launch else []
    for head in [*heads, *(["launches"] if launches else []), *(ERRORS[measure] for measure in measures)]:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("bounds", no_wrap=True)
    for row in rows:
        if row["status"] == "unavailable":
            continue
        times = row.get("times_floor" if op.products else "times_eager")
        numbers = [
            milliseconds(row.get("median_s")),
            milliseconds(row.get("spread_s")),
            "" if times is None else f"{times:.2f}",
            digits(row.get("gflops")),
            digits(row.get("percent_of_best")),
            megabytes(row.get("extra_bytes")),
            digits(row.get("percent_of_logits")),
            *([milliseconds(row.get("launch_s"))] if launch else []),
            *([str(row.get("launches", ""))] if launches else []),
            *(_error(measure, row.get("errors", {})) for measure in measures),
        ]
        table.add_row(row["candidate"], *numbers, verdict(row))
    why_not: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] in ("unavailable", "failed"):
            why_not.setdefault(row["reason"], []).append(row["candidate"])
    reasons = [f"{', '.join(names)}: {reason}" for reason, names in why_not.items()]
    table.caption = escape("not timed: " + "; ".join(reasons)) if reasons else None
    table.caption_justify = "left"
    return table


def verdict(row: Row) -> str:
    if row["role"] == "floor":
        return f"({row['note']})"
    style = {"ok": "green", "outside bounds": "yellow", "failed": "bold red"}[row["status"]]
    return f"[{style}]{row['status']}[/]"


def _error(measure: str, found: Mapping[str, float]) -> str:
    if measure not in found:
        return "-"
    within = measure not in BOUNDS or found[measure] <= BOUNDS[measure]
    text = f"{found[measure]:.1e}" if not measure.endswith("of_bound") else f"{found[measure]:.2f}"
    return text if within else f"[yellow]{text}[/]"


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


def measured(rows: Iterable[Row]) -> list[Row]:
    """Rows that have a time: within bounds, or a peer's with its error."""
    return [row for row in rows if row.get("median_s") is not None]
