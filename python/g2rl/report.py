"""A run's report: ``report/report.md`` with its plots, from the files that `g2rl.log` writes.

Everything but ``metrics.jsonl`` may be missing, and the run may still be going on: the report then says what it lacks.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from omegaconf import OmegaConf

from g2rl.files import writing
from g2rl.history import EVALUATION, REWARD, changes, configured_values, default_values, evaluation_changes
from g2rl.methods import may_shape
from g2rl.metrics import METRICS, metric
from g2rl.plots import PLOTS, STYLE
from g2rl.progress import duration, printable
from g2rl.run import Run, load_run, pairs_of, periods, problem_name, valid_part

SAMPLE_CHARACTERS = 1200


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; cells may hold bars."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def metric_value(key: str, value: float | None) -> str:
    """A metric as text, shares in percent."""
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if metric(key).unit == "share" else f"{value:.4g}"


def value_with_unit(key: str, value: float | None) -> str:
    """A metric as text where no column beside it has its unit."""
    return metric_value(key, value) + (metric(key).after_value if value is not None else "")


def code(value: object, limit: int = 200) -> str:
    """A value as a span of code on one line, its middle left out where it is long."""
    return "`" + printable(str(value), limit).replace("`", "'") + "`"


def _fenced(text: str, language: str = "text") -> str:
    """A code block that no run of backticks inside `text` can end."""
    fence = "`" * max([3] + [len(run) + 1 for run in re.findall("`+", text)])
    return f"{fence}{language}\n{text}\n{fence}"


def _excerpt(text: str) -> str:
    half = SAMPLE_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return text if left_out <= 0 else f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"


def _headline(run: Run) -> str:
    lead, name = ("eval/pass@1", "Held-out pass@1")
    if not run.series(lead)[0]:
        lead = next(iter(run.keys("eval/pass@")), "train/accuracy")
        name = f"Held-out {lead[5:]}" if lead.startswith("eval/") else "Training accuracy (no evaluation was logged)"
    steps, values = run.series(lead)
    if not steps:
        result = "Neither an evaluation nor a training accuracy was logged."
    elif len(steps) == 1:
        result = f"{name}: {metric_value(lead, values[0])} at step {steps[0]}."
    else:
        first, last = metric_value(lead, values[0]), metric_value(lead, values[-1])
        otherwise = _evaluated_otherwise(run, steps) if lead.startswith("eval/") else ""
        result = f"{name}: {first} at step {steps[0]}, {last} at step {steps[-1]}{otherwise}."
    planned = run.setting("steps", None)
    state = "" if planned is None else f" of {planned}" + ("" if run.last_step >= planned else ", not finished")
    seconds = sum(run.total(key) for key in ("time/step", "time/eval", "time/checkpoint"))
    device = run.environment.get("device") or f"{run.setting('model.device')} (as configured)"
    facts = [
        ("method", method_of(run)),
        ("model", run.setting("model.path")),
        ("task", run.setting("task.name")),
        ("steps", f"{run.last_step}{state}"),
        (
            "duration",
            f"{duration(seconds)} (steps, evaluations, checkpoints but the last)" if seconds else "not logged",
        ),
        ("device", device),
        *((key, text) for key, text in run.environment.items() if key != "device"),
    ]
    return f"**{result}**\n\n" + markdown_table(("", ""), [(key, str(value)) for key, value in facts])


def _evaluated_otherwise(run: Run, steps: Sequence[int], by: tuple[str, ...] = EVALUATION) -> str:
    """From which of the evaluated steps on results do not compare to those before, as the end of a sentence."""
    listed = [
        f"{step} ({', '.join(code(key) for key in keys)})"
        for step, keys in evaluation_changes(run.history, by)
        if steps[0] < step <= steps[-1]
    ]
    return f"; evaluated otherwise from step {', and from step '.join(listed)}" if listed else ""


def _missing(run: Run) -> list[str]:
    """What a reader may look for and will not find, in sentences."""
    said = []
    if not run.config:
        said.append("No `config.yaml`: method, model and planned steps are unknown.")
    if not run.environment:
        said.append("No `environment.json`: the device is not known beyond the configuration.")
    if not run.keys("train/"):
        said.append("No training step is logged.")
    if not run.keys("eval/"):
        off = run.setting("eval.every") == 0
        said.append("No evaluation is logged" + (": it is turned off (`eval.every` is 0)." if off else "."))
    if not run.keys("geometry/"):
        off = run.setting("log.geometry") is False
        said.append("No feature geometry is logged" + (": it is turned off (`log.geometry` is false)." if off else "."))
    if run.samples and not run.shaped:
        said.append(_unshaped(run))
    if not run.groups:
        said.append("No groups are logged: no heat maps and no distribution of cosines.")
    if not run.samples:
        said.append("No completions are logged.")
    elif not run.scored:
        said.append("The completions have no exploration scores.")
    for key in run.keys(""):
        steps = [str(record["step"]) for record in run.metrics if key in record and record[key] is None]
        if steps:
            listed = ", ".join(steps[:5]) + (", ..." if len(steps) > 5 else "")
            said.append(f"`{key}` was NaN or infinite at {len(steps)} step(s): {listed}.")
    return said


def _unshaped(run: Run) -> str:
    """Why no reward was shaped, as far as it is known."""
    if run.history and not any(may_shape(config.get("method", "")) for _, config in run.history):
        described = "; geometry and scores only describe them" if run.keys("geometry/") else ""
        return f"No shaping: method {method_of(run)} trains on the base rewards{described}."
    equal = run.series("groups/zero_variance_share")[1]
    alike = ": all groups had equal rewards" if equal and min(equal) == 1 else ""
    return f"No reward was changed by shaping{alike}."


def _evaluation(run: Run) -> str:
    keys = run.keys("eval/")
    records = [record for record in run.metrics if any(record.get(key) is not None for key in keys)]
    if not records:
        return "No evaluation is logged."
    lead = next((key for key in keys if key.startswith("eval/pass@")), keys[0])
    best = max(records, key=lambda record: -math.inf if record.get(lead) is None else record[lead])
    if len(records) == 1:
        chosen = [("only", records[0])]
    else:
        chosen = [("first", records[0]), (f"best {lead[5:]}", best), ("last", records[-1])]
    rows = [
        (name, str(record["step"]), *(value_with_unit(key, record.get(key)) for key in keys)) for name, record in chosen
    ]
    head = ["evaluation", "step"]
    head += [key[5:] if "@" in key else metric(key).title.removeprefix("Held-out ") for key in keys]
    otherwise = _evaluated_otherwise(run, [record["step"] for record in records]).removeprefix("; ")
    note = f"\n\n{otherwise[0].upper()}{otherwise[1:]}: these rows do not compare." if otherwise else ""
    rewarded = _evaluated_otherwise(run, run.series("eval/reward")[0] or [0], REWARD).partition(" from ")[2]
    note += f"\n\nRewarded otherwise from {rewarded}: the column `reward` does not compare." if rewarded else ""
    return markdown_table(head, rows) + note


def _geometry(run: Run) -> str:
    """Early against late: mean cosine, share of negative pairs, effective dimension of the logged groups."""
    rows = []
    for name, groups in periods(run):
        pairs = pairs_of(groups)
        # Participation ratio of the eigenvalues of S: (sum of S_ii)^2 / sum of S_ij^2.
        matrices = [matrix for matrix in map(valid_part, groups) if matrix]
        sizes = [len(s) ** 2 / math.fsum(value**2 for row in s for value in row) for s in matrices]
        if pairs:
            negative = sum(value < 0 for value in pairs) / len(pairs)
            mean = f"{sum(pairs) / len(pairs):.3f}"
            rows.append((name, str(len(pairs)), mean, f"{100 * negative:.1f} %", f"{sum(sizes) / len(sizes):.2f}"))
    header = ("logged groups of", "pairs", "mean cosine", "negative pairs", "effective dimension")
    note = "Effective dimension: participation ratio of the eigenvalues of S, 1 to the group's size, mean over groups."
    return f"{markdown_table(header, rows)}\n\n{note}" if rows else ""


def _samples(run: Run) -> str:
    """A correct and a wrong response of the first and of the last step that has completions."""
    parts = []
    for step in sorted({row["step"] for row in run.samples}):
        rows = [row for row in run.samples if row["step"] == step]
        for correct in (True, False):
            row = next((row for row in rows if row["correct"] is correct), None)
            if row is None:
                continue
            names = (("reward", "reward"), ("score", "ν"), ("shaped", "shaped reward"), ("advantage", "advantage"))
            numbers = ", ".join(f"{name} {row[key]:.3g}" for key, name in names if row[key] is not None)
            judged = "correct" if correct else "wrong"
            parts.append(f"### Step {step}, {judged}\n\nProblem {code(problem_name(row['problem']))}; {numbers}.")
            parts.append(f"{_fenced(_excerpt(row['prompt']))}\n\n{_fenced(_excerpt(row['response']))}")
    return "\n\n".join(parts) or "No completions are logged."


def changed_values(run: Run) -> dict[str, Any]:
    """What a run's configuration sets to something else than the default, by dotted key."""
    default = default_values(run.config)
    return {k: v for k, v in configured_values(run.config).items() if k not in default or default[k] != v}


def method_of(run: Run) -> str:
    """The name of a run's method, with those that it went on by, if there are others."""
    methods = [(step, str(config.get("method", "unknown"))) for step, config in run.history]
    later = [f", from step {step} on {name}" for (_, was), (step, name) in pairwise(methods) if name != was]
    return methods[0][1] + "".join(later) if methods else "unknown"


def changes_table(run: Run, shown: Callable[[Any], Any] = lambda value: value) -> str:
    """By which other settings a run went on, and from which steps on, as `shown` has their values; empty for none."""
    rows = [
        (str(step), code(key), *("-" if value is None else code(shown(value)) for value in values))
        for step, changed in changes(run.history)
        for key, values in changed.items()
    ]
    return markdown_table(("from step", "key", "before", "then"), rows) if rows else ""


def _configuration(run: Run) -> str:
    if not run.config:
        return "No `config.yaml` in the run's folder."
    default = default_values(run.config)
    changed = [
        (code(key), code(value), code(default[key]) if key in default else "-")
        for key, value in changed_values(run).items()
    ]
    table = markdown_table(("key", "value", "default"), changed) if changed else "All values are the defaults."
    full = _fenced(OmegaConf.to_yaml(OmegaConf.create(run.config)).strip(), "yaml")
    later = changes_table(run)
    said = f"The run went on by other settings; the values below are the last ones.\n\n{later}" if later else ""
    return "\n\n".join(filter(None, (said, table, f"<details><summary>All values</summary>\n\n{full}\n\n</details>")))


def _metrics(run: Run) -> str:
    def at_end(keys: Sequence[str], end: int) -> str:
        series = [(key, run.series(key)[1]) for key in keys]
        return ", ".join(metric_value(key, values[end] if values else None) for key, values in series)

    rows = []
    for item, group in groupby(run.keys(""), key=metric):  # pass@k has one row for all k
        keys, unit = list(group), item.unit if item.unit != "share" else ""
        names = ", ".join(f"`{key}`" for key in keys)
        rows.append((names, at_end(keys, 0), at_end(keys, -1), unit, item.meaning))
    absent = [f"`{item.key}`" for item in METRICS if item.key not in {metric(key).key for key in run.keys("")}]
    table = markdown_table(("metric", "first", "last", "unit", "meaning"), rows)
    return table + (f"\n\nDefined but not logged by this run: {', '.join(absent)}." if absent else "")


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def draw_plots(run: Run, folder: Path, without: Sequence[str] = ()) -> list[tuple[str, str, str]]:
    """Write the plots that the run has data for to ``folder/<stem>.png``; returns stem, heading and caption of each."""
    drawn = []
    with rc_context(STYLE):
        for stem, heading, draw, caption in PLOTS:
            figure = None if stem in without else draw(run)
            if figure is not None:
                figure.savefig(folder / f"{stem}.png")
                drawn.append((stem, heading, caption))
    return drawn


def write_sections(path: Path, sections: Sequence[str]) -> Path:
    """Write a report's sections, those that are not empty, and return its path."""
    # "replace": a model's text may hold halves of surrogate pairs, which UTF-8 cannot encode.
    path.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8", errors="replace")
    return path


def write_report(run_dir: Path, folder: Path | None = None) -> Path:
    """Write a run's report, in place of an older one.

    Args:
        run_dir: the run's folder; its run may still be going on.
        folder: of the report; None is ``run_dir/report``.

    Returns:
        The path of the report, ``folder/report.md``; its plots lie beside it.

    Raises:
        FileNotFoundError: `run_dir` has no metrics; the message names the file looked for.
        ValueError: a log file is damaged before its last line.
        StorageError: the report cannot be written.
    """
    run = load_run(run_dir)
    folder = folder or run_dir / "report"
    with writing(f"report: {str(folder)!r}"):
        folder.mkdir(parents=True, exist_ok=True)
        return write_sections(folder / "report.md", _sections(run, folder))


def _sections(run: Run, folder: Path) -> list[str]:
    """Of the report, whose plots are written to `folder`."""
    plots = []
    for stem, heading, caption in draw_plots(run, folder):
        extra = _geometry(run) if stem == "cosines" else ""
        plots.append("\n\n".join(filter(None, (f"### {heading}", f"![{heading}]({stem}.png)", caption, extra))))
    missing = _missing(run)
    return [
        f"# Run `{run.config.get('name', run.dir.name)}`",
        _headline(run),
        "## What is missing\n\n" + "\n".join(f"- {sentence}" for sentence in missing) if missing else "",
        f"## Evaluation\n\n{_evaluation(run)}",
        "## Plots\n\n" + ("\n\n".join(plots) or "Nothing that could be drawn is logged."),
        f"## Sample completions\n\n{_samples(run)}",
        f"## Configuration\n\n{_configuration(run)}",
        f"## Metrics\n\n{_metrics(run)}",
    ]
