"""Each Triton kernel with a product at the size at which an op launches it, and what makes its output comparable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measuring.accuracy import Results
from g2rl_kernels.plans import Kernels
from g2rl_kernels.plans.inputs import addressable
from g2rl_kernels.records import Head
from g2rl_kernels.testing import ROUNDOFF, HeadSample
from g2rl_kernels.workspace import default_bytes

_SOFTCAP = 30.0


@dataclass(frozen=True, eq=False)
class Work:
    """One kernel, ready to run.

    Attributes:
        run: launches it; its results do not depend on the tile but for rounding.
        product: operands of the matrix product inside.
        row_bounds: for results "hidden", the error allowed for the norm of each row.
    """

    run: Callable[[], Results]
    product: tuple[Tensor, Tensor]
    row_bounds: Callable[[Results], dict[str, Tensor]] = lambda results: {}


def work(kernel: str, sample: HeadSample) -> Work:
    """Of a kernel as the table of tiles calls it. Random inputs suffice: no kernel's time depends on values."""
    name, _, more = kernel.partition("-")
    return _WORK[name](_Inputs(sample, more == "softcap"), more)


class _Inputs:
    """What kernels are launched on: the sample's, with results [3, N] and terms [4, N] of `merge`."""

    def __init__(self, sample: HeadSample, softcap: bool) -> None:
        from g2rl_kernels.backends.triton import kernels

        head = Head(sample.head.weight, None, softcap=_SOFTCAP if softcap else 0.0)
        self.kernels: Kernels = kernels
        self.hidden, self.head, self.targets = addressable(sample.hidden, head, sample.targets)
        self.cu_seqlens, self.a = sample.cu_seqlens, sample.token_weights
        self.product = (self.hidden, self.head.weight.T)
        self.results = self.empty(3, self.hidden.shape[0])
        partials = kernels.statistics(self.hidden, self.head, self.targets)
        self.terms = kernels.merge(partials, self.head, self.results, self.a)

    def empty(self, *shape: int) -> Tensor:
        """fp32."""
        return torch.empty(shape, dtype=torch.float32, device=self.hidden.device)

    def merged(self, partials: Tensor, a: Tensor | None = None, lse: Tensor | None = None) -> dict[str, Tensor]:
        """What partials make of their tokens."""
        found = self.empty(3, partials.shape[2])
        self.kernels.merge(partials, self.head, found, a, lse)
        return {"logps": found[0], "entropy": found[1]}

    def residuals(self) -> Tensor:
        """R [B, V]."""
        R = self.empty(self.cu_seqlens.shape[0] - 1, self.head.V)
        self.kernels.residuals(self.hidden, self.head, self.targets, self.cu_seqlens, self.terms, R)
        return R


def _statistics(of: _Inputs, more: str) -> Work:
    if more != "kept":
        return Work(lambda: of.merged(of.kernels.statistics(of.hidden, of.head, of.targets)), of.product)
    # As many tokens as the plan that keeps logits takes at a time.
    rows = max(1, default_bytes(of.hidden.device) // 4 * 3 // (4 * of.head.V) // 128 * 128)
    hidden, targets = of.hidden[:rows], of.targets[:rows]

    def run() -> Results:
        kept = of.kernels.room_for_kept(hidden, of.head, len(hidden))
        partials = of.kernels.statistics(hidden, of.head, targets, kept)
        return of.merged(partials) | {"features": kept[: len(hidden), : of.head.V]}

    return Work(run, (hidden, of.head.weight.T))


def _residuals(of: _Inputs, more: str) -> Work:
    if more != "statistics":
        return Work(lambda: {"features": of.residuals()}, of.product)
    inputs, lse = (of.hidden, of.head, of.targets, of.cu_seqlens, of.a, of.results[2]), of.results[2]

    def run() -> Results:
        R = of.empty(of.cu_seqlens.shape[0] - 1, of.head.V)
        return of.merged(of.kernels.residuals_and_statistics(*inputs, R), of.a, lse) | {"features": R}

    return Work(run, of.product)


def _grad_logits(of: _Inputs, more: str) -> Work:
    hidden, weight, a, (logps, entropy, lse) = of.hidden, of.head.weight, of.a, of.results
    columns = max(1, default_bytes(hidden.device) // (len(hidden) * weight.itemsize) // 128 * 128)
    strip = range(min(of.head.V, columns))
    rows_in = torch.stack((lse, entropy, a, torch.zeros_like(a), -a * torch.expm1(logps), torch.ones_like(a)))

    def run() -> Results:
        G = hidden.new_empty(len(hidden), len(strip))
        even = (torch.empty_like(G), lse.new_ones(())) if more == "scaled" else ()
        of.kernels.grad_logits(hidden, of.head, of.targets, rows_in, strip, G, *even)
        return {"hidden": G}

    def row_bounds(found: Results) -> dict[str, Tensor]:
        # Entries next to each other in the model's dtype, beside what log p may be off by.
        return {"hidden": (2 * ROUNDOFF[hidden.dtype] + 1e-5) * found["hidden"].float().norm(dim=1)}

    return Work(run, (hidden, weight[: len(strip)].T), row_bounds)


def _projection(of: _Inputs, more: str) -> Work:
    R, weight = of.residuals(), of.head.weight
    inverse = torch.ones_like(R[:, 0])

    def run() -> Results:
        features = of.empty(R.shape[0], weight.shape[1])
        of.kernels.project(R, inverse, of.head, features)
        return {"features": features}

    return Work(run, (R.to(weight.dtype), weight))


_WORK = {
    "statistics": _statistics,
    "residuals": _residuals,
    "grad_logits": _grad_logits,
    "projection": _projection,
}
