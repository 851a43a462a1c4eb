"""The page ``docs/RELIABILITY.md``: what the campaigns of the last ``make faults`` tried, and what came out.

Run as ``python -m tests.faults.page``, after the campaigns.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "build" / "faults"
PAGE = ROOT / "docs" / "RELIABILITY.md"
FINDINGS = Path(__file__).with_name("findings.md")
BEGIN, END = "<!-- {} begin, written by python -m tests.faults.page -->", "<!-- {} end -->"


def main() -> None:
    """Write the page's table and findings between their markers; the text around them is kept."""
    page = PAGE.read_text(encoding="utf-8")
    records = read_records(RECORDS)
    page = between(page, "campaigns", f"{table(records)}\n\n{where(records)}")
    page = between(page, "findings", FINDINGS.read_text(encoding="utf-8").strip())
    PAGE.write_text(page, encoding="utf-8")


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every line of every campaign; one test of a campaign has written each."""
    found = [json.loads(line) for path in sorted(folder.glob("*.json")) for line in path.read_text().splitlines()]
    if not found:
        sys.exit(f"{folder}: expected records of campaigns, found none; make faults writes them")
    return found


def table(records: list[dict[str, Any]]) -> str:
    """A row for each thing that a campaign tried, the tests of it added up."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        rows[record["campaign"], record["what"]].append(record)
    lines = ["| campaign | what was tried | tries | failures | minutes |", "|---|---|--:|--:|--:|"]
    for (campaign, what), parts in rows.items():
        tries, failures, seconds = (sum(part[key] for part in parts) for key in ("tries", "failures", "seconds"))
        lines.append(f"| {campaign} | {what} | {tries:,} | {failures} | {seconds / 60:.1f} |")
    return "\n".join(lines)


def where(records: list[dict[str, Any]]) -> str:
    """How long they took one after the other, on what."""
    import torch  # here: children of campaigns read this file's folders alone

    from benchmarks.measuring.timing import machine, machine_line

    minutes = sum(record["seconds"] for record in records) / 60
    seeds = ", ".join(sorted({str(record["seed"]) for record in records}))
    return f"{minutes:.0f} minutes in all, draws of seed {seeds}. {machine_line(machine(torch.device('cpu')))}"


def between(page: str, name: str, content: str) -> str:
    """`page` with what is between the markers of `name` replaced."""
    begin, end = BEGIN.format(name), END.format(name)
    head, _, rest = page.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        sys.exit(f"{PAGE}: expected {begin!r} and {end!r}, found them not")
    return f"{head}{begin}\n{content}\n{end}{tail}"


if __name__ == "__main__":
    main()
