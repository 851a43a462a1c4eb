"""One case measured: every candidate's memory, error and time, in one go, as rows of plain values."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.candidates.lineup import BASELINE, FLOOR, FLOOR_OUT, Candidate, Case, Run, candidates
from benchmarks.measuring.accuracy import Expected, Results, broken_bounds, errors, implausible
from benchmarks.measuring.timing import Timing, extra_memory, interleave, kernel_launches
from g2rl_kernels import testing
from g2rl_kernels.testing import HeadSample

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: timed samples of each candidate.
        limit_s: seconds after which a slow candidate sits out further rounds.
        peers: all peers, not the eager baseline alone.
        backends: of this project; None for all.
    """

    device: str = "cpu"
    dtype: str = "bfloat16"
    rounds: int = 9
    limit_s: float = 30.0
    peers: bool = False
    backends: list[str] | None = None

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def measure(case: Case, expected: Expected, settings: Settings, best: float) -> list[Row]:
    """One row for each candidate, whether it could take part or not.

    Args:
        best: operations a second that the machine's square matrix product reaches.
    """
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    for candidate in candidates(case, settings.peers, settings.backends):
        row: Row = {"candidate": candidate.name, "role": candidate.role, "note": candidate.note}
        rows[candidate.name] = row
        if candidate.refusal is not None:
            row |= {"status": "unavailable", "reason": candidate.refusal}
            continue
        try:
            row |= _first_call(candidate, case, expected, settings)
            # A call that takes longer than all rounds may is timed once, by its first.
            if row["status"] != "failed" and row["first_call_s"] < settings.limit_s:
                runs[candidate.name] = candidate.prepare(case)
        except Exception as error:  # Whatever a peer raises is its result here, and must not end the run.
            text = str(error).strip().splitlines()
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {text[0][:160] if text else ''}"}
    work = _Work.of(case)
    timings = interleave(runs, settings.torch_device, settings.rounds, settings.limit_s)
    # A product of this very shape may beat the square ones.
    floors = [timings[name] for name in (FLOOR, FLOOR_OUT) if name in timings]
    best = max([best, *(work.products / floor.fastest for floor in floors)])
    for name, row in rows.items():
        if row["status"] in ("unavailable", "failed"):
            continue
        timing = timings.get(name) or Timing((row["first_call_s"],) + (None,) * (settings.rounds - 1))
        row |= _time_entries(timing, timings)
        row |= work.rates(row, best)
        if settings.device == "cuda" and name in runs:
            row["launches"] = kernel_launches(runs[name])
    return list(rows.values())


def _first_call(candidate: Candidate, case: Case, expected: Expected, settings: Settings) -> Row:
    """Time and memory of a call at full size, whose working memory nobody has set aside yet, and its errors.

    Of what comes before the clock starts, memory alone counts.
    """
    if candidate.role == "floor":
        return {"status": "ok", "errors": {}, "first_call_s": 0.0}
    # Loads libraries and starts threads, which belong to no call.
    candidate.prepare(case if candidate.compiles else _small(case))()
    start = 0.0

    def prepare_and_run() -> Results:
        nonlocal start
        run = candidate.prepare(case)
        if settings.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        return run()

    extra, results = extra_memory(prepare_and_run, settings.torch_device)
    row: Row = {"first_call_s": time.perf_counter() - start, "extra_bytes": extra, "status": "ok"}
    row["errors"] = found = errors(results, expected)
    if isinstance(case.sample, HeadSample) and extra is not None:
        logits = case.head.hidden.shape[0] * case.head.head.weight.shape[0] * torch.float32.itemsize
        row["percent_of_logits"] = 100 * extra / logits
    broken = broken_bounds(found, expected.rounding)
    wrong = broken if candidate.role == "ours" else implausible(found, expected, settings.torch_dtype)
    if wrong:
        row |= {"status": "failed", "reason": "; ".join(wrong)}
    elif broken:
        row |= {"status": "outside bounds", "reason": "; ".join(broken)}
    return row


def _small(case: Case) -> Case:
    """The same op on eight tokens of the same d."""
    if not isinstance(case.sample, HeadSample):
        return case
    s = case.sample
    small = testing.head_sample(testing.Shape((3, 5), s.hidden.shape[1], 1024, ""), s.hidden.dtype, s.hidden.device)
    gradient = torch.ones(8, device=s.hidden.device)
    upstream = None if case.upstream is None else (gradient, None if case.upstream[1] is None else gradient)
    return Case(case.op, small, None if case.lse is None else 7 * gradient, upstream)


def _time_entries(timing: Timing, timings: dict[str, Timing]) -> Row:
    entries: Row = {
        "median_s": timing.median,
        "spread_s": timing.spread,
        "fastest_s": timing.fastest,
        "samples": len(timing.samples),
        "launch_s": timing.launch,
    }
    for key, other in (("floor", FLOOR), ("eager", BASELINE)):
        if other in timings:
            entries[f"times_{key}"], entries[f"times_{key}_spread"] = timing.ratio(timings[other])
    return entries


@dataclass(frozen=True)
class _Work:
    """What a case asks for: operations and bytes that it cannot avoid, and the operations of its floor."""

    flops: int
    bytes: int
    products: int

    @classmethod
    def of(cls, case: Case) -> _Work:
        if isinstance(case.sample, HeadSample):
            V, d = case.head.head.weight.shape
            N, B, e = case.head.hidden.shape[0], case.head.cu_seqlens.shape[0] - 1, case.head.hidden.itemsize
        else:
            (B, d), V, N, e = case.groups.features.shape, case.groups.m, 0, 4
        op = case.op
        return cls(op.flops(N, B, d, V), op.bytes(N, B, d, V, e), 2 * op.products * N * d * V)

    def rates(self, row: Row, best: float) -> Row:
        """Useful work and least traffic over time: what a candidate computes twice does not count."""
        flops, seconds = self.products if row["role"] == "floor" else self.flops, row["median_s"]
        return {
            "gflops": flops / seconds / 1e9,
            "percent_of_best": 100 * flops / seconds / best,
            "gb_per_s": self.bytes / seconds / 1e9,
        }
