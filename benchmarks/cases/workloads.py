"""Inputs for the shapes of the registry: random and peaked ones made here, real ones from a model's own responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.activations import activations
from benchmarks.cases.registry import SMOLLM2, Groups, Shape
from g2rl_kernels import LMHead, testing
from g2rl_kernels.testing import HeadSample

# Finding hidden states with a given p_y takes 40 products. Tokens beyond these repeat them, with other weights.
_DISTINCT_TOKENS = 1024


class MissingWorkload(RuntimeError):
    """Inputs that this machine cannot provide; the message says why."""


def lengths(N: int, B: int) -> tuple[int, ...]:
    """B response lengths that differ by up to a factor of two and sum to N; empty ones where B > N."""
    shares = torch.tensor([1 + (i * 5 % B) / B for i in range(B)], dtype=torch.float64)
    ends = (shares.cumsum(0) / shares.sum() * N).round().long()
    ends[-1] = N
    return tuple(int(n) for n in ends.diff(prepend=ends.new_zeros(1)))


def head_workload(shape: Shape, kind: str, dtype: torch.dtype, device: torch.device) -> HeadSample:
    """Inputs of a head op.

    Raises:
        MissingWorkload: real activations for another head than SmolLM2's, or no model to take them from.
    """
    if kind == "real":
        return _real(shape, dtype, device)
    distinct = min(shape.N, _DISTINCT_TOKENS)
    base = testing.head_sample(testing.Shape((distinct,), shape.d, shape.V, ""), dtype, device, kind=kind)
    rows = torch.arange(shape.N, device=device) % distinct
    random = torch.Generator().manual_seed(1)
    return HeadSample(
        base.hidden[rows],
        base.head,
        base.targets[rows],
        _offsets(lengths(shape.N, shape.B)).to(device),
        _token_weights(shape.N, random).to(device),
    )


def _offsets(sizes: tuple[int, ...]) -> Tensor:
    return F.pad(torch.tensor(sizes).cumsum(0), (1, 0)).to(torch.int32)


def _real(shape: Shape, dtype: torch.dtype, device: torch.device) -> HeadSample:
    if (shape.d, shape.V) != SMOLLM2[1:]:
        raise MissingWorkload(f"real activations are those of {SMOLLM2[0]}, not of {shape.model}")
    sizes = lengths(shape.N, shape.B)
    try:
        data = activations(shape.B, max(sizes))
    except RuntimeError as error:
        raise MissingWorkload(str(error)) from error
    random = torch.Generator().manual_seed(1)
    return HeadSample(
        torch.cat([states[:n] for states, n in zip(data["hidden"], sizes, strict=True)]).to(device, dtype),
        LMHead(data["weight"].to(device, dtype)),
        torch.cat([tokens[:n] for tokens, n in zip(data["targets"], sizes, strict=True)]).to(device),
        _offsets(sizes).to(device),
        _token_weights(shape.N, random).to(device),
    )


def _token_weights(N: int, random: torch.Generator) -> Tensor:
    """Unequal and never zero: a weight of zero would spare a response the tokens that are hard to get right."""
    return 0.1 + torch.rand(N, generator=random)


@dataclass(frozen=True, eq=False)
class GroupSample:
    """Inputs of the group op: features [G m, d] fp32, rewards [G m] of -1 and +1, m."""

    features: Tensor
    rewards: Tensor
    m: int


def group_workload(groups: Groups, device: torch.device) -> GroupSample:
    """Responses of a group share a direction, as real ones do: cosines spread around 0.3."""
    random = torch.Generator().manual_seed(0)
    own = torch.randn(groups.G, groups.m, groups.d, generator=random)
    common = torch.randn(groups.G, 1, groups.d, generator=random) * torch.rand(groups.G, groups.m, 1, generator=random)
    rewards = torch.where(torch.rand(groups.G * groups.m, generator=random) < 0.5, -1.0, 1.0)
    features = (own + common * 1.3).view(-1, groups.d) * 0.1
    return GroupSample(features.to(device), rewards.to(device), groups.m)
