"""Right calls whose numbers are hard: confident and flat tokens, features of any scale, equal or opposite ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from g2rl_kernels import Shaping, g2rl_advantages, sequence_features, testing, use_backend
from g2rl_kernels.records import TokenLogprobs
from g2rl_kernels.testing import KINDS, LARGEST_LOGIT, OPTIONS, PHI_RELATIVE, HeadSample, Shape
from tests.faults.op_oracle import GROUP_BOUND

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class HeadNumbers:
    """A problem of the head, as `testing.head_sample` makes it."""

    lengths: tuple[int, ...]
    d: int
    V: int
    dtype: torch.dtype
    kind: str
    options: str
    lse: str
    seed: int

    def wrong(self, backend: str) -> str | None:
        shape = Shape(self.lengths, self.d, self.V, "")
        s = testing.head_sample(shape, self.dtype, kind=self.kind, options=OPTIONS[self.options], seed=self.seed)
        expected = testing.oracle(s)
        lse = None if self.lse == "unknown" else expected.lse.float()
        if lse is not None and self.lse == "off":
            lse = lse + 1e-4 * torch.arange(lse.shape[0])
        with use_backend(backend):
            found = sequence_features(s.hidden, s.head, s.targets, s.cu_seqlens, s.token_weights, lse)
        if not all(bool(x.isfinite().all()) for x in found):
            return "a result is not finite"
        if float(expected.lse.abs().max() if expected.lse.numel() else 0) > LARGEST_LOGIT + 10:
            return None  # beyond the range of the bounds: to move towards a target by one number takes large ones
        rounding = testing.accumulation_error(s)
        try:
            testing.assert_bounds(TokenLogprobs(*found[1:]), expected, s.cu_seqlens, rounding)
        except AssertionError as wrong:
            return str(wrong)
        off = (found.features.double() - expected.features).norm(dim=1)
        relative = PHI_RELATIVE + (2**0.5 * rounding.amax() if self.kind == "spread" and rounding.numel() else 0.0)
        excess = off - relative * torch.maximum(expected.features.norm(dim=1), size_of_terms(s))
        return f"Phi is off by {off.tolist()}" if off.numel() and float(excess.max()) > 0 else None


def size_of_terms(s: HeadSample) -> Tensor:
    """[B]: what Phi would be if none of its terms cancelled. A sum is as exact as its terms are."""
    head = s.record
    z = s.hidden.double() @ head.weight.double().T
    u = testing.logits_from_raw(z if head.bias is None else z + head.bias.double(), s.head)
    p = u.softmax(1)
    rest = (1 - p.gather(1, s.targets[:, None])).abs()
    terms = abs(head.logit_scale) * p.scatter(1, s.targets[:, None], rest) @ head.weight.double().abs()
    a, offsets = s.token_weights.double(), s.cu_seqlens.tolist()
    sizes = [
        (a[start:end, None] * terms[start:end]).sum(0).norm() / a[start:end].sum() if start < end else a.new_zeros(())
        for start, end in zip(offsets[:-1], offsets[1:], strict=True)
    ]
    return torch.stack(sizes)


@dataclass(frozen=True)
class GroupNumbers:
    """Features [B, d] and rewards [B] of groups, and how features were made hard."""

    features: Tensor
    rewards: Tensor
    groups: Any
    shaping: Shaping
    normalize: Any
    what: str

    def __str__(self) -> str:
        return (
            f"g2rl_advantages({self.features.tolist()}, {self.rewards.tolist()}, {self.groups}, {self.shaping}, "
            f"normalize={self.normalize!r}) [{self.what}]"
        )

    def wrong(self, backend: str) -> str | None:
        arguments = (self.features, self.rewards, self.groups, self.shaping)
        with use_backend(backend):
            found = g2rl_advantages(*arguments, normalize=self.normalize)
        with use_backend("torch" if backend == "reference" else "reference"):
            expected = g2rl_advantages(
                self.features.double(), self.rewards.double(), *arguments[2:], normalize=self.normalize
            )
        for name, got, want in zip(found._fields, found, expected, strict=True):
            if not bool(got.isfinite().all()):
                return f"{name} is not finite: {got.tolist()}"
            excess = (got.double() - want).abs() - GROUP_BOUND * (1 + want.abs())
            if got.numel() and float(excess.max()) > 0:
                return f"{name} is off by {float(excess.max()):.3g} more than allowed"
        return None


def _scaled(x: Tensor, random: torch.Generator) -> Tensor:
    """Each row by a power of ten of its own, from the smallest to the largest that fp32 has; fp64 by as many again."""
    most = 37 if x.dtype == torch.float32 else 150
    powers = (torch.rand(x.shape[0], 1, generator=random, dtype=torch.float64) * 2 - 1) * most
    return (x.double() * 10**powers).to(x.dtype)


FEATURES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "as drawn": lambda x, random: x,
    "duplicated": lambda x, random: x[torch.randint(0, max(x.shape[0] // 2, 1), (x.shape[0],), generator=random)],
    "opposite": lambda x, random: x[:1] * torch.randn(x.shape[0], 1, generator=random).sign().to(x),
    "nearly equal": lambda x, random: x[:1] + 1e-6 * x,
    "scaled": _scaled,
    "zero here and there": lambda x, random: x * (torch.rand(x.shape[0], 1, generator=random) > 0.5),
    "all zero": lambda x, random: torch.zeros_like(x),
    "all ones": lambda x, random: torch.ones_like(x),
}


@st.composite
def numbers(draw: Callable[[st.SearchStrategy[Any]], Any]) -> HeadNumbers | GroupNumbers:
    """Half of them of the head, half of groups."""
    return _of_head(draw) if draw(st.booleans()) else _of_groups(draw)


def _of_head(draw: Callable[[st.SearchStrategy[Any]], Any]) -> HeadNumbers:
    return HeadNumbers(
        tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))),
        draw(st.integers(1, 70)),
        draw(st.integers(2, 300)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(KINDS)),
        draw(st.sampled_from(list(OPTIONS))),
        draw(st.sampled_from(("unknown", "given", "off"))),
        draw(st.integers(0, 2**40)),
    )


def _of_groups(draw: Callable[[st.SearchStrategy[Any]], Any]) -> GroupNumbers:
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))
    m, G, d = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    dtype, what = draw(st.sampled_from(DTYPES[2:])), draw(st.sampled_from(list(FEATURES)))
    features = FEATURES[what](torch.randn(m * G, d, generator=random).to(dtype), random)
    # In some groups, or in all, every reward is the same.
    same = torch.rand(G, generator=random) < draw(st.sampled_from((0.0, 0.5, 1.0)))
    rewards = torch.randn(m * G, generator=random).sign()
    rewards = torch.where(same.repeat_interleave(m), 1.0, rewards) * draw(st.sampled_from((1.0, 0.3, 1e-6, 1e6)))
    rule, uniform = draw(st.sampled_from(("scale", "centered", "literal"))), draw(st.sampled_from(("shape", "drop")))
    return GroupNumbers(
        features, rewards, m, Shaping(0.7, 3.0, rule, 1e-2, uniform), draw(st.sampled_from(("std", "none"))), what
    )
