"""What each kernel of a call takes on a GPU, beside the matrix product of the same shape, the two in turns.

    python -m benchmarks.kernels --shape qwen3-1.7b-8192 --backend cuda

Times are the profiler's, of kernels alone: what lies between them is in no row. Each is the median over the rounds of a
kernel's launches in one call; `x torch.mm` is of the product in the same rounds, whose clocks fall as kernels draw more
power.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.arguments import at_least, gpu_shape, need_gpu
from benchmarks.candidates.lineup import BACKEND_NAMES, nothing_kept
from benchmarks.cases.workloads import head_workload
from g2rl_kernels import sequence_features, token_logprobs, use_backend
from g2rl_kernels.testing import HeadSample

_ROUNDS, _WARM_UP = 7, 2
# What `torch.cuda._sleep` launches: stands between calls, and nowhere else.
_BETWEEN = "spin_kernel"


class Launch(NamedTuple):
    """A kernel's run, in microseconds."""

    name: str
    start: float
    duration: float


class Row(NamedTuple):
    """One kernel in a call: its launches, their milliseconds, and that as a multiple of the product's."""

    name: str
    launches: int
    ms: float
    times_mm: float


def calls(sample: HeadSample) -> Iterator[tuple[str, Callable[[], object]]]:
    """The head's ops by name, forward and, for log p and entropy, backward alone."""
    tokens = (sample.hidden, sample.head, sample.targets)
    responses = (sample.cu_seqlens, sample.token_weights)
    yield "token_logprobs", lambda: token_logprobs(*tokens)
    features = partial(sequence_features, *tokens, *responses)
    yield "sequence_features", features
    features_of_lse = partial(features, token_logprobs(*tokens).lse)
    yield "sequence_features, lse given", features_of_lse
    yield "sequence_features, lse given, nothing kept", nothing_kept()(features_of_lse)
    inputs = (sample.hidden.requires_grad_(), sample.head.weight.requires_grad_())
    logps, entropy, _ = token_logprobs(*tokens)
    loss = logps.sum() + entropy.sum()
    yield "logprobs_backward", lambda: torch.autograd.grad(loss, inputs, retain_graph=True)


def launches(call: Callable[[], object], product: Callable[[], object], rounds: int) -> list[Launch]:
    """Every kernel's of `rounds` rounds: a product, then the call, each behind a kernel of _BETWEEN."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(rounds):
            for work in (product, call):
                torch.cuda._sleep(1)
                work()
        torch.cuda.synchronize()
    on_device = (e for e in profiled.events() or () if e.device_type == torch.autograd.DeviceType.CUDA)
    return [Launch(e.name, e.time_range.start, e.time_range.elapsed_us()) for e in on_device]


def rows_of(found: Iterable[Launch]) -> list[Row]:
    """Rows of the kernels of the calls, the longest first, the product's own at the head, and their sum at the end."""
    segments: list[dict[str, list[float]]] = []
    for launch in sorted(found, key=lambda launch: launch.start):
        if _BETWEEN in launch.name:
            segments.append(defaultdict(list))
        elif segments:
            segments[-1][short(launch.name)].append(launch.duration / 1e3)
    products, rounds = segments[::2], segments[1::2]
    product = median(_sum(of) for of in products)

    def row(name: str, of: list[list[float]]) -> Row:
        ms = median(sum(times) for times in of)
        return Row(name, round(median(len(times) for times in of)), ms, ms / product)

    kernels = [row(name, [of.get(name, []) for of in rounds]) for name in set().union(*rounds)]
    kernels.sort(key=lambda row: (-row.ms, row.name))
    total = median(_sum(of) for of in rounds)
    return [
        row("torch.mm", [sum(of.values(), []) for of in products]),
        *kernels,
        Row("sum", sum(kernel.launches for kernel in kernels), total, total / product),
    ]


def _sum(segment: dict[str, list[float]]) -> float:
    return sum(sum(times) for times in segment.values())


def short(name: str) -> str:
    """A kernel's demangled name without namespaces, result and arguments."""
    name = re.sub(r"\((?:anonymous namespace|unnamed[^)]*)\)::|(?:g2rl::cuda|at::native|at_cuda_detail)::", "", name)
    name = re.sub(r"^(?:void|static) ", "", name)
    return re.split(r"\(|<unnamed", name, maxsplit=1)[0][:70].strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--shape", type=gpu_shape, default="qwen3-1.7b-8192", help="name in cases/registry.py, or NxBxdxV"
    )
    parser.add_argument("--backend", default="cuda", choices=BACKEND_NAMES)
    parser.add_argument("--kind", default="peaked", choices=("peaked", "random"))
    parser.add_argument("--rounds", type=at_least(1), default=_ROUNDS)
    arguments = parser.parse_args()
    need_gpu(parser)
    sample = head_workload(arguments.shape, arguments.kind, torch.bfloat16, torch.device("cuda"))
    hidden, weight = sample.hidden.detach(), sample.head.weight.detach()
    console = Console(width=120)
    with use_backend(arguments.backend):
        for op, call in calls(sample):
            for _ in range(_WARM_UP):
                call()
            table = Table(title=f"{op}, {arguments.shape.label}, {arguments.backend}", title_justify="left")
            for column in ("kernel", "launches", "ms", "x torch.mm"):
                table.add_column(column, justify="left" if column == "kernel" else "right")
            for row in rows_of(launches(call, lambda: torch.mm(hidden, weight.T), arguments.rounds)):
                table.add_row(row.name, str(row.launches), f"{row.ms:.3f}", f"{row.times_mm:.3f}")
            console.print(table)


if __name__ == "__main__":
    main()
