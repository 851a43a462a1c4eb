"""What a run's folder holds, read from the files that `g2rl.log` writes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from g2rl.history import History, read_history
from g2rl.log import read_records
from g2rl.metrics import METRICS, metric

SMOOTHED = 20
"""From so many steps on, training curves are moving averages."""


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        dir: the folder.
        metrics: records of ``metrics.jsonl``.
        samples: the completions of the first and of the last step that has any.
        scored: (exploration score, shaped reward, correct) of every completion with a score.
        shaped: whether the shaped reward of some completion is not its base reward.
        groups: records of ``groups.jsonl``.
        history: by which configurations its steps were done; empty where none is known.
        environment: contents of ``environment.json``; empty without one.
    """

    dir: Path
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    scored: list[tuple[float, float, bool]]
    shaped: bool
    groups: list[dict[str, Any]]
    history: History
    environment: dict[str, str]

    def keys(self, prefix: str) -> list[str]:
        """Logged metrics that begin with `prefix`, in the order of `METRICS` and of k; then others."""
        logged = {key for record in self.metrics for key in record if "/" in key and key.startswith(prefix)}
        order = {item.key: position for position, item in enumerate(METRICS)}

        def place(key: str) -> tuple[int, int, str]:
            k = key.partition("@")[2]
            return order.get(metric(key).key, len(order)), int(k) if k.isdecimal() else 0, key

        return sorted(logged, key=place)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was logged and finite."""
        points = [(record["step"], record[key]) for record in self.metrics if record.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def total(self, key: str) -> float:
        """Sum of a metric over all steps."""
        return math.fsum(self.series(key)[1])

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the last logged step, empty where it is not known."""
        return self.history[-1][1] if self.history else {}

    def setting(self, key: str, otherwise: Any = "unknown") -> Any:
        """A value of the last step's configuration, as of ``task.name``; `otherwise` where it is not known."""
        section, _, name = key.rpartition(".")
        values = self.config.get(section, {}) if section else self.config
        return values.get(name, otherwise)

    def at(self, step: int) -> Run:
        """The run with the configurations up to a step."""
        return replace(self, history=[(first, config) for first, config in self.history if first <= step])

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1]["step"])


def load_run(run_dir: Path) -> Run:
    """Read a run's folder.

    Raises:
        FileNotFoundError: there is no ``metrics.jsonl``, or it has no full line.
        ValueError: a log file is damaged before its last line, or a configuration is no YAML.
    """
    path = run_dir / "metrics.jsonl"
    metrics = list(read_records(path))
    if not metrics:
        inside = f", but runs below it: {run_dir}/*" if any(run_dir.glob("*/metrics.jsonl")) else ""
        raise FileNotFoundError(f"{path}: expected the metrics of a run, found none{inside}")
    first: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    scored, shaped = [], False
    for row in read_records(run_dir / "completions.jsonl"):
        # One pass that keeps two steps only: completions of a long run may not fit into memory.
        if not first or row["step"] == first[0]["step"]:
            first.append(row)
        elif last and row["step"] == last[0]["step"]:
            last.append(row)
        else:
            last = [row]
        shaped |= row["shaped"] != row["reward"]
        if row["score"] is not None and row["shaped"] is not None:
            scored.append((row["score"], row["shaped"], row["correct"]))
    environment = run_dir / "environment.json"
    return Run(
        dir=run_dir,
        metrics=metrics,
        samples=first + last,
        scored=scored,
        shaped=shaped,
        groups=list(read_records(run_dir / "groups.jsonl")),
        history=read_history(run_dir, metrics[-1]["step"]),
        environment=json.loads(environment.read_text()) if environment.is_file() else {},
    )


def moving_average(values: Sequence[float]) -> list[float]:
    """Mean of each value and its neighbours, a thirtieth of the series on either side."""
    half = max(2, len(values) // 30)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def problem_name(identity: object) -> str:
    """A problem's id, without the folder of the file that it is from."""
    text = str(identity)
    return text.rpartition("/")[2] if text.startswith("/") else text


def number_of(value: float | None) -> float:
    return math.nan if value is None else value


def valid_part(group: dict[str, Any]) -> list[list[float]]:
    """The similarity matrix without responses that have no feature: those are not similar even to themselves."""
    rows = group["similarity"]
    kept = [i for i, row in enumerate(rows) if row[i] is not None and row[i] > 0.5]
    return [[number_of(rows[i][j]) for j in kept] for i in kept]


def pairs_of(groups: Sequence[dict[str, Any]]) -> list[float]:
    rows = [row[:i] for group in groups for i, row in enumerate(valid_part(group))]
    return [value for row in rows for value in row if math.isfinite(value)]


def periods(run: Run) -> list[tuple[str, list[dict[str, Any]]]]:
    """The groups of the first and of the last third of the logged steps, by name; one period for a single step."""
    steps = sorted({group["step"] for group in run.groups})
    third = max(1, len(steps) // 3)
    periods = [steps[:third]] if len(steps) == 1 else [steps[:third], steps[-third:]]
    names = [f"step {p[0]}" if p[0] == p[-1] else f"steps {p[0]} to {p[-1]}" for p in periods]
    return [
        (name, [group for group in run.groups if p[0] <= group["step"] <= p[-1]])
        for name, p in zip(names, periods, strict=True)
    ]
