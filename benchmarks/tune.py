"""Time other tiles beside the table's in each kernel with a product, on the GPU that is there.

    python -m benchmarks.tune [--kernel NAME ...] [--shape SHAPE] [--seconds S] [--json FILE]
    python -m benchmarks.tune --compile sm_90 [--kernel NAME ...]    # needs no GPU: registers, spills, shared
                                                                    # memory, and counts of instructions

The fastest tile is printed as a line for g2rl_kernels/backends/triton/configs.py, to be pasted there by hand. At run
time the table stays fixed: a tile decides in which order sums are taken, so that a choice by timing would change bits
between runs. A tile's result is compared with that of the table's tile first; where it is off by more than the contract
allows, it has no time, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from benchmarks.arguments import above_zero, gpu_shape
from benchmarks.candidates.lineup import FLOOR
from benchmarks.cases.kernel_work import work
from benchmarks.cases.registry import Shape
from benchmarks.cases.workloads import head_workload
from benchmarks.measuring.accuracy import Expected, Results, broken_bounds, errors
from benchmarks.measuring.timing import Run, interleave
from benchmarks.reporting.reports import begin, result_file, write_report
from benchmarks.reporting.tables import milliseconds
from g2rl_kernels.backends.triton import configs
from g2rl_kernels.backends.triton.candidates import KERNELS, candidates
from g2rl_kernels.backends.triton.compilation import (
    Case,
    Compiled,
    chip_name,
    compiled_in_parallel,
    instructions,
    misfits,
    parse_chip,
    product_case,
)
from g2rl_kernels.backends.triton.configs import Chip, Tile
from g2rl_kernels.testing import HeadSample

Row = dict[str, Any]
Where = tuple[torch.device, Chip]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of which a kernel's time is made: products and waits for them, sums of tiles, epilogues, exponentials, copies.
_COUNTED = ("HGMMA", "HMMA", "UTCHMMA", "WARPGROUP.DEPBAR", "LDTM", "FADD", "FFMA", "FMUL", "MUFU", "UTMALDG", "LDGSTS")
_ROUNDS = 9
# A candidate that has used so many seconds sits out further rounds.
_LIMIT_S = 2.0


@contextmanager
def overridden(kernel: str, tile: Tile) -> Iterator[None]:
    """Inside the block, `kernel`, as the table calls it, runs with this tile."""
    chosen = configs.tile

    def instead(name: str, hidden: Tensor, weight: Tensor, work: str = "") -> Tile:
        return tile if (f"{name}-{work}" if work else name) == kernel else chosen(name, hidden, weight, work)

    configs.tile = instead
    try:
        yield
    finally:
        configs.tile = chosen


# ---- measuring -------------------------------------------------------------------------------------------------------


def cases(kernels: Sequence[str], dtype: str, chip: Chip) -> dict[str, dict[Tile, Case]]:
    """What to compile, by kernel and tile; the table's tile first."""
    return {
        kernel: {tile: product_case(kernel, dtype, chip, tile) for tile in candidates(kernel, dtype != "fp32", chip)}
        for kernel in kernels
    }


def compile_rows(by_tile: dict[Tile, Case], compiled: Callable[[Case], Compiled], counted: bool = False) -> list[Row]:
    """One row for each tile: what it takes of the chip, and whether it fits; `counted` adds counts of instructions."""
    rows = []
    for tile, case in by_tile.items():
        row: Row = {"tile": tile, "role": "candidate" if rows else "table"}
        try:
            found = compiled(case)
        except Exception as error:  # What the compiler refuses is this tile's result, and must not end the run.
            row |= {"status": "failed", "reason": _first_line(error)}
        else:
            wrong = misfits(case, found)
            row |= {"registers": found.registers, "stack": found.stack, "shared": found.shared}
            if counted:
                counts = instructions(found)
                row["instructions"] = {name: counts[name] for name in _COUNTED if counts[name]}
            row |= {"status": "failed", "reason": "; ".join(wrong)} if wrong else {"status": "ok"}
        rows.append(row)
    return rows


def time_rows(kernel: str, rows: list[Row], sample: HeadSample, rounds: int = _ROUNDS) -> None:
    """Add to the rows of tiles that fit how long they take, once their results agree with the table's."""
    of_kernel = work(kernel, sample)
    left, right = of_kernel.product
    out = left.new_empty(left.shape[0], right.shape[1])
    runs: dict[str, Run] = {FLOOR: lambda: torch.mm(left, right, out=out)}
    expected: Expected | None = None
    for i, row in enumerate(rows):
        if row["status"] != "ok":
            continue

        def run(tile: Tile = row["tile"]) -> Results:
            with overridden(kernel, tile):
                return of_kernel.run()

        try:
            found = run()
        except Exception as error:  # A tile that cannot be launched leaves the others their turn.
            row |= {"status": "failed", "reason": _first_line(error)}
            continue
        if expected is None:
            if row["role"] != "table":
                raise RuntimeError(f"{kernel}: the table's own tile fails: {rows[0]['reason']}")
            expected = Expected({name: x.double() for name, x in found.items()}, of_kernel.row_bounds(found))
        row["differences"] = errors(found, expected)
        if wrong := broken_bounds(row["differences"]):
            row |= {"status": "wrong", "reason": "; ".join(wrong)}
            continue
        runs[str(i)] = run
    runs[FLOOR]()
    timings = interleave(runs, sample.hidden.device, rounds, _LIMIT_S)
    for i, row in enumerate(rows):
        if (timing := timings.get(str(i))) is not None:
            row |= {"median_s": timing.median, "spread_s": timing.spread}
            row["times_floor"], _ = timing.ratio(timings[FLOOR])


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"


# ---- showing ---------------------------------------------------------------------------------------------------------


def kernel_table(title: str, rows: list[Row]) -> Table:
    table = Table(title=f"\n{escape(title)}", title_justify="left")
    table.add_column("tile: N x V x d, warps, stages", no_wrap=True)
    for head in ("registers", "stack bytes", "shared KB", "ms", "± IQR", "x torch.mm"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    fastest = best(rows)
    for row in rows:
        tile: Tile = row["tile"]
        size = f"{tile.BLOCK_N} x {tile.BLOCK_V} x {tile.BLOCK_D}, {tile.num_warps}, {tile.num_stages}"
        ratio = f"{row['times_floor']:.3f}" if "times_floor" in row else ""
        counts = " ".join(f"{name} {count}" for name, count in row.get("instructions", {}).items())
        notes = [note for note, holds in (("table", row["role"] == "table"), ("fastest", row is fastest)) if holds]
        table.add_row(
            size + ", TMA" * tile.USE_TMA,
            str(row.get("registers", "")),
            str(row.get("stack", "")),
            f"{row['shared'] / 1024:.0f}" if "shared" in row else "",
            milliseconds(row.get("median_s")),
            milliseconds(row.get("spread_s")),
            ratio,
            ", ".join(filter(None, (*notes, counts)))
            if row["status"] == "ok"
            else f"[bold red]{row['status']}[/]: {escape(row['reason'])}",
        )
    return table


def best(rows: list[Row]) -> Row | None:
    """The fastest of those that were timed."""
    return min((row for row in rows if "median_s" in row), key=lambda row: row["median_s"], default=None)


def configs_line(kernel: str, half: bool, chip: Chip, tile: Tile) -> str:
    """An entry of TILES, or of AMD_TILES."""
    key = f'"{kernel}", {half}' if isinstance(chip, str) else f'"{kernel}", {half}, {chip}'
    sizes = f"{tile.BLOCK_N}, {tile.BLOCK_V}, {tile.BLOCK_D}, {tile.num_warps}, {tile.num_stages}"
    return f"    ({key}): Tile({sizes}{', USE_TMA=True' if tile.USE_TMA else ''}),"


def as_json(rows: list[Row]) -> list[Row]:
    return [row | {"tile": asdict(row["tile"])} for row in rows]


# ---- the two ways to run ---------------------------------------------------------------------------------------------


def compile_all(
    kernels: Sequence[str], dtype: str, chip: Chip, console: Console, counted: bool = False
) -> dict[str, list[Row]]:
    """Rows without times, by kernel."""
    by_kernel = cases(kernels, dtype, chip)
    started = time.perf_counter()
    with compiled_in_parallel(case for by_tile in by_kernel.values() for case in by_tile.values()) as futures:
        rows = {
            kernel: compile_rows(tiles, lambda case: futures[case].result(), counted)
            for kernel, tiles in by_kernel.items()
        }
    console.print(f"compiled for {chip_name(chip)}, {dtype}, in {time.perf_counter() - started:.0f} s")
    return rows


def tune(rows: dict[str, list[Row]], shape: Shape, dtype: str, where: Where, deadline: float, report: Report) -> None:
    """Time kernel by kernel until the time is up."""
    device, chip = where
    sample = head_workload(shape, "random", DTYPES[dtype], device)
    for kernel, of_kernel in rows.items():
        if time.perf_counter() > deadline:
            report.left_out(f"{kernel}: no time left for it")
            continue
        try:
            time_rows(kernel, of_kernel, sample)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            report.left_out(f"{kernel}: {error}")
            continue
        report.add(kernel, f"{kernel}, {shape.label}, {dtype}", of_kernel)
        fastest = best(of_kernel)
        if fastest is not None:
            report.line(configs_line(kernel, dtype != "fp32", chip, fastest["tile"]))


class Report:
    """Prints tables when they are done, and writes the file anew after each: a run that is cut off leaves its part."""

    def __init__(self, device: torch.device, json_file: Path | None, **content: Any) -> None:
        self.content: dict[str, Any] = {**content, "kernels": {}, "lines": [], "left_out": []}
        self.console, self.facts = begin(device, width=140)
        self.json_file = json_file

    def add(self, kernel: str, title: str, rows: list[Row]) -> None:
        self.console.print(kernel_table(title, rows))
        self.content["kernels"][kernel] = as_json(rows)
        self._write()

    def line(self, text: str) -> None:
        # As plain text: it is copied.
        self.console.print(text, markup=False, highlight=False)
        self.content["lines"].append(text.strip())
        self._write()

    def left_out(self, text: str) -> None:
        self.console.print(f"left out: {text}", markup=False)
        self.content["left_out"].append(text)
        self._write()

    @property
    def wrong(self) -> bool:
        """Whether any tile's results are beyond the contract."""
        return any(row["status"] == "wrong" for rows in self.content["kernels"].values() for row in rows)

    def _write(self) -> None:
        write_report(self.json_file, self.facts, **self.content)


def main() -> int:
    arguments = _parser().parse_args()
    deadline = time.perf_counter() + arguments.seconds
    kernels = arguments.kernel or KERNELS
    try:
        chip = parse_chip(arguments.compile) if arguments.compile else None
    except ValueError as error:
        sys.exit(str(error))
    if chip is None:
        if not torch.cuda.is_available():
            sys.exit("no GPU here: --compile sm_90 (or another chip) shows what tiles take, without times")
        device = torch.device("cuda", torch.cuda.current_device())
        where = (device, configs.chip_of(device))
        report = Report(device, arguments.json, shape=arguments.shape._asdict(), dtype=arguments.dtype)
        rows = compile_all(kernels, arguments.dtype, where[1], report.console)
        tune(rows, arguments.shape, arguments.dtype, where, deadline, report)
        return int(report.wrong)
    report = Report(torch.device("cpu"), arguments.json, chip=chip_name(chip), dtype=arguments.dtype)
    rows = compile_all(kernels, arguments.dtype, chip, report.console, counted=True)
    for kernel, of_kernel in rows.items():
        report.add(kernel, f"{kernel}, {chip_name(chip)}, {arguments.dtype}", of_kernel)
    return int(any(row["status"] != "ok" for of_kernel in rows.values() for row in of_kernel))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="repeatable; all by default")
    parser.add_argument(
        "--shape", type=gpu_shape, default="qwen3-1.7b-8192", help="name in cases/registry.py, or NxBxdxV"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--seconds", type=above_zero, default=600, help="after which no other kernel is started")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write every row here")
    parser.add_argument("--compile", metavar="CHIP", help="compile for sm_90, gfx942, ... instead of timing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
