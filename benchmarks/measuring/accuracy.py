"""How far results are from float64 on the same inputs, and whether that is within the project's contract.

The oracle is plain PyTorch in float64, in blocks that fit memory at real sizes; `g2rl_kernels.testing.oracle`, which
goes token by token, agrees with it (test_benchmarks.py holds them to each other).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from g2rl_kernels import Shaping, g2rl_advantages, use_backend
from g2rl_kernels.testing import (
    ENTROPY_ABSOLUTE,
    LOGP_ABSOLUTE,
    LOGP_RELATIVE,
    PHI_COSINE,
    PHI_RELATIVE,
    ROUNDOFF,
    HeadSample,
    logits_from_raw,
)

Results = Mapping[str, Tensor]

# The contract, by measure. Gradients: the worst row's error as a share of what `_gradient_bounds` allows.
BOUNDS = {
    "phi_relative": PHI_RELATIVE,
    "phi_cosine": PHI_COSINE,
    "logp_absolute": LOGP_ABSOLUTE,
    "logp_relative": LOGP_RELATIVE,
    "entropy_absolute": ENTROPY_ABSOLUTE,
    "hidden_of_bound": 1.0,
    "weight_of_bound": 1.0,
    "advantages_absolute": 1e-5,
    "shaped_rewards_absolute": 1e-5,
    "scores_absolute": 1e-5,
    "similarity_absolute": 1e-5,
}
_ROUNDED = ("logp_absolute", "logp_relative", "entropy_absolute")
# A peer whose log p is off by more than a careless fp32 sum, or its logits' rounding to the model's dtype, explains, is
# wrong and not rounded.
_CARELESS = 1e-3
_ROUNDED_LOGITS = 4.0

# Of the weight and of gradients, in float64 at one time.
_ROWS = 8192
_BLOCK_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}


@dataclass(frozen=True)
class Expected:
    """Float64 results by quantity.

    Attributes:
        row_bounds: for a gradient, the error allowed for the norm of each row.
        largest: the largest |z| and |log p|, for what rounded logits may cost.
        rounding: of the largest logit by a product in fp32, which the contract has beside the bounds of log p and H.
    """

    results: dict[str, Tensor]
    row_bounds: dict[str, Tensor] = field(default_factory=dict)
    largest: float = 0.0
    rounding: float = 0.0


def expected_head(sample: HeadSample, upstream: tuple[Tensor, Tensor | None] | None = None) -> Expected:
    """Features, log-probabilities, entropy and lse; with `upstream` the gradients of hidden and weight too.

    Args:
        upstream: gradients of logps [N] and entropy [N] (None for zero).
    """
    weight, a = sample.head.weight, sample.token_weights.double()
    N, B = sample.hidden.shape[0], sample.cu_seqlens.shape[0] - 1
    responses = torch.repeat_interleave(torch.arange(B, device=a.device), sample.cu_seqlens.diff())
    tokens = {name: a.new_empty(N) for name in ("logps", "entropy", "lse")}
    R = a.new_zeros(B, weight.shape[0])
    gradients = None if upstream is None else _Gradients(sample, upstream)
    largest = largest_product = 0.0
    for rows in _blocks(sample):
        raw = _product(sample.hidden[rows].double(), weight)
        largest_product = max(largest_product, float(raw.abs().max()))
        u = logits_from_raw(raw, sample.head)
        largest = max(largest, float(u.abs().max()))
        y = sample.targets[rows, None]
        lse = u.logsumexp(1)
        log_p = u.sub_(lse[:, None])
        p = log_p.exp()
        tokens["lse"][rows] = lse
        tokens["logps"][rows] = log_p.gather(1, y)[:, 0]
        tokens["entropy"][rows] = entropy = -(p * log_p).sum(1)
        if gradients is not None:
            gradients.add(rows, p, log_p, entropy)
        residuals = p.neg_()
        residuals.scatter_add_(1, y, torch.ones_like(y, dtype=p.dtype))
        R.index_add_(0, responses[rows], residuals.mul_(a[rows, None]))
    totals = a.new_zeros(B).index_add_(0, responses, a)
    tokens["features"] = torch.where(totals > 0, 1 / totals, 0)[:, None] * _product_rows(R, weight)
    largest = max(largest, float(tokens["logps"].abs().max())) if N else 0.0
    # As `testing.accumulation_error` has it for each token.
    scale = abs(sample.head.logit_scale) / sample.head.temperature
    rounding = ROUNDOFF[torch.float32] * sample.hidden.shape[1] ** 0.5 * largest_product * scale
    if gradients is None:
        return Expected(tokens, largest=largest, rounding=rounding)
    tokens |= {"hidden": gradients.hidden, "weight": gradients.weight}
    return Expected(tokens, gradients.bounds(), largest, rounding)


def expected_groups(features: Tensor, rewards: Tensor, groups: int) -> Expected:
    """What `g2rl_advantages` should return for these features."""
    with use_backend("reference"):
        return Expected(g2rl_advantages(features.double(), rewards.double(), groups, Shaping())._asdict())


class _Gradients:
    """Float64 gradients of hidden and weight, block by block, and the error that a backward pass cannot avoid.

    G, the gradient of W h, is made in fp32 (log p off by 1e-5 at most) and rounded once to the model's dtype; these
    errors are independent between entries, so that a row of G @ W is off by the root of sum_v (error_v |W_v|)^2, times
    four for luck. What an error of lse does to all p of a token alike adds up; then the result is rounded.
    """

    def __init__(self, sample: HeadSample, upstream: tuple[Tensor, Tensor | None]) -> None:
        self.sample, self.upstream = sample, upstream
        weight, hidden = sample.head.weight, sample.hidden
        self.hidden = hidden.new_empty(hidden.shape, dtype=torch.float64)
        # In half of the memory, fp32 holds what any comparison here needs: it is exact to 1e-7 of itself.
        self.weight = weight.new_zeros(weight.shape, dtype=torch.float32)
        self.hidden_error, self.common = self.hidden.new_empty(hidden.shape[0]), self.hidden.new_empty(hidden.shape[0])
        self.weight_error = self.hidden.new_zeros(weight.shape[0])
        self.weight_norms = torch.cat([rows.double().square().sum(1) for rows in weight.split(_ROWS)])

    def add(self, rows: slice, p: Tensor, log_p: Tensor, entropy: Tensor) -> None:
        weight, T = self.sample.head.weight, self.sample.head.temperature
        h, y = self.sample.hidden[rows].double(), self.sample.targets[rows, None]
        g_logps = self.upstream[0][rows, None].double()
        g_entropy = torch.zeros_like(g_logps) if self.upstream[1] is None else self.upstream[1][rows, None].double()
        G = p * (g_logps + g_entropy * (log_p + entropy[:, None])) / -T
        G.scatter_add_(1, y, g_logps / T)
        self.hidden[rows] = _product_rows(G, weight)
        G_y = G.gather(1, y)
        self.common[rows] = 1e-5 * (self.hidden[rows] - G_y * weight[y[:, 0]].double()).norm(dim=1)
        for start in range(0, weight.shape[0], _ROWS):
            self.weight[start : start + _ROWS] += G[:, start : start + _ROWS].T @ h
        # An error of 1e-5 in H or log p changes G by p times it even where G itself is small.
        error = G.abs().mul_(ROUNDOFF[weight.dtype] + 1e-5)
        error += 2e-5 * p * g_entropy.abs() / T
        if weight.dtype == torch.float16:
            # With one scale a row, entries below 2^-24 of its largest are lost.
            error += 2.0**-24 * G.abs().amax(1, keepdim=True)
        error.square_()
        self.hidden_error[rows] = (error @ self.weight_norms).sqrt()
        self.weight_error += error.T @ h.square().sum(1)

    def bounds(self) -> dict[str, Tensor]:
        roundoff = ROUNDOFF[self.sample.head.weight.dtype]
        weight_norms = torch.cat([rows.double().norm(dim=1) for rows in self.weight.split(_ROWS)])
        # fp16 results below its range are rounded to multiples of 2^-24.
        floor = 2.0**-25 * self.weight.shape[1] ** 0.5 if self.sample.head.weight.dtype == torch.float16 else 0.0
        return {
            "hidden": 4 * self.hidden_error + self.common + roundoff * self.hidden.norm(dim=1) + floor,
            "weight": 4 * self.weight_error.sqrt() + (roundoff + 1e-5) * weight_norms + floor,
        }


def errors(results: Results, expected: Expected) -> dict[str, float]:
    """Worst error of each quantity that `results` has, by measure; NaN where a result is not finite."""
    found: dict[str, float] = {}
    for name, result in results.items():
        if name not in expected.results:
            continue
        want = expected.results[name]
        if name in ("hidden", "weight"):
            found |= _row_errors(name, result, want, expected.row_bounds[name])
            continue
        got = result.double()
        if name == "features":
            length = want.norm(dim=1)
            off = (got - want).norm(dim=1)
            cosine = 1 - F.cosine_similarity(got, want, dim=1, eps=1e-300)
            found["phi_relative"] = _worst(torch.where(length > 0, off / length, off))
            found["phi_cosine"] = _worst(torch.where(length > 0, cosine, off))
        elif name == "logps":
            off = (got - want).abs()
            found["logp_absolute"] = _worst(off)
            found["logp_relative"] = _worst(torch.where(want == 0, off, off / want.abs()))
        else:
            found[f"{name}_absolute"] = _worst((got - want).abs())
    return found


def _row_errors(name: str, got: Tensor, want: Tensor, bound: Tensor) -> dict[str, float]:
    """Relative error of the whole gradient, and of its worst row as a share of what that row is allowed."""
    off = torch.cat([(g.double() - w).norm(dim=1) for g, w in zip(got.split(_ROWS), want.split(_ROWS), strict=True)])
    norm = torch.cat([w.double().norm(dim=1) for w in want.split(_ROWS)]).norm()
    return {
        f"{name}_relative": float(off.norm() / norm),
        f"{name}_of_bound": _worst(torch.where(off == 0, 0.0, off / bound)),
    }


def _worst(values: Tensor) -> float:
    """The maximum, NaN if any is NaN; 0 of none."""
    return float(values.max()) if values.numel() else 0.0


def broken_bounds(found: Mapping[str, float], rounding: float = 0.0) -> list[str]:
    """Measures beyond the contract, as text; NaN is beyond.

    Args:
        rounding: `Expected.rounding`.
    """
    bounds = {measure: bound + rounding * (measure in _ROUNDED) for measure, bound in BOUNDS.items()}
    return [
        f"{measure} {found[measure]:.2g} > {bound:.2g}"
        for measure, bound in bounds.items()
        if measure in found and not found[measure] <= bound
    ]


def implausible(found: Mapping[str, float], expected: Expected, dtype: torch.dtype) -> list[str]:
    """What not even logits rounded to the model's dtype explain: NaN, infinity, or log p beyond that rounding."""
    wrong = [f"{measure} is {value}" for measure, value in found.items() if not math.isfinite(value)]
    limit = _CARELESS + _ROUNDED_LOGITS * ROUNDOFF[dtype] * expected.largest
    if found.get("logp_absolute", 0.0) > limit:
        wrong.append(f"logp_absolute {found['logp_absolute']:.2g} > {limit:.2g}, what rounded logits explain")
    return wrong


def _blocks(sample: HeadSample) -> Iterator[slice]:
    """Tokens in blocks whose float64 logits, of which about four are alive at once, fit the device."""
    limit = _BLOCK_BYTES.get(sample.hidden.device.type, 512 << 20)
    step = max(1, limit // (8 * sample.head.weight.shape[0]))
    for start in range(0, sample.hidden.shape[0], step):
        yield slice(start, min(start + step, sample.hidden.shape[0]))


def _product(h: Tensor, weight: Tensor) -> Tensor:
    """h @ weight.T in float64, without a float64 copy of the whole weight."""
    return torch.cat([h @ tile.double().T for tile in weight.split(_ROWS)], 1)


def _product_rows(G: Tensor, weight: Tensor) -> Tensor:
    """G @ weight in float64."""
    out = G.new_zeros(G.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], _ROWS):
        tile = weight[start : start + _ROWS].double()
        out.addmm_(G[:, start : start + _ROWS], tile)
    return out
