"""Write the tables of README.md and results/README.md between their markers, from the files in results/.

python -m benchmarks.readme            write them
python -m benchmarks.readme --check    exit with 1 where they differ from what the files say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.candidates.lineup import BASELINE
from benchmarks.cases.registry import GROUP_KIND, OPS
from benchmarks.reporting.reports import FOLDER, Report, Row, label, load, named, timed, worst_measure
from benchmarks.reporting.tables import ERRORS, digits, milliseconds

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
# The README's rows: hard inputs in the models' own dtype, enough tokens for a step, and the ops that a step calls.
_SUMMARY_OPS = ("sequence_features", "token_logprobs", "logprobs_backward", "g2rl_advantages")
_SUMMARY_KINDS = ("peaked", GROUP_KIND)
_SUMMARY_TOKENS = 1024


def summary(reports: list[Report]) -> str:
    """For the README: ours, eager and the fastest peer, one line a case; one table and one plot a machine."""
    machines: dict[str, list[tuple[Report, list[Row]]]] = {}
    for report in reports:
        for case in report.cases() if report.sweep is None else ():
            if _in_summary(case[0]):
                machines.setdefault(report.hardware, []).append((report, case))
    blocks = []
    for hardware, found in machines.items():
        richest, _ = max(found, key=lambda of: len(timed(of[1])))
        cases = sorted((case for _, case in found), key=_summary_order)
        blocks.append(f"{hardware}\n\n{_summary_table(cases)}\n\n{_plot(richest, 'benchmarks/results/')}")
    blocks += [_step(report) for report in reports if "step" in report.content]
    if not blocks:
        return "Nothing has been measured on this version yet: `make bench`."
    blocks.append(
        "Times are medians; `x mm` is the ratio to `torch.mm` of the same shapes (three of them for the backward pass) "
        "in the same run; memory is the peak beyond the inputs, as a share of the logits' bytes in fp32; "
        "errors are the worst of any response or token against float64, and those of peers are by design: they round "
        "logits. Every "
        "candidate, input and error: [results](benchmarks/results/README.md); how to measure: "
        "[benchmarks](benchmarks/README.md)."
    )
    return "\n\n".join(blocks)


def _in_summary(row: Row) -> bool:
    return (
        row["op"] in _SUMMARY_OPS
        and row["kind"] in _SUMMARY_KINDS
        and row["dtype"] == "bfloat16"
        and row["sizes"].get("N", _SUMMARY_TOKENS) >= _SUMMARY_TOKENS
    )


def _summary_order(case: list[Row]) -> tuple[Any, ...]:
    """By op, then as the sizes grow."""
    sizes = case[0]["sizes"]
    return _SUMMARY_OPS.index(case[0]["op"]), sizes["d"], sizes.get("N", 0)


def _summary_table(cases: list[list[Row]]) -> str:
    heads = [
        "op",
        "head",
        "g2rl, ms",
        "x mm",
        "eager, ms",
        "fastest peer, ms",
        "memory: g2rl / eager",
        "error: g2rl / eager",
    ]
    lines = [heads, ["---", "---", *["---:"] * 6]]
    for rows in cases:
        eager = named(rows, BASELINE)
        peers = [row for row in timed(rows, "peer") if row["candidate"] != BASELINE]
        for ours in _fastest_backend(rows):
            lines.append(
                [
                    f"`{ours['op']}`",
                    label(ours),
                    f"**{milliseconds(ours['median_s'])}** ({ours['candidate'].removeprefix('g2rl ')})",
                    digits(ours.get("times_floor")),
                    "" if eager is None else milliseconds(eager["median_s"]),
                    f"{milliseconds(peers[0]['median_s'])} ({_peer_name(peers[0])})" if peers else "",
                    _pair(ours, eager, lambda row: _percent(row.get("percent_of_logits"))),
                    _pair(ours, eager, _worst_error),
                ]
            )
    return _markdown(lines)


def _fastest_backend(rows: list[Row]) -> list[Row]:
    """The rows of this project's fastest backend: by default, and with other settings."""
    ours = timed(rows, "ours")
    backend = ours[0]["candidate"].partition(",")[0] if ours else None
    return sorted(
        (row for row in ours if row["candidate"].partition(",")[0] == backend), key=lambda row: row["candidate"]
    )


def _worst_error(row: Row) -> str:
    measure = worst_measure(row)
    return f"{row['errors'][measure]:.0e}" if measure else ""


def _peer_name(row: Row) -> str:
    """The peer, and what of the op it leaves out."""
    wants_entropy = "entropy" in OPS[row["op"]].outputs
    return row["candidate"] + (", no entropy" if wants_entropy and "entropy_absolute" not in row["errors"] else "")


def _pair(ours: Row, eager: Row | None, show: Callable[[Row], str]) -> str:
    shown = [show(row) for row in (ours, eager) if row is not None]
    return " / ".join(shown) if any(shown) else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{digits(value)} %"


def _step(report: Report) -> str:
    """One sentence on what G2RL adds to a training step."""
    change = report.content["added"]["g2rl"]
    memory = "" if change["memory"] is None else f" and {change['memory']:+.1f} % memory"
    spread = "" if change["time_spread"] is None else f" (spread {change['time_spread']:.1f})"
    return (
        f"A training step with G2RL against plain GRPO, same code and rollouts (`{report.content['config']['file']}`): "
        f"{change['time']:+.1f} % time{spread}{memory}. {report.machine}"
    )


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
    heads += ["extra MB", "% fp32 logits", *(ERRORS[measure] for measure in measures), "bounds"]
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


def replaced(text: str, block: str, name: str) -> str:
    """`text` with `block` between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{name}: expected {BEGIN} and then {END}, once each")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is out of date")
    check = parser.parse_args().check
    reports = load()
    stale = []
    for path, block in ((ROOT / "README.md", summary(reports)), (FOLDER / "README.md", details(reports))):
        text = path.read_text()
        try:
            wanted = replaced(text, block, str(path.relative_to(ROOT)))
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
