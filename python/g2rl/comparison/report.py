"""The report that compares runs: ``report.md`` with its plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context

from g2rl.comparison.bands import CELL, Band, Comparison, Curve, compare, facts_of, run_names, seed_of
from g2rl.comparison.plots import PLOTS, plot_bands
from g2rl.files import writing
from g2rl.history import ACTS_AHEAD, IGNORED, differing
from g2rl.metrics import metric
from g2rl.plots import STYLE
from g2rl.report import code, markdown_table, write_sections
from g2rl.run import SMOOTHED, load_run

CAPTION = (
    "Line: mean over the band's seeds; shaded: from the least to the greatest of them. Drawn are the steps that all "
    f"runs of a band have; training metrics from {SMOOTHED} steps on are moving averages."
)


def write_comparison(run_dirs: Sequence[Path], folder: Path) -> Path:
    """Write a report on several runs, in place of an older one.

    Args:
        run_dirs: the runs' folders; a run may still be going on, and one that has logged nothing yet is left out.
        folder: where ``report.md`` and its plots go; created when missing.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: there is no such folder, or none has metrics; the message names the file looked for.
        ValueError: a log file is damaged before its last line, or no run has a configuration.
        StorageError: the report cannot be written.
    """
    runs, notes = [], []
    for run_dir in run_dirs:
        try:
            runs.append(load_run(run_dir.resolve()))
        except FileNotFoundError:
            notes.append(f"`{run_dir.resolve().name}` is left out. It has no metrics yet.")
            if not run_dir.is_dir() or len(notes) == len(run_dirs):
                raise
    comparison = compare(runs)
    with writing(f"report: {str(folder)!r}"):
        folder.mkdir(parents=True, exist_ok=True)
        return write_sections(folder / "report.md", _sections(comparison, run_names(runs), notes, folder))


def _sections(comparison: Comparison, names: dict[Path, str], notes: Sequence[str], folder: Path) -> list[str]:
    """Of the report, whose plots are written to `folder`."""
    bands = comparison.bands
    compared = sum(len(band.runs) for band in bands)
    notes = [*notes, *_notes(comparison, names)]
    return [
        f"# Comparison of {compared} run{'s' if compared > 1 else ''}",
        _headline(bands),
        f"## Bands\n\n{_bands(bands, names)}",
        "## What does not fit\n\n" + "\n".join(f"- {note}" for note in notes) if notes else "",
        f"## Held-out results at the end\n\n{_results(bands)}",
        f"## Plots\n\n{_plots(bands, folder)}",
        f"## Configuration\n\n{_configuration(bands)}",
    ]


def _held_out_keys(bands: Sequence[Band]) -> list[str]:
    """pass@k, then maj@k, in the order of k; maj@1 is the same as pass@1. Last `eval/reward`, where a run has it."""
    runs = [run for band in bands for run in band.runs]
    keys = {key for run in runs for key in (*run.keys("eval/pass@"), *run.keys("eval/maj@"))} - {"eval/maj@1"}
    ordered = sorted(keys, key=lambda key: (key.startswith("eval/maj"), int(key.partition("@")[2])))
    return [*ordered, *(["eval/reward"] if any(run.series("eval/reward")[0] for run in runs) else [])]


def _final(key: str, curve: Curve) -> str:
    """Mean, standard error and range at the last step."""
    factor, unit, form = (100, " %", ".1f") if metric(key).unit == "share" else (1, "", ".3f")
    mean, error = curve.mean[-1] * factor, curve.final_error
    if error is None:
        return f"{mean:{form}}{unit}"
    least, greatest = curve.least[-1] * factor, curve.greatest[-1] * factor
    return f"{mean:{form}} ± {error * factor:{form}}{unit} ({least:{form}} to {greatest:{form}})"


def _headline(bands: Sequence[Band]) -> str:
    key = next((key for key in _held_out_keys(bands) if any(band.curve(key) for band in bands)), None)
    if key is None:
        return "**No evaluation is logged that all runs of a band have.**"
    found = []
    for band in bands:
        curve = band.curve(key)
        if curve is not None:
            found.append(f"{band.label} {_final(key, curve)} at step {curve.steps[-1]}")
    return f"**Held-out {key[5:]}: {'; '.join(found)}.**"


def _bands(bands: Sequence[Band], names: dict[Path, str]) -> str:
    rows = []
    for band in bands:
        seeds = ", ".join(str(seed_of(run)) for run in band.runs)
        steps = sorted({run.last_step for run in band.runs})
        reached = " to ".join(str(step) for step in dict.fromkeys((steps[0], steps[-1])))
        planned = str(band.settings.get("steps", "unknown"))
        rows.append((band.label, ", ".join(names[run.dir] for run in band.runs), seeds, reached, planned))
    note = "A band is the runs that differ in nothing but their seed."
    return f"{markdown_table(('band', 'runs', 'seeds', 'steps done', 'planned'), rows)}\n\n{note}"


def _notes(comparison: Comparison, names: dict[Path, str]) -> list[str]:
    """Runs left out, and what keeps the others from being compared to the end, in sentences."""
    notes = [f"`{names[run.dir]}` is left out. {reason}" for run, reason in comparison.left_out]
    for band in comparison.bands:
        furthest = max(run.last_step for run in band.runs)
        for run in band.runs:
            if run.last_step < furthest:
                ends = f"the curves of its band, {band.label}, end there; another run went on to step {furthest}"
                notes.append(f"`{names[run.dir]}` stands at step {run.last_step}: {ends}.")
        for key in _held_out_keys([band]):
            lacking = [names[run.dir] for run in band.runs if not run.series(key)[0]]
            if lacking:
                notes.append(f"`{key}` is not logged by {', '.join(lacking)}: it is not shown for {band.label}.")
    last = {band.label: curve.steps[-1] for band in comparison.bands if (curve := _lead(band)) is not None}
    if len(set(last.values())) > 1:
        listed = ", ".join(f"{label}: {step}" for label, step in last.items())
        notes.append(f"The last evaluations are of different steps ({listed}).")
    return notes


def _lead(band: Band) -> Curve | None:
    """The first held-out metric that all runs of a band have."""
    curves = (band.curve(key) for key in _held_out_keys([band]))
    return next((curve for curve in curves if curve is not None), None)


def _results(bands: Sequence[Band]) -> str:
    keys = _held_out_keys(bands)
    if not keys:
        return "No evaluation is logged."
    rows = []
    for band in bands:
        lead, curves = _lead(band), [band.curve(key) for key in keys]
        step = "-" if lead is None else str(lead.steps[-1])
        cells = ["-" if curve is None else _final(key, curve) for key, curve in zip(keys, curves, strict=True)]
        rows.append((band.label, str(len(band.runs)), step, *cells))
    note = "Mean ± standard error over seeds (least to greatest), at the last step that all runs of a band evaluated."
    return f"{markdown_table(('band', 'seeds', 'step', *(key[5:] for key in keys)), rows)}\n\n{note}"


def _plots(bands: Sequence[Band], folder: Path) -> str:
    passes = [key for key in _held_out_keys(bands) if key.startswith("eval/pass@")]
    parts = []
    with rc_context(STYLE):
        for stem, heading, keys in PLOTS:
            held_out = list(dict.fromkeys((passes[0], passes[-1]))) if passes and stem == "learning" else []
            figure = plot_bands(bands, [*held_out, *keys])
            if figure is not None:
                figure.savefig(folder / f"{stem}.png")
                parts.append(f"### {heading}\n\n![{heading}]({stem}.png)")
    return "\n\n".join([*parts, CAPTION]) if parts else "Nothing that could be drawn is logged."


def _configuration(bands: Sequence[Band]) -> str:
    settings = [
        band.settings
        | {f"environment: {key}": value for key, value in facts_of([run.environment for run in band.runs]).items()}
        for band in bands
    ]
    keys = differing(settings)
    rows = [(f"`{key}`", *(code(v[key], CELL) if key in v else "-" for v in settings)) for key in keys]
    table = markdown_table(("key", *(band.label for band in bands)), rows) if rows else "The bands do not differ."
    listed = ", ".join(f"`{key}*`" if key.endswith(".") else f"`{key}`" for key in IGNORED)
    but = f"`{ACTS_AHEAD}` with `rollout.ahead`"
    return f"{table}\n\nKeys that change nothing in what a run learns are not compared: {listed}, but {but} is."
