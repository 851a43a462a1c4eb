"""What tests of the head ops share: samples, the plans of `sequence_features`, and checks against the contract.

Each runs on the backend that the caller chose.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from g2rl_kernels import SequenceFeatures, sequence_features, testing
from g2rl_kernels.testing import OPTIONS, HeadSample, Options, Shape

PLANS = ("recomputed", "kept", "given", "perturbed")

sample = functools.cache(testing.head_sample)


@functools.cache
def oracle(shape: Shape, dtype: torch.dtype, device: str, kind: str, options: Options) -> SequenceFeatures:
    return testing.oracle(sample(shape, dtype, device, kind=kind, options=options))


def given(plan: str, s: HeadSample, request: pytest.FixtureRequest) -> Tensor | None:
    """What makes `sequence_features` take the plan: the lse to give it, or logits that are kept.

    One that is perturbed is off by more for each next token, so that its response is computed again.
    """
    if plan == "kept":
        request.getfixturevalue("kept")
    if plan not in ("given", "perturbed"):
        return None
    lse = testing.oracle(s).lse.float()
    return lse + 1e-4 * torch.arange(s.hidden.shape[0], device=lse.device) * (plan == "perturbed")


def features(s: HeadSample, **changes: object) -> SequenceFeatures:
    arguments = {
        "hidden": s.hidden,
        "head": s.head,
        "targets": s.targets,
        "cu_seqlens": s.cu_seqlens,
        "token_weights": s.token_weights,
    }
    return sequence_features(**(arguments | changes))


def check(
    shape: Shape,
    dtype: torch.dtype,
    kind: str = "random",
    options: Options = OPTIONS["plain"],
    device: str = "cpu",
    **changes: object,
) -> SequenceFeatures:
    """Run `sequence_features` and hold it to the contract."""
    s = sample(shape, dtype, device, kind=kind, options=options)
    result = features(s, **changes)
    unavoidable = testing.accumulation_error(s) if kind.startswith("hidden") else None
    testing.assert_bounds(result, oracle(shape, dtype, device, kind, options), s.cu_seqlens, unavoidable)
    return result


def check_second_response_first(s: HeadSample, **changes: object) -> None:
    """Of two responses, the first of many tokens: bits do not depend on which comes first."""
    together = features(s, **changes)
    N, first = s.hidden.shape[0], int(s.cu_seqlens[1])
    order = torch.arange(N).roll(N - first)
    moved = {name: getattr(s, name)[order] for name in ("hidden", "targets", "token_weights")}
    if changes.get("lse") is not None:
        moved["lse"] = changes["lse"][order]
    swapped = features(s, **(changes | moved), cu_seqlens=torch.tensor([0, N - first, N]))
    assert torch.equal(swapped.features.flip(0), together.features)
    for found, expected in zip(swapped[1:], together[1:], strict=True):
        assert torch.equal(found, expected[order])


def upstream(s: HeadSample, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Gradients of logps and entropy [N], of both signs and sizes from 1e-6 to 1e6, which fp16 cannot hold."""
    random = torch.Generator().manual_seed(seed)
    sizes = 10 ** (12 * torch.rand(2, s.hidden.shape[0], generator=random, dtype=torch.float64) - 6)
    signs = torch.randn(2, s.hidden.shape[0], generator=random).sign()
    wide = torch.float64 if s.hidden.dtype == torch.float64 else torch.float32
    g_logps, g_entropy = (sizes * signs).to(s.hidden.device, wide)
    return g_logps, g_entropy


def check_gradients(s: HeadSample, workspace_bytes: int) -> None:
    g = upstream(s)
    testing.assert_gradients(testing.gradients(s, *g, workspace_bytes), *testing.oracle_gradients(s, *g))
