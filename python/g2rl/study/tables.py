"""A study's tables in Markdown, from the contents of its ``results.json``."""

from __future__ import annotations

from statistics import median
from typing import Any

from g2rl.progress import duration
from g2rl.report import markdown_table

NUMBERS: tuple[tuple[str, str, float, str], ...] = (
    ("pass@1 over training", "mean pass@1 over training, %", 100, ".1f"),
    ("eval/reward", "held-out reward", 1, ".3f"),
    ("train/response_length", "tokens of a response", 1, ".1f"),
    ("eval/response_length", "held out", 1, ".1f"),
    ("train/entropy", "entropy, nats", 1, ".2f"),
    ("geometry/mean_cosine", "mean cosine", 1, "z.2f"),
    ("geometry/negative_share", "negative pairs, %", 100, ".0f"),
    ("cpu_s", "CPU, min", 1 / 60, ".1f"),
    ("wall_s", "time, min", 1 / 60, ".1f"),
    ("peak_bytes", "peak memory, GB", 1e-9, ".2f"),
)
"""Numbers of a run: key, heading, factor and format. Shown are those that some method has."""


def score(estimate: dict[str, Any] | None) -> str:
    """A share in percent with its interval."""
    if estimate is None:
        return "-"
    return f"{100 * estimate['value']:.1f} {_ends(estimate, '.1f')}"


def change(compared: dict[str, Any] | None) -> str:
    """A difference in percentage points with its interval and p-value."""
    if compared is None:
        return "-"
    return f"{100 * compared['value']:+.1f} {_ends(compared, '+.1f')}, p = {compared['p']:.3g}"


def _ends(estimate: dict[str, Any], form: str) -> str:
    """An interval in percent; a dash where all resamples agree, which has none."""
    low, high = estimate["low"], estimate["high"]
    return "-" if low is None else f"[{100 * low:{form}}, {100 * high:{form}}]"


def headline(content: dict[str, Any], metric: str) -> str:
    """A row a method, a column a task, and last the difference to the baseline over all tasks."""
    tasks, baseline = content["tasks"], content["baseline"]
    rows = []
    for method in next(iter(tasks.values()))["methods"]:
        cells = [score(task["methods"][method]["scores"].get(metric)) for task in tasks.values()]
        everywhere = content["all_tasks"].get(method, {}).get(metric)
        rows.append((method, *cells, "" if method == baseline else change(everywhere)))
    last = f"against {baseline}" if len(tasks) == 1 else f"all tasks, against {baseline}"
    return markdown_table((f"held-out {metric}, %", *tasks, last), rows)


def scores(task: dict[str, Any]) -> str:
    """pass@k and maj@k of each method."""
    rows = [
        (method, str(len(of["seeds"])), *(score(of["scores"].get(metric)) for metric in task["metrics"]))
        for method, of in task["methods"].items()
    ]
    return markdown_table(("in percent", "seeds", *task["metrics"]), rows)


def differences(task: dict[str, Any], baseline: str) -> str:
    """Each method against the baseline; empty where there is no pair."""
    rows = [
        (
            method,
            ", ".join(map(str, next(iter(of["differences"].values()))["seeds"])),
            *(change(of["differences"].get(metric)) for metric in task["metrics"]),
        )
        for method, of in task["methods"].items()
        if of["differences"]
    ]
    return markdown_table((f"against {baseline}, points", "seeds", *task["metrics"]), rows) if rows else ""


def numbers(task: dict[str, Any]) -> str:
    """How each method got there: speed of learning, length, entropy, geometry, time and memory."""
    shown = [number for number in NUMBERS if any(number[0] in of["numbers"] for of in task["methods"].values())]
    rows = []
    for method, of in task["methods"].items():
        cells = [_spread(of["numbers"].get(key), factor, form) for key, _, factor, form in shown]
        mark = "*" if of["interrupted"] else ""
        rows.append((method + mark, _half_way(of["steps_to_half_way"]), *cells))
    level = "" if task["half_way"] is None else f" ({100 * task['half_way']:.1f} %)"
    return markdown_table(("mean (least to greatest)", f"step half way{level}", *(n[1] for n in shown)), rows)


def _spread(spread: dict[str, float] | None, factor: float, form: str) -> str:
    if spread is None:
        return "-"
    mean, least, greatest = (format(factor * spread[key], form) for key in ("mean", "least", "greatest"))
    return mean if least == greatest else f"{mean} ({least} to {greatest})"


def _half_way(steps: list[float | None]) -> str:
    """Median of the seeds, those that never get there counted as last."""
    if not steps:
        return "-"
    middle = median([step if step is not None else float("inf") for step in steps])
    reached = sum(step is not None for step in steps)
    text = f"{middle:.1f}" if middle != float("inf") else "not reached"
    return text if reached == len(steps) else f"{text} ({reached} of {len(steps)} seeds)"


def total_time(content: dict[str, Any]) -> str:
    """What the finished runs took together."""
    sums = {"wall_s": 0.0, "cpu_s": 0.0}
    for task in content["tasks"].values():
        for of in task["methods"].values():
            for key in sums:
                sums[key] += of["numbers"][key]["mean"] * len(of["seeds"]) if of["seeds"] else 0.0
    return f"{duration(sums['wall_s'])} of time, {duration(sums['cpu_s'])} of CPU time"
