"""Result files: how programs of this folder write them to results/, and what README and plots ask of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.candidates.lineup import FLOOR_OUT
from benchmarks.cases.registry import Groups, Shape
from benchmarks.measuring.timing import machine, machine_line

FOLDER = Path(__file__).parent.parent / "results"

Row = Mapping[str, Any]


def result_file(text: str) -> Path:
    """What `--json` names, refused before anything is measured where it could not be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, found {text!r}")
    return path


def begin(device: torch.device, width: int = 120) -> tuple[Console, dict[str, Any]]:
    """A console with room for tables even where the output goes to a file, and the machine's facts, printed on it."""
    console, facts = Console(width=max(Console().width, width)), machine(device)
    console.print(machine_line(facts))
    return console, facts


def write_report(path: Path | None, facts: Mapping[str, Any], **content: Any) -> None:
    """Write a result file, if one is asked for.

    In one step and anew as often as there is more to say: a run that is cut off leaves what it has.
    """
    if path is not None:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps({"machine": facts, **content}, indent=1) + "\n")
        part.replace(path)


@dataclass(frozen=True)
class Report:
    """One file.

    Attributes:
        name: the file's, without its ending; plots carry it.
        content: "rows" of `run`, one a candidate and case; or "step" of `e2e`, "trl_step" of `trl_step`,
            "prefix_sharing" of `prefix_sharing`, "rollout" of `rollout`; "kernels" of `tune` and "bias" of `bias` are
            shown nowhere.
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


def times_out(row: Row, rows: Iterable[Row]) -> float | None:
    """The time over that of the case's products into memory that was touched before; None where either has none."""
    out = named(rows, FLOOR_OUT)
    return row["median_s"] / out["median_s"] if out and row.get("median_s") is not None else None


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
