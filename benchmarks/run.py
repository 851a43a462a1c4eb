"""Measure ops: time beside the matrix product of the same shapes in the same run, memory, and error against float64.

    python -m benchmarks.run [--op OP] [--shape SHAPE] [--kind KIND] [--backend NAME] [--peers] [--quick] [--json FILE]
    python -m benchmarks.run --sweep N|V|B

README.md in this folder says what every column means. The exit status is 1 where a backend of this project broke its
contract, or nothing could be measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import above_zero, at_least, device_here
from benchmarks.candidates.lineup import BACKEND_NAMES, Case
from benchmarks.cases.registry import (
    GROUP_KIND,
    GROUP_OP,
    GROUPS,
    HEAD_OPS,
    KINDS,
    OPS,
    QUICK_SHAPES,
    SHAPES,
    SWEEPS,
    Groups,
    Op,
    Shape,
    parse_shape,
)
from benchmarks.cases.workloads import MissingWorkload, group_workload, head_workload
from benchmarks.measuring.accuracy import Expected, expected_groups, expected_head
from benchmarks.measuring.measure import Settings, measure
from benchmarks.measuring.timing import best_rate
from benchmarks.reporting.reports import begin, result_file, write_report
from benchmarks.reporting.tables import case_table

# Beyond this share of a core in use by others, readings on a CPU say more about the others.
_BUSY_CORES = 0.2
# Of the console: more than any table has, which would cut its numbers otherwise.
_WIDTH = 240


@dataclass(frozen=True)
class Plan:
    """What to measure; `sweep` names the size that varies, if one does."""

    ops: tuple[Op, ...]
    shapes: tuple[Shape, ...]
    kinds: tuple[str, ...]
    sweep: str | None = None


def measure_all(plan: Plan, settings: Settings, json_file: Path | None) -> dict[str, Any]:
    """Measure every case, print its table when it is done, and write what there is so far."""
    console, facts = begin(settings.torch_device, width=_WIDTH)
    if settings.device == "cpu" and (facts["busy_cores"] or 0) > _BUSY_CORES:
        console.print(f"[bold yellow]other processes keep {facts['busy_cores']} cores busy: times below mislead[/]")
    best = best_rate(settings.torch_dtype, settings.torch_device)
    console.print(f"fastest {settings.dtype} square product found here: {best / 1e9:.0f} GFLOP/s")
    report: dict[str, Any] = {
        "settings": asdict(settings),
        "best_gflops": best / 1e9,
        "sweep": plan.sweep,
        "left_out": [],
        "rows": [],
    }
    for sizes, kind, case, expected in _cases(plan, settings, report["left_out"]):
        where = {"op": case.op.name, "sizes": sizes._asdict(), "kind": kind, "dtype": settings.dtype}
        rows = [where | row for row in measure(case, expected, settings, best)]
        console.print(case_table(case.op, sizes.label, kind, rows))
        report["rows"] += rows
        write_report(json_file, facts, **report)
    for line in report["left_out"]:
        console.print(f"left out: {line}")
    return report


def _cases(plan: Plan, settings: Settings, left_out: list[str]) -> Iterator[tuple[Shape | Groups, str, Case, Expected]]:
    device, dtype = settings.torch_device, settings.torch_dtype
    head_ops = [op for op in plan.ops if op is not GROUP_OP]
    for shape in plan.shapes if head_ops else ():
        for kind in plan.kinds:
            try:
                for case, expected in head_cases(shape, kind, head_ops, device, dtype):
                    yield shape, kind, case, expected
            except MissingWorkload as error:
                left_out.append(f"{shape.label}, {kind}: {error}")
    if GROUP_OP in plan.ops:
        sample = group_workload(GROUPS, device)
        expected = expected_groups(sample.features, sample.rewards, sample.m)
        yield GROUPS, GROUP_KIND, Case(GROUP_OP, sample), expected


def head_cases(
    shape: Shape, kind: str, ops: list[Op], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Case, Expected]]:
    """Cases of one set of inputs, which share an oracle."""
    sample = head_workload(shape, kind, dtype, device)
    random = torch.Generator().manual_seed(2)
    g_logps, g_entropy = (torch.randn(shape.N, generator=random).to(device) / shape.N for _ in range(2))
    forward: Expected | None = None
    for op in ops:
        if "backward" in op.name:
            upstream = (g_logps, g_entropy if "entropy" in op.name else None)
            yield Case(op, sample, upstream=upstream), expected_head(sample, upstream)
            continue
        forward = forward or expected_head(sample)
        lse = forward.results["lse"].float() if op.name.endswith("_lse") else None
        yield Case(op, sample, lse), forward


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    quick = arguments.quick
    if arguments.sweep and (arguments.shape or quick):
        parser.error("--sweep: expected no --shape and no --quick beside it, since it has shapes of its own")
    settings = Settings(
        arguments.device,
        arguments.dtype,
        arguments.rounds or (5 if quick else 9),
        arguments.limit or (5.0 if quick else 30.0),
        arguments.peers,
        arguments.backend,
    )
    report = measure_all(_plan(arguments), settings, arguments.json)
    failed = any(row["role"] == "ours" and row["status"] == "failed" for row in report["rows"])
    return int(failed or not report["rows"])


def _plan(arguments: argparse.Namespace) -> Plan:
    device = arguments.device
    names = arguments.op or ([HEAD_OPS[0].name] if arguments.sweep else list(OPS))
    ops = tuple(OPS[name] for name in names)
    if arguments.sweep:
        return Plan(ops, SWEEPS[device][arguments.sweep], tuple(arguments.kind or ("random",)), arguments.sweep)
    shapes = (QUICK_SHAPES if arguments.quick else SHAPES)[device]
    if arguments.shape:
        try:
            shapes = tuple(parse_shape(text, device) for text in arguments.shape)
        except ValueError as error:
            sys.exit(str(error))
    return Plan(ops, shapes, tuple(arguments.kind or ("peaked", "real")))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--op", action="append", choices=list(OPS), help="repeatable; all by default")
    parser.add_argument("--shape", action="append", help="name in cases/registry.py, or NxBxdxV; repeatable")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="inputs; peaked and real by default")
    parser.add_argument("--backend", action="append", choices=BACKEND_NAMES, help="repeatable; all by default")
    parser.add_argument("--peers", action="store_true", help="all peers, not the eager baseline alone")
    parser.add_argument("--quick", action="store_true", help="one small shape and few rounds")
    parser.add_argument("--sweep", choices=("N", "V", "B"), help="cost and memory against one size")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write every row here")
    parser.add_argument("--rounds", type=at_least(1), help="timed samples of each candidate")
    parser.add_argument("--limit", type=above_zero, metavar="SECONDS", help="slower candidates sit out further rounds")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device_here, choices=("cpu", "cuda"), default=default)
    return parser


if __name__ == "__main__":
    sys.exit(main())
