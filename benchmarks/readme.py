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
from benchmarks.cases.registry import GROUP_KIND, OPS
from benchmarks.reporting.reports import FOLDER, Report, Row, label, load, named, timed, worst_measure
from benchmarks.reporting.tables import ERRORS, digits, milliseconds
from g2rl.study.tables import headline

ROOT = Path(__file__).parent.parent
STUDY = "studies/methods"
GRADIENTS = ROOT / "studies" / "gradients"
# The README's rows: hard inputs, enough tokens for a step, and the ops that a step calls.
_SUMMARY_OPS = ("token_logprobs", "sequence_features", "logprobs_backward", "g2rl_advantages")
_SUMMARY_KINDS = ("peaked", GROUP_KIND)
_SUMMARY_TOKENS = 1024


def summary(reports: list[Report]) -> str:
    """For the README: the best and worst reading of each op on each processor, and what a training step costs."""
    found: dict[tuple[str, str, str], list[list[Row]]] = {}
    for report in reports:
        for case in report.cases() if report.sweep is None else ():
            if _in_summary(case[0]) and timed(case, "ours"):
                key = (report.processor, case[0]["op"], "" if case[0]["kind"] == GROUP_KIND else case[0]["dtype"])
                found.setdefault(key, []).append(case)
    blocks = [_summary_table(found)] if found else []
    blocks += [_step(report) for report in reports if "step" in report.content]
    blocks += [_trl_step(report) for report in reports if "trl_step" in report.content]
    blocks += [_prefix_sharing(report) for report in reports if "prefix_sharing" in report.content]
    blocks += [_rollouts(report) for report in reports if "rollout" in report.content]
    if not blocks:
        return "Nothing has been measured on this version yet: `make bench`."
    blocks.append(
        "Best to worst over heads of 49 to 152 thousand words, and over workspaces. `x torch.mm`: `torch.mm` of the "
        "same shapes in the same run (three of them for the backward pass); memory is the peak beyond the inputs, as "
        "a share of the logits' bytes in fp32; errors are against float64, eager PyTorch's 1e-3 to 1e-1 in bf16. Every "
        "candidate, peer, input and version: [results](benchmarks/results/README.md); how to measure: "
        "[benchmarks](benchmarks/README.md)."
    )
    return "\n\n".join(blocks)


def _in_summary(row: Row) -> bool:
    return (
        row["op"] in _SUMMARY_OPS
        and row["kind"] in _SUMMARY_KINDS
        and row["sizes"].get("N", _SUMMARY_TOKENS) >= _SUMMARY_TOKENS
    )


def _summary_table(found: dict[tuple[str, str, str], list[list[Row]]]) -> str:
    heads = ["processor", "op", "dtype", "x `torch.mm`", "faster than eager", "memory", "worst error"]
    lines = [heads, ["---", "---", "---", *["---:"] * 4]]
    order = sorted(found, key=lambda key: (key[0], _SUMMARY_OPS.index(key[1]), key[2]))
    for processor, op, dtype in order:
        pairs = [(row, named(rows, BASELINE)) for rows in found[processor, op, dtype] for row in _fastest_backend(rows)]
        ours = [row for row, _ in pairs]
        faster = [eager["median_s"] / row["median_s"] for row, eager in pairs if eager is not None]
        errors = [row["errors"][measure] for row in ours if (measure := worst_measure(row))]
        lines.append(
            [
                processor,
                f"`{op}`",
                dtype,
                _span([row["times_floor"] for row in ours if "times_floor" in row]),
                _span(faster, " x", best=max),
                _span([row["percent_of_logits"] for row in ours if row.get("percent_of_logits")], " %"),
                f"{max(errors):.0e}" if errors else "",
            ]
        )
    return _markdown(lines)


def _span(values: list[float], unit: str = "", best: Callable[[list[float]], float] = min) -> str:
    """The best value, to the worst where that reads otherwise."""
    if not values:
        return ""
    worst = max if best is min else min
    ends = dict.fromkeys((digits(best(values)), digits(worst(values))))
    return " to ".join(ends) + unit


def _fastest_backend(rows: list[Row]) -> list[Row]:
    """The rows of this project's fastest backend: by default, and with other settings."""
    ours = timed(rows, "ours")
    backend = ours[0]["candidate"].partition(",")[0] if ours else None
    return [row for row in ours if row["candidate"].partition(",")[0] == backend]


def _step(report: Report) -> str:
    """One sentence on what G2RL adds to a training step."""
    change = report.content["added"]["g2rl"]
    memory = "" if change["memory"] is None else f" and {change['memory']:+.1f} % memory"
    spread = "" if change["time_spread"] is None else f" (spread {change['time_spread']:.1f})"
    return (
        f"A training step with G2RL against plain GRPO, same code and rollouts (`{report.content['config']['file']}`): "
        f"{change['time']:+.1f} % time{spread}{memory}. {report.machine}"
    )


def _trl_step(report: Report) -> str:
    """Seconds and memory of a step through TRL, one column for each length."""
    content = report.content["trl_step"]
    heads = ["a training step", *(f"{tokens} tokens, s (x TRL), peak memory" for tokens in content)]
    lines = [heads, ["---", *["---:"] * len(content)]]
    for name in next(iter(content.values())):
        cells = [name]
        for measured in content.values():
            plain = statistics.median(next(iter(measured.values()))["seconds"])
            median = statistics.median(measured[name]["seconds"])
            peak = digits(max(measured[name]["peak_bytes"]) / 1e9)
            cells.append(f"{digits(median)} ({digits(median / plain)}), {peak} GB")
        lines.append(cells)
    return f"SmolLM2-135M, 64 responses, {report.machine}:\n\n{_markdown(lines)}"


def _prefix_sharing(report: Report) -> str:
    """One sentence on what it saves to compute a prompt once for its group."""
    content = report.content["prefix_sharing"].values()
    cases = [
        f"{case['faster']:.1f} x with {case['sizes']['m']} responses of {case['sizes']['response']} tokens to each "
        f"prompt of {case['sizes']['prompt']}"
        for case in content
    ]
    worst = max(case["gradient_difference_float32"] for case in content)
    return (
        "A prompt is computed once for the responses of its group (`model.prefix_sharing`). Forward and backward pass "
        f"of SmolLM2-135M get faster: {', '.join(cases)}; gradients are those of padded copies to {worst:.0e} in fp32. "
        f"{report.machine}"
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
    return f"Response tokens a second (x `generate`), SmolLM2-135M, {report.machine}{without}:\n\n{_markdown(lines)}"


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
    largest = [metric for metric in next(iter(tasks))["metrics"] if metric.startswith("pass@")][-1]
    steps, held_out = ({str(task[key]) for task in tasks} for key in ("steps", "held_out"))
    counts, device = content["runs"], content["environment"].get("device", "an unknown device")
    facts = (
        f"{counts['finished']} of {counts['planned']} runs, {len(content['seeds'])} seeds, "
        f"{' or '.join(sorted(steps))} steps, {' or '.join(sorted(held_out))} held-out problems a task, {device}. In "
        f"brackets: 95 % interval over seeds and problems; p: {content['test']}. [Report]({folder}/report.md)."
    )
    metrics = dict.fromkeys(("pass@1", largest))
    tables = "\n\n".join(headline(content, metric) for metric in metrics)
    return f"{tables}\n\n{facts}\n\n![Held-out pass@1 over training]({folder}/overview.png)"


def details(reports: list[Report]) -> str:
    """For results/README.md: every candidate of every case, with the reason where there is no time."""
    blocks = []
    for report in reports:
        if not report.rows:
            continue
        blocks.append(f"### {report.name}\n\n{report.machine}\n\n{_plot(report, '')}")
        for rows in report.cases():
            first = rows[0]
            blocks.append(
                f"`{first['op']}`, {label(first)}, {first['kind']}, {first['dtype']}\n\n{_details_table(rows)}"
            )
    return "\n\n".join(blocks) or "No files yet."


def _details_table(rows: list[Row]) -> str:
    measures = [measure for measure in ERRORS if any(measure in row.get("errors", {}) for row in rows)]
    ratio = "times_floor" if OPS[rows[0]["op"]].products else "times_eager"
    heads = ["candidate", "ms", "± IQR", "x mm" if ratio == "times_floor" else "x eager", "GFLOP/s", "% best"]
    launch = any(row.get("launch_s") is not None for row in rows)
    heads += [
        "extra MB",
        "% fp32 logits",
        *(["launch ms"] if launch else []),
        *(ERRORS[measure] for measure in measures),
        "bounds",
    ]
    lines = [heads, ["---", *["---:"] * (len(heads) - 2), "---"]]
    for row in rows:
        if row["status"] == "unavailable":
            continue
        extra = row.get("extra_bytes")
        found = row.get("errors", {})
        lines.append(
            [
                row["candidate"],
                milliseconds(row.get("median_s")),
                milliseconds(row.get("spread_s")),
                digits(row.get(ratio)),
                digits(row.get("gflops")),
                digits(row.get("percent_of_best")),
                digits(None if extra is None else extra / 1e6),
                digits(row.get("percent_of_logits")),
                *([milliseconds(row.get("launch_s"))] if launch else []),
                *(f"{found[measure]:.1e}" if measure in found else "" for measure in measures),
                row["note"] if row["role"] == "floor" else row["status"],
            ]
        )
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] in ("unavailable", "failed"):
            reasons.setdefault(row["reason"], []).append(row["candidate"])
    missing = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
    return _markdown(lines) + (f"\n\nNot timed: {missing}." if missing else "")


def _markdown(lines: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plot(report: Report, prefix: str) -> str:
    """A link to the file's plot, if there is one."""
    return f"![{report.name}]({prefix}{report.name}.png)" if (FOLDER / f"{report.name}.png").is_file() else ""


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
        return _markdown(lines)
    heads = ["task, model", "all weights", "last layer alone", "first layer alone", "the best without Φ", "pairs"]
    rows = [_gradient_row(name, of) for name, of in studies.items()]
    return (
        "Does the cosine of Φ say what full gradients do? Its correlation with the cosine of gradients, inside "
        "problems, with 95 % intervals ([study](studies/gradients/README.md)):\n\n"
        f"{_markdown([heads, ['---', *['---:'] * (len(heads) - 1)], *rows])}"
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
        (
            ROOT / "README.md",
            {"benchmarks": summary(reports), "study": study(STUDY), "gradients": gradients(table=False)},
        ),
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
