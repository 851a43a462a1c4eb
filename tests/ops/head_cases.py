"""What tests of the head ops share: samples, the plans of `sequence_features`, and checks against the contract.

Each runs on the backend that the caller chose.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from g2rl_kernels import LMHead, SequenceFeatures, sequence_features, testing, token_logprobs
from g2rl_kernels.dispatch import resolve
from g2rl_kernels.distributed import local_targets
from g2rl_kernels.ops.head_ops import head_record
from g2rl_kernels.records import Gradients, Head, Needs, Responses, TokenLogprobs
from g2rl_kernels.testing import OPTIONS, ROUNDOFF, HeadSample, Options, Shape

WRONG_LSE = (100.0, -100.0, 1e20, -3e38, float("nan"), float("inf"), float("-inf"))
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
    spread = kind == "spread"
    unavoidable = testing.accumulation_error(s) if kind.startswith("hidden") or spread else None
    testing.assert_bounds(result, oracle(shape, dtype, device, kind, options), s.cu_seqlens, unavoidable, spread)
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
    """Gradients of logps and entropy [N], of both signs and sizes from 1e-6 to 1e6, which fp16 cannot hold.

    The second token has none, like one that a loss leaves out.
    """
    random = torch.Generator().manual_seed(seed)
    sizes = 10 ** (12 * torch.rand(2, s.hidden.shape[0], generator=random, dtype=torch.float64) - 6)
    sizes[:, 1:2] = 0
    signs = torch.randn(2, s.hidden.shape[0], generator=random).sign()
    wide = torch.float64 if s.hidden.dtype == torch.float64 else torch.float32
    g_logps, g_entropy = (sizes * signs).to(s.hidden.device, wide)
    return g_logps, g_entropy


# What is left of a gradient of 0: kernels may count a probability of 0 as fp32's smallest normal number, 1.2e-38, which
# dozens of tokens multiply by their gradients of up to 1e6, by a log p of 87, and by hidden.
NOTHING = 1e-28


def check_gradients(s: HeadSample, workspace_bytes: int | None = None, given: HeadSample | None = None) -> None:
    """`given` is what the op gets, where the oracle needs another."""
    g = upstream(s)
    exact, allowed = testing.oracle_gradients(s, *g)
    found = testing.gradients(s if given is None else given, *g, workspace_bytes)
    testing.assert_gradients(found, exact, Gradients(*(None if x is None else x + NOTHING for x in allowed)))


def masked(s: HeadSample, value: float) -> HeadSample:
    """With a bias of `value` for the words from a ninth of the vocabulary on, and targets before it."""
    V = s.head.weight.shape[0]
    bias = torch.where(torch.arange(V, device=s.hidden.device) < V // 9, s.head.bias, value)
    return replace(s, head=replace(s.head, bias=bias, temperature=0.7), targets=s.targets % (V // 9))


def masks(dtype: torch.dtype) -> tuple[float, float, float]:
    """What masks a word, and last what the oracle can reckon with; of the bias's dtype."""
    lowest = torch.finfo(dtype).min
    return -torch.inf, lowest, max(lowest, -1e30)


def check_masked_words(shape: Shape, dtype: torch.dtype, device: str = "cpu", **changes: object) -> None:
    """They take no part, whichever number masks them; as a target, one has a finite log p."""
    s = sample(shape, dtype, device, options=OPTIONS["bias"])
    *values, finite = masks(dtype)
    exact = masked(s, finite)
    expected = testing.oracle(exact)
    hopeless = replace(exact, targets=torch.full_like(s.targets, shape.V - 1))
    of_hopeless = testing.oracle(hopeless)
    for given in (masked(s, value) for value in values):
        testing.assert_bounds(features(given, **changes), expected, s.cu_seqlens)
        found = features(replace(given, targets=hopeless.targets), **changes)
        assert bool((found.logps < 0.9 * finite / 0.7).all() and found.logps.isfinite().all())
        testing.assert_bounds(found._replace(logps=of_hopeless.logps), of_hopeless, s.cu_seqlens)


def check_sure_tokens(shape: Shape, dtype: torch.dtype, device: str = "cpu", *, given: bool) -> None:
    """1 - p_y from 1e-11 to 1e-7, less than an lse in fp32 is rounded by, is what their features are made of."""
    s = sample(shape, dtype, device, options=OPTIONS["bias"])
    bias = s.head.bias.clone()
    bias[7] = 30
    sure = replace(s, head=replace(s.head, bias=bias), targets=torch.full_like(s.targets, 7))
    expected = testing.oracle(sure)
    assert expected.logps.abs().max() < 1e-7
    testing.assert_bounds(features(sure, lse=expected.lse.float() if given else None), expected, s.cu_seqlens)


def check_gradients_of_masked_words(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> None:
    """None; finite ones where one of them is the target."""
    s = sample(shape, dtype, device, options=OPTIONS["bias"])
    *values, finite = masks(dtype)
    exact = masked(s, finite)
    for targets in (exact.targets, torch.full_like(s.targets, shape.V - 1)):
        for value in values:
            check_gradients(replace(exact, targets=targets), given=replace(masked(s, value), targets=targets))


def check_parts(
    s: HeadSample, words: tuple[int, ...], logit_error: Tensor | None = None, given: HeadSample | None = None
) -> None:
    """Parts of the vocabulary, from words[i] to words[i + 1] each, hold the contract together, without ranks.

    `given` is what backends get, where the oracle needs another.
    """
    given = s if given is None else given
    whole = joined_parts(given, words)
    testing.assert_bounds(whole, testing.oracle(s), s.cu_seqlens, logit_error)
    saved = TokenLogprobs(*whole[1:])
    of_parts = [
        _run("logprobs_backward", *upstream(s), s.hidden, head, y, saved, Needs()) for head, y in _parts(given, words)
    ]
    check_gradients_of_parts(s, of_parts, sum(x.hidden.double() for x in of_parts))


def check_masked_parts(s: HeadSample, words: tuple[int, ...]) -> None:
    """The last ones have no word that is not masked; `s` has a bias."""
    *values, finite = masks(s.head.bias.dtype)
    for value in values:
        check_parts(masked(s, finite), words, given=masked(s, value))


def joined_parts(s: HeadSample, words: tuple[int, ...]) -> SequenceFeatures:
    """What ranks have together; each finds the same bits for tokens."""
    responses, parts = Responses(s.cu_seqlens, s.token_weights), _parts(s, words)
    sums = torch.stack([_run("token_sums", s.hidden, head, y) for head, y in parts], 1)
    shares = [_run("part_features", s.hidden, head, y, responses, sums) for head, y in parts]
    for share in shares[1:]:
        assert all(torch.equal(x, of_first) for x, of_first in zip(share[1:], shares[0][1:], strict=True))
    return shares[0]._replace(features=sum(share.features for share in shares))


def _parts(s: HeadSample, words: tuple[int, ...]) -> list[tuple[Head, Tensor]]:
    """Each part's head and targets."""
    parts = []
    for first, last in itertools.pairwise(words):
        bias = None if s.head.bias is None else s.head.bias[first:last]
        head = head_record(s.head.weight[first:last], bias, *s.options)  # as the ops hand it on
        parts.append((head, local_targets(s.targets, first, last - first)))
    return parts


def _run(op: str, *arguments: object) -> object:
    head = next(x for x in arguments if isinstance(x, Head))
    return resolve(op, head.weight.device, head.weight.dtype, head)(*arguments, 0)


def check_lse_of_something_else(shape: Shape, dtype: torch.dtype, wrong: float, device: str = "cpu") -> None:
    """Of some tokens, as masks and paddings leave it: all results are the right ones."""
    right = oracle(shape, dtype, device, "random", OPTIONS["together"]).lse.float()
    some = torch.arange(shape.N, device=device) % 3 == 0
    check(shape, dtype, options=OPTIONS["together"], device=device, lse=torch.where(some, wrong, right))


def check_logits_beyond_the_digits_of_fp32(dtype: torch.dtype, device: str = "cpu") -> None:
    """Near 1e10 a logit may lie hundreds above the row's maximum as fp32 has it: the likeliest word is certain."""
    hidden = torch.tensor([[2.421875], [-0.84]], dtype=dtype, device=device).repeat_interleave(4, 0)
    weight = torch.tensor([[-1.46], [-2.25], [-0.0014], [-1.276]], dtype=dtype, device=device)
    out = token_logprobs(hidden, LMHead(weight, temperature=1e-10), torch.arange(4, device=device).repeat(2))
    expected = (hidden.double() @ weight.double().T / 1e-10).log_softmax(-1)[:, :4]
    expected = expected.view(2, 4, 4).diagonal(dim1=1, dim2=2).flatten()
    torch.testing.assert_close(out.logps.double(), expected, rtol=1e-6, atol=0)
    assert out.entropy[expected == 0].tolist() == [0, 0] and bool(out.entropy.isfinite().all())


def check_gradients_of_parts(s: HeadSample, parts: list[Gradients], hidden: Tensor) -> None:
    """Gradients of parts' words, and of hidden [N, d], which shares that were rounded to its dtype make up."""
    bias = None if s.head.bias is None else torch.cat([part.bias for part in parts])
    exact, allowed = testing.oracle_gradients(s, *upstream(s))
    allowed = Gradients(*(None if x is None else x + NOTHING for x in allowed))
    # Each share is rounded, and so is each sum of some, fp16 to multiples of 2^-24 at best.
    smallest = 2.0**-25 if s.hidden.dtype == torch.float16 else 0.0
    rounding = sum(ROUNDOFF[s.hidden.dtype] * part.hidden.double().abs() + smallest for part in parts) * len(parts)
    found = Gradients(hidden, torch.cat([part.weight for part in parts]), bias)
    testing.assert_gradients(found, exact, allowed._replace(hidden=allowed.hidden + rounding))
