"""Result files: what `run`, `e2e` and `tune` wrote to results/, and what README and plots ask of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases.registry import OPS, Groups, Shape
from benchmarks.measuring.timing import machine_line

FOLDER = Path(__file__).parent.parent / "results"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """One file.

    Attributes:
        name: the file's, without its ending; plots carry it.
        content: "rows" of `run`, one a candidate and case; or "step" of `e2e`, "trl_step" of `trl_step`,
            "prefix_sharing" of `prefix_sharing`, "rollout" of `rollout`, "kernels" of `tune`, which is shown nowhere.
    """

    name: str
    content: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        return self.content.get("rows", [])

    @property
    def sweep(self) -> str | None:
        return self.content.get("sweep")

    @property
    def machine(self) -> str:
        return machine_line(self.content["machine"])

    @property
    def processor(self) -> str:
        """The device in a few words."""
        facts = self.content["machine"]
        name = facts["name"].replace("(R)", "").removesuffix(" Processor")
        if facts["device"] != "cpu":
            return name
        widest = "AMX" if "amx" in facts["isa"] else facts["isa"].split()[0]
        return f"{name}, {facts.get('choices', {}).get('G2RL_CPU_ISA', widest)}"

    @property
    def fastest_instructions(self) -> bool:
        """Whether nothing kept kernels or libraries from the processor's fastest instructions."""
        return not self.content["machine"].get("choices")

    def cases(self) -> list[list[Row]]:
        """Rows of each case, in the order of the file."""
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row["op"], row["sizes"]["name"], row["kind"], row["dtype"]), []).append(row)
        return list(found.values())


def load(folder: Path = FOLDER) -> list[Report]:
    """All result files, by name."""
    return [Report(path.stem, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def timed(rows: Iterable[Row], role: str | None = None) -> list[Row]:
    """Rows that have a time, fastest first."""
    found = [row for row in rows if row.get("median_s") is not None and role in (None, row["role"])]
    return sorted(found, key=lambda row: row["median_s"])


def named(rows: Iterable[Row], candidate: str) -> Row | None:
    return next((row for row in timed(rows) if row["candidate"] == candidate), None)


def label(row: Row) -> str:
    """The sizes that a case was measured on."""
    sizes = row["sizes"]
    return (Shape if "V" in sizes else Groups)(**sizes).label


def worst_measure(row: Row) -> str:
    """The error that stands for a row in a summary: Phi's, else log p's, else the gradients', else advantages'."""
    for measure in ("phi_relative", "logp_absolute", "hidden_relative", "advantages_absolute"):
        if measure in row.get("errors", {}):
            return measure
    return ""


def title(row: Row) -> str:
    return f"{row['op']}: {OPS[row['op']].summary}"
