"""A study's report: ``report.md`` with its plots, ``results.json``, ``results.csv`` and ``curves.csv``."""

from __future__ import annotations

from typing import Any

from g2rl.bootstrap import coverage
from g2rl.report import code, markdown_table, write_sections
from g2rl.run import SMOOTHED
from g2rl.study import tables
from g2rl.study.plots import draw
from g2rl.study.record import write_record
from g2rl.study.results import END, Results

_STATES = {
    "resumable": "stopped; it has a checkpoint to go on from",
    "new": "not begun, or failed without a checkpoint",
}
_BANDS = (
    "Line: mean over seeds; shaded: from the least to the greatest. From "
    f"{SMOOTHED} steps on training metrics are moving averages."
)


def write_study_report(results: Results, command: str) -> dict[str, Any]:
    """Write the report of what is finished in the study's folder, in place of an older one; returns its contents.

    Args:
        results: at least one finished run.
        command: that repeats the study.
    """
    folder = results.study.folder
    content = write_record(folder, results)
    drawn = draw(results, content, folder)
    headlines, counts = results.headlines(results.study.tasks[0]), content["runs"]
    sections = [
        f"# Study `{content['study']}`",
        f"{counts['finished']} of {counts['planned']} runs are finished; they took {tables.total_time(content)}.",
        *(tables.headline(content, metric) for metric in headlines),
        f"In brackets: 95 % interval. p: {content['test']}. [How to read them](#how-to-read-this).",
        _missing(content),
        f"![Held-out pass@1]({drawn['overview']})\n\n{_BANDS}",
        *(f"![Differences in {key}]({drawn[key]})" for key in headlines if key in drawn),
        *(_task(content, task, drawn.get(f"task {task}")) for task in content["tasks"]),
        f"## How to read this\n\n{_reading(content, results)}",
        "## Configuration\n\nWhat all runs, each task and each method change in the study's base:\n\n```yaml\n"
        f"{content['changes']}```",
        f"## Environment\n\n{_environment(content)}",
        f"## How to repeat it\n\n```\n{command}\n```\n\nFinished runs are kept and broken ones resumed; another seed "
        "in `seeds=[...]` adds only its runs. Numbers of every run: `results.csv`, `curves.csv`.",
    ]
    write_sections(folder / "report.md", sections)
    return content


def _missing(content: dict[str, Any]) -> str:
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for run in content["missing"]:
        seeds.setdefault((run["task"], run["method"], run["state"]), []).append(str(run["seed"]))
    lines = [
        f"- {task}, {method}, seed{'s' * (len(of) > 1)} {', '.join(of)}: {_STATES[state]}."
        for (task, method, state), of in seeds.items()
    ]
    return "## What is missing\n\n" + "\n".join(lines) if lines else ""


def _task(content: dict[str, Any], task: str, plot: str | None) -> str:
    found = content["tasks"][task]
    asked = f"{found['held_out']} held-out problems, {found['samples']} responses each, after {found['steps']} steps."
    parts = [
        f"## Task `{task}`\n\n{asked}",
        tables.scores(found),
        tables.differences(found, content["baseline"]),
        tables.numbers(found),
        f"![Curves]({plot})" if plot else "",
    ]
    return "\n\n".join(filter(None, parts))


def _reading(content: dict[str, Any], results: Results) -> str:
    methods = [of for task in content["tasks"].values() for of in task["methods"].values()]
    seeds = max(len(of["seeds"]) for of in methods)
    narrow = ""
    if seeds > 1:
        held = f"{100 * coverage(seeds):.0f} % of studies where trainings differ and problems do not, else in more."
        narrow = f" Few seeds make it too narrow: that of {seeds} holds the truth in {held}"
    compared = [found for of in methods for found in of["differences"].values()]
    least = ""
    if compared:
        most = min(compared, key=lambda found: found["smallest_p"])
        pairs, smallest = len(most["seeds"]), most["smallest_p"]
        ends = f"no p below {smallest:.4g} can come out, however large a difference is."
        least = f" With {pairs} seed{'s' * (pairs > 1)} {ends}"
    several = len(content["tasks"]) > 1
    whole = [c["smallest_p"] for of in content["all_tasks"].values() for c in of.values()] if several else []
    together = f" Tasks taken together have more pairs: down to p = {min(whole):.3g}." if whole else ""
    points = [
        "Interval: the study is imagined again, with seeds and with held-out problems drawn anew from those that there "
        "are, thousands of times; 95 % of the results lie inside, and no end passes what a percentage or a difference "
        "of two can be. All methods were asked the same problems with the same seeds, so that a difference to the "
        "baseline is taken inside each seed and problem first: what makes a problem hard, or a seed lucky, is in both "
        f"and cancels. With one seed the interval is about problems alone.{narrow}",
        "p: if a method were like the baseline, each seed's difference could as well have the other sign. p is the "
        "share of all signs that give a mean difference at least as large, in either direction. A seed is a pair, not "
        "a problem: all problems of a seed are answered by one trained model, so that counting them one by one would "
        f"take luck of one training for evidence.{least}{together} p-values stand as they are, not corrected for how "
        "many of them there are.",
        "pass@k: chance that one of k responses is right, unbiased; maj@k: that the most frequent answer of k is.",
        "Mean pass@1 over training: the area below the curve. Step half way: where the curve first passes the level "
        "half way between the start and the best method's end, median over seeds. Length of responses, entropy and "
        f"geometry: mean over the last 1/{END} of the steps, in training.",
        "CPU and time: of the whole process, from its start to its report. A star marks methods with runs that were "
        "interrupted; what a killed process took is not in their time.",
    ]
    alone = {run.method for run in results.study.runs if run.config.log.geometry is False}
    if alone:
        points.append(f"Without geometry (`log.geometry` is false): {', '.join(sorted(alone))}.")
    return "\n".join(f"- {point}" for point in points)


def _environment(content: dict[str, Any]) -> str:
    facts = [(key, code(value)) for key, value in (content["environment"] | content["code"]).items()]
    table = markdown_table(("", ""), facts)
    if not content["differing"]:
        return table
    keys = ", ".join(f"`{key}`" for key in content["differing"])
    return f"{table}\n\nRuns of one task and method are not all alike in {keys}."
