"""A study's results as plain values: ``results.json``, ``results.csv`` and ``curves.csv``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from g2rl.bootstrap import Estimate
from g2rl.comparison.bands import facts_of
from g2rl.history import differing
from g2rl.report import write_csv
from g2rl.study.results import Compared, Finished, Results

INTERVAL = "95 %, hierarchical bootstrap: seeds, and the held-out problems that all seeds share"
TEST = "sign-flip permutation test over seeds, two-sided"
TOGETHER = "; over all tasks' seeds where tasks are taken together"
VERSION = ("version", "code", "commit")
"""What ``done.json`` says of the code."""


def record(results: Results) -> dict[str, Any]:
    """Everything that the report shows; shares as fractions, rounded so that the last bits of a sum cannot show."""
    study = results.study
    return {
        "study": study.name,
        "baseline": study.baseline,
        "seeds": list(study.seeds),
        "interval": INTERVAL,
        "test": TEST + TOGETHER * (len(study.tasks) > 1),
        "runs": {"planned": len(study.runs), "finished": len(results.finished)},
        "missing": [
            {"task": run.task, "method": run.method, "seed": run.seed, "state": results.states[run]}
            for run in results.missing
        ],
        "tasks": {task: _task(results, task) for task in study.tasks},
        "all_tasks": {
            method: {
                metric: _compared(found)
                for metric in results.metrics(study.tasks[0])
                if (found := results.compared_everywhere(method, metric)) is not None
            }
            for method in study.methods
            if method != study.baseline
        },
        "environment": facts_of([f.log.environment for f in results.finished]),
        "code": facts_of([_version(f) for f in results.finished]),
        "differing": _changing(results.finished),
        "changes": OmegaConf.to_yaml(OmegaConf.create(study.changes)),
    }


def _task(results: Results, task: str) -> dict[str, Any]:
    config = next(run.config for run in results.study.runs if run.task == task)
    level = results.half_way(task)
    return {
        "metrics": results.metrics(task),
        "steps": config.steps,
        "held_out": config.task.held_out,
        "samples": config.eval.samples,
        "half_way": None if level is None else round(level, 6),
        "methods": {method: _method(results, task, method) for method in results.study.methods},
    }


def _method(results: Results, task: str, method: str) -> dict[str, Any]:
    found = results.of(task, method)
    metrics = results.metrics(task)
    compared = {} if method == results.study.baseline else {m: results.compared(task, method, m) for m in metrics}
    names = [name for name in found[0].numbers if "@" not in name or " " in name] if found else []
    return {
        "seeds": [f.run.seed for f in found],
        "scores": {m: _estimate(e) for m in metrics if (e := results.score(task, method, m)) is not None},
        "differences": {m: _compared(c) for m, c in compared.items() if c is not None},
        "numbers": {name: spread for name in names if (spread := _spread([f.numbers[name] for f in found]))},
        "steps_to_half_way": [None if s is None else round(s, 3) for s in results.steps_to_half_way(task, method)],
        "interrupted": sum(f.done["attempts"] > 1 for f in found),
    }


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else round(value, 6) for key, value in asdict(estimate).items()}


def _compared(found: Compared) -> dict[str, Any]:
    p, smallest = (float(f"{value:.4g}") for value in (found.test.p, found.test.smallest))
    return {**_estimate(found.estimate), "p": p, "smallest_p": smallest, "seeds": list(found.seeds)}


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, least and greatest over seeds; None where a seed has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {key: float(f"{f(known):.6g}") for key, f in (("mean", fmean), ("least", min), ("greatest", max))}


def _version(found: Finished) -> dict[str, str]:
    """Without a commit where the code is no checkout."""
    return {key: str(found.done[key]) for key in VERSION if found.done[key] is not None}


def _changing(found: Iterable[Finished]) -> list[str]:
    """What differs between runs of one task and method though only their seed should: environment and code."""
    by_kind: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for f in found:
        facts = f.log.environment | {key: f.done[key] for key in VERSION}
        by_kind.setdefault((f.run.task, f.run.method), []).append(facts)
    return sorted({key for facts in by_kind.values() for key in differing(facts)})


def write_record(folder: Path, results: Results) -> dict[str, Any]:
    """Write the three files and return what ``results.json`` holds."""
    content = record(results)
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    names = list(dict.fromkeys(name for f in results.finished for name in f.numbers))
    header = ("task", "method", "seed", "step", *names)
    rows = [
        (f.run.task, f.run.method, f.run.seed, f.run.config.steps, *(_cell(f.numbers.get(name)) for name in names))
        for f in results.finished
    ]
    write_csv(folder / "results.csv", header, rows)
    points = [
        (f.run.task, f.run.method, f.run.seed, int(step), _cell(value))
        for f in results.finished
        for step, value in zip(*f.curve(), strict=True)
    ]
    write_csv(folder / "curves.csv", ("task", "method", "seed", "step", "pass@1"), points)
    return content


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.12g}" if float(value).is_integer() else f"{value:.6g}"
