"""Write the tables of README.md and other pages between their markers, from the files in results/ and studies/.

python -m benchmarks.readme            write them
python -m benchmarks.readme --check    exit with 1 where they differ from what the files say
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.candidates.lineup import BASELINE
from benchmarks.cases.registry import OPS
from benchmarks.reporting.reports import FOLDER, Report, Row, label, load, named, timed, times_out, worst_measure
from benchmarks.reporting.tables import case_cells, digits, markdown, not_timed
from benchmarks.trl_step import times_baseline
from g2rl.bootstrap import coverage
from g2rl.study.tables import change, headline

ROOT = Path(__file__).parent.parent
STUDY = "studies/methods"
AGAIN = "studies/replication"
GRADIENTS = ROOT / "studies" / "gradients"
# The README's rows: hard inputs, enough tokens for a step, and the ops that a step calls.
_SUMMARY_OPS = ("token_logprobs", "sequence_features", "logprobs_backward")
_SUMMARY_KIND = "peaked"
_SUMMARY_TOKENS = 1024
_LEGEND = (
    "Times are multiples of `torch.mm` of the same shapes in the same run (three products for the backward pass): as a "
    "plain call, which allocates its result, and with `out=`, into memory that was touched before; best to worst over "
    "heads of 49 to 152 thousand words, and over workspaces. Memory is the peak beyond the inputs, as a share of the "
    "logits' bytes in fp32, for the backward pass of both passes. Errors are against float64, of log p absolute, of "
    "Phi and gradients relative. Other instruction sets, every candidate, peer, input and version: "
    "[results](benchmarks/results/README.md); how to measure: [benchmarks](benchmarks/README.md)."
)

Key = tuple[str, str, str]


def summary(reports: list[Report]) -> str:
    """For the README: best and worst reading of each op on each processor, and what a training step costs."""
    found: dict[Key, list[list[Row]]] = {}
    for report in reports:
        for case in report.cases() if report.sweep is None and report.fastest_instructions else ():
            if _in_summary(case[0]) and timed(case, "ours"):
                found.setdefault((report.processor, case[0]["dtype"], case[0]["op"]), []).append(case)
    blocks = [_summary_table(found), _LEGEND] if found else []
    blocks += [_step(report) for report in reports if "step" in report.content]
    blocks += [_trl_step(report) for report in reports if "trl_step" in report.content]
    return "\n\n".join(blocks) or "Nothing has been measured on this version yet: `make bench`."


def _in_summary(row: Row) -> bool:
    return (
        row["op"] in _SUMMARY_OPS
        and row["kind"] == _SUMMARY_KIND
        and row["sizes"].get("N", _SUMMARY_TOKENS) >= _SUMMARY_TOKENS
    )


def _summary_table(found: dict[Key, list[list[Row]]]) -> str:
    heads = ["processor", "dtype", "op", "x `torch.mm`", "with `out=`", "faster than eager", "memory"]
    heads += ["worst error", "eager's"]
    lines = [heads, ["---", "---", "---", *["---:"] * (len(heads) - 3)]]
    for processor, dtype, op in sorted(found, key=lambda key: (*key[:2], _SUMMARY_OPS.index(key[2]))):
        cases = [(rows, named(rows, BASELINE), _fastest_backend(rows)) for rows in found[processor, dtype, op]]
        ours = [row for _, _, fastest in cases for row in fastest]
        out = [times for rows, _, fastest in cases for row in fastest if (times := times_out(row, rows)) is not None]
        faster = [eager["median_s"] / row["median_s"] for _, eager, fastest in cases if eager for row in fastest]
        lines.append(
            [
                processor,
                dtype,
                f"`{op}`",
                _span([row["times_floor"] for row in ours if "times_floor" in row], "{:.2f}".format),
                _span(out, "{:.2f}".format),
                _span(faster, _two_digits, " x", best=max),
                _span([row["percent_of_logits"] for row in ours if row.get("percent_of_logits")], _two_digits, " %"),
                _worst_error(ours),
                _worst_error([eager for _, eager, _ in cases if eager]),
            ]
        )
    return markdown(lines)


def _worst_error(rows: list[Row]) -> str:
    errors = [row["errors"][measure] for row in rows if (measure := worst_measure(row))]
    return f"{max(errors):.0e}" if errors else ""


def _span(
    values: list[float], shown: Callable[[float], str], unit: str = "", best: Callable[[list[float]], float] = min
) -> str:
    """The best value, to the worst where that reads otherwise."""
    if not values:
        return ""
    worst = max if best is min else min
    return " to ".join(dict.fromkeys((shown(best(values)), shown(worst(values))))) + unit


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _fastest_backend(rows: list[Row]) -> list[Row]:
    """The rows of this project's fastest backend: by default, and with other settings."""
    ours = timed(rows, "ours")
    backend = ours[0]["candidate"].partition(",")[0] if ours else None
    return [row for row in ours if row["candidate"].partition(",")[0] == backend]


def _step(report: Report) -> str:
    """One sentence on what G2RL adds to a training step."""
    change = report.content["added"]["g2rl"]
    # One reading of memory, without a spread, says nothing: it moves by more than what is added.
    known = [what for what in ("time", "memory") if change.get(f"{what}_spread") is not None]
    added = " and ".join(_change(what, change[what], change[f"{what}_spread"]) for what in known)
    return (
        f"A training step with G2RL against plain GRPO, same code and rollouts (`{report.content['config']['file']}`): "
        f"{added or 'not known, of too few rounds'}. {report.machine}"
    )


def _change(what: str, percent: float, spread: float) -> str:
    noise = ", within noise" if abs(percent) < spread else ""
    return f"{percent:+.1f} % {what} (spread {spread:.1f}{noise})"


def _trl_step(report: Report) -> str:
    """Seconds and memory of a step through TRL, one column for each length."""
    content = report.content["trl_step"]
    heads = ["a training step", *(f"{tokens} tokens, s (x TRL), peak memory" for tokens in content)]
    lines = [heads, ["---", *["---:"] * len(content)]]
    for name in next(iter(content.values())):
        cells = [name]
        for measured in content.values():
            median, times = digits(statistics.median(measured[name]["seconds"])), digits(times_baseline(measured)[name])
            peak = digits(max(measured[name]["peak_bytes"]) / 1e9)
            cells.append(f"{median} ({times or '-'}), {peak} GB")
        lines.append(cells)
    return f"SmolLM2-135M, 64 responses, {report.machine}:\n\n{markdown(lines)}"


def training(reports: list[Report]) -> str:
    """For docs/TRAINING.md: what shared prompts save, and the sampling engines' speed."""
    blocks = [_prefix_sharing(report) for report in reports if "prefix_sharing" in report.content]
    blocks += [_rollouts(report) for report in reports if "rollout" in report.content]
    return "\n\n".join(blocks) or "Nothing has been measured on this version yet."


def _prefix_sharing(report: Report) -> str:
    """One sentence on what it saves to compute a prompt once for its group."""
    content = report.content["prefix_sharing"].values()
    cases = [
        f"{case['faster']:.1f} x faster with {case['sizes']['m']} responses of {case['sizes']['response']} tokens to "
        f"each prompt of {case['sizes']['prompt']}"
        for case in content
    ]
    worst = max(case["gradient_difference_float32"] for case in content)
    return (
        f"Forward and backward pass of SmolLM2-135M with prompts computed once for their groups: {', '.join(cases)}; "
        f"gradients are those of padded copies to {worst:.0e} in fp32. {report.machine}"
    )


def _rollouts(report: Report) -> str:
    """Tokens a second of the sampling engines, a line for each case."""
    content = report.content["rollout"]
    names = list(next(iter(content.values()))["tokens"])
    lines = [["64 responses", *names], ["---", *["---:"] * len(names)]]
    for case, measured in content.items():
        rate = measured["rate"]
        times = rate["times"]["generate"]
        lines.append([case, *(f"{digits(rate['median'][name])} ({times[name]:.2f} x)" for name in names)])
    without = "; without vLLM" if report.content["without_vllm"] else ""
    return f"Response tokens a second (x `generate`), SmolLM2-135M, {report.machine}{without}:\n\n{markdown(lines)}"


def study(folder: str) -> str:
    """For the README: held-out results of each method and task, and their curves, from a study's ``results.json``.

    Args:
        folder: of the study, relative to the repository.
    """
    path = ROOT / folder / "results.json"
    if not path.is_file():
        return "It has not been run on this version yet."
    content = json.loads(path.read_text())
    tasks = content["tasks"].values()
    steps, held_out = ({str(task[key]) for task in tasks} for key in ("steps", "held_out"))
    counts, device = content["runs"], content["environment"].get("device", "an unknown device")
    facts = (
        f"{counts['finished']} of {counts['planned']} runs, {len(content['seeds'])} seeds, "
        f"{' or '.join(sorted(steps))} steps, {' or '.join(sorted(held_out))} held-out problems a task, {device}. In "
        f"brackets: 95 % interval over seeds and problems{_narrow(len(content['seeds']))}; p: {content['test']}. "
        f"[Report]({folder}/report.md)."
    )
    metrics = dict.fromkeys(("pass@1", _largest_k(content)))
    tables = "\n\n".join(headline(content, metric) for metric in metrics)
    return f"{tables}\n\n{facts}\n\n![Held-out pass@1 over training]({folder}/overview.png)"


def again(folder: str) -> str:
    """For the README: what a study that asks a question of another one again has found, in a sentence."""
    path = ROOT / folder / "results.json"
    if not path.is_file():
        return ""
    content = json.loads(path.read_text())
    metric = _largest_k(content)
    found = "; ".join(
        f"{method} {change(of[metric])} against {content['baseline']}" for method, of in content["all_tasks"].items()
    )
    return (
        f"The same with {len(content['seeds'])} other seeds, question and seeds written down before they had ended: "
        f"{metric} over all tasks, {found}. [What that says]({folder}/README.md)."
    )


def _largest_k(content: dict[str, Any]) -> str:
    """Its pass@k of the most samples."""
    metrics: list[str] = next(iter(content["tasks"].values()))["metrics"]
    return [metric for metric in metrics if metric.startswith("pass@")][-1]


def _narrow(seeds: int) -> str:
    """How often an interval of so few seeds holds the truth."""
    if seeds < 2:
        return ""
    return (
        f", too narrow for few seeds: of {seeds} it holds the truth in {100 * coverage(seeds):.0f} to 95 % of studies"
    )


def details(reports: list[Report]) -> str:
    """For results/README.md: every candidate of every case, with the reason where there is no time."""
    blocks = []
    for report in reports:
        if not report.rows:
            continue
        blocks.append(f"### {report.name}\n\n{report.machine}\n\n{_plot(report)}")
        for rows in report.cases():
            first = rows[0]
            blocks.append(
                f"`{first['op']}`, {label(first)}, {first['kind']}, {first['dtype']}\n\n{_details_table(rows)}"
            )
    return "\n\n".join(blocks) or "No files yet."


def _details_table(rows: list[Row]) -> str:
    heads, *lines = case_cells(OPS[rows[0]["op"]], rows)
    reasons = not_timed(rows)
    table = markdown([heads, ["---", *["---:"] * (len(heads) - 2), "---"], *lines])
    return table + (f"\n\nNot timed: {reasons}." if reasons else "")


def _plot(report: Report) -> str:
    """A link to the file's plot, if there is one."""
    return f"![{report.name}]({report.name}.png)" if (FOLDER / f"{report.name}.png").is_file() else ""


def gradients(table: bool) -> str:
    """What the cosine of Phi says of true gradients, from the folders of studies/gradients; in short or all of it."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(GRADIENTS.glob("*/geometry.json"))}
    studies = {
        f"{name}, {model.partition('-step-')[0]}": of
        for name, record in found.items()
        for model, of in record["gradients"].items()
    }
    if not studies:
        return "Nothing has been measured yet."
    if table:
        names = list(next(iter(studies.values()))["predictors"])
        lines = [["cosine by", *studies], ["---", *["---:"] * len(studies)]]
        lines += [
            [name.replace("phi", "Φ"), *(_inside(of["predictors"][name]) for of in studies.values())] for name in names
        ]
        lines += [
            [f"Φ, gradient of {part} alone", *(_inside(of["parts"].get(part)) for of in studies.values())]
            for part in _parts_shown(studies.values())
        ]
        lines.append(["scores ν from Φ (Spearman)", *(_interval(of["scores"]["phi"]) for of in studies.values())])
        lines.append(["pairs", *(str(of["pairs"]) for of in studies.values())])
        return markdown(lines)
    heads = ["task, model", "all weights", "last layer alone", "first layer alone", "the best without Φ", "pairs"]
    rows = [_gradient_row(name, of) for name, of in studies.items()]
    return (
        "Does the cosine of Φ say what full gradients do? Its correlation with the cosine of gradients, inside "
        "problems, with 95 % intervals ([study](../studies/gradients/README.md)):\n\n"
        f"{markdown([heads, ['---', *['---:'] * (len(heads) - 1)], *rows])}"
    )


def _parts_shown(studies: Iterable[dict[str, Any]]) -> list[str]:
    """The first, the middle and the last layer, all of them, and the embedding."""
    parts = next(iter(studies))["parts"]
    layers = [part for part in parts if part.startswith("layer ")]
    middle = [layers[k] for k in sorted({0, len(layers) // 2, len(layers) - 1})]
    return [*middle, *(part for part in ("all layers", "embedding and head", "head") if part in parts)]


def _inside(ways: dict[str, Any] | None) -> str:
    """Pearson's correlation inside problems with its interval."""
    return _interval(ways and ways["pearson within"])


def _interval(found: dict[str, Any] | None) -> str:
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]" if found else ""


def _gradient_row(name: str, of: dict[str, Any]) -> list[str]:
    others = ("mean hidden", "bag of tokens", "semantic", "length")
    known = {key: of["predictors"][key] for key in others if of["predictors"].get(key, {}).get("pearson within")}
    best = max(known, key=lambda key: known[key]["pearson within"]["value"])
    last = [part for part in of["parts"] if part.startswith("layer ")][-1]
    found = [of["predictors"]["phi"], of["parts"][last], of["parts"]["layer 0"]]
    return [name, *map(_inside, found), f"{_inside(known[best])}, {best}", str(of["pairs"])]


def replaced(text: str, block: str, name: str, tag: str = "benchmarks") -> str:
    """`text` with `block` between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = f"<!-- {tag} -->", f"<!-- /{tag} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{name}: expected {begin} and then {end}, once each")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{block.strip()}\n{end}{rest.partition(end)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is out of date")
    check = parser.parse_args().check
    reports = load()
    stale = []
    pages = (
        (ROOT / "README.md", {"benchmarks": summary(reports), "study": study(STUDY), "again": again(AGAIN)}),
        (ROOT / "docs" / "TRAINING.md", {"benchmarks": training(reports), "gradients": gradients(table=False)}),
        (FOLDER / "README.md", {"benchmarks": details(reports)}),
        (GRADIENTS / "README.md", {"gradients": gradients(table=True)}),
    )
    for path, blocks in pages:
        text = wanted = path.read_text()
        try:
            for tag, block in blocks.items():
                wanted = replaced(wanted, block, str(path.relative_to(ROOT)), tag)
        except ValueError as error:
            sys.exit(str(error))
        if wanted != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(wanted)
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python -m benchmarks.readme")
        return 1
    print(f"{'checked' if check else 'written'}: {len(reports)} result files, {len(stale)} changes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
