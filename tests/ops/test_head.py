"""The contract of `token_logprobs` and `sequence_features`, forward and backward, for every backend that runs here.

Backends and dtypes come from `dispatch`: a new backend is tested by existing. Bounds and inputs come from
g2rl_kernels.testing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import head_cases
import pytest
import torch
import torch.nn.functional as F
from backend_cases import over_backends
from head_cases import (
    WRONG_LSE,
    check_gradients_of_masked_words,
    check_logits_beyond_the_digits_of_fp32,
    check_lse_of_something_else,
    check_masked_words,
    check_sure_tokens,
    oracle,
    sample,
    upstream,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from g2rl_kernels import LMHead, SequenceFeatures, sequence_features, testing, token_logprobs, use_backend
from g2rl_kernels.backends import eager, reference
from g2rl_kernels.backends.eager import products
from g2rl_kernels.dispatch import resolve
from g2rl_kernels.plans.backward import _chunks
from g2rl_kernels.plans.inputs import unit_stride
from g2rl_kernels.products import exact_products, mm
from g2rl_kernels.records import Head, Needs, Responses, TokenLogprobs
from g2rl_kernels.testing import HEAD_SHAPES, KINDS, OPTIONS, SMALL, Gradients, HeadSample, Options, Shape
from tests.live_memory import LiveMemory

HEAD_OPS = ("token_logprobs", "sequence_features", "logprobs_backward")
every_forward = over_backends("token_logprobs", "sequence_features")
every_case = over_backends(*HEAD_OPS)


def features(s: HeadSample, backend: str | None, **changes: object) -> SequenceFeatures:
    with use_backend(backend):
        return head_cases.features(s, **changes)


def check(
    backend: str | None,
    device: str,
    dtype: torch.dtype,
    shape: Shape = SMALL,
    kind: str = "random",
    options: Options = OPTIONS["plain"],
    **changes: object,
) -> SequenceFeatures:
    """Run `sequence_features` and hold it to the contract; in C++, where nothing may be kept, to the same bits."""
    with use_backend(backend):
        found = head_cases.check(shape, dtype, kind, options, device, **changes)
    if backend == "native":
        s = sample(shape, dtype, device, kind=kind, options=options)
        for x, y in zip(features(s, backend, **(changes | {"workspace_bytes": 1})), found, strict=True):
            assert same_bits(x, y)
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# The oracle, checked without itself.


def test_reference_of_a_target_that_is_nearly_certain() -> None:
    """1 - p_y = 1e-15 has no digits left in float64; Phi = (1 - p_y) (W_y - W_v) does."""
    hidden, weight = torch.tensor([[9.4375]]), torch.tensor([[-6.90625], [-10.5625]])
    u = (weight.double() * 9.4375)[:, 0]
    with use_backend("reference"):
        found = sequence_features(hidden, LMHead(weight), torch.tensor([0]), torch.tensor([0, 1])).features
    rest = float((u[1] - u[0]).exp())
    assert float(found) == pytest.approx(rest * (10.5625 - 6.90625), rel=1e-7)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_features_are_gradients_of_the_mean_logprob(options: Options) -> None:
    """Phi = T d(sum_t a_t log p_t / sum_t a_t) / dh by autograd through F.log_softmax, summed over the tokens."""
    s = testing.head_sample(Shape((3, 4), 7, 29, ""), torch.float64, options=options)
    hidden = s.hidden.clone().requires_grad_()
    z = s.head.logit_scale * F.linear(hidden, s.head.weight, None if s.head.bias is None else s.head.bias.double())
    if s.head.softcap is not None:
        z = s.head.softcap * torch.tanh(z / s.head.softcap)
    logps = F.log_softmax(z / s.head.temperature, 1)[torch.arange(7), s.targets]
    expected = []
    for start, end in ((0, 3), (3, 7)):
        a = s.token_weights[start:end].double()
        mean = (a * logps[start:end]).sum() / a.sum()
        (gradient,) = torch.autograd.grad(mean, hidden, retain_graph=True)
        # Token t enters the mean through h_t alone: the gradient with respect to a shift of all h_t is the sum.
        expected.append(s.head.temperature * gradient.sum(0))
    entropy = torch.distributions.Categorical(logits=z / s.head.temperature).entropy()
    found = testing.oracle(s)
    # Both are float64, a dozen roundings apart.
    torch.testing.assert_close(found.features, torch.stack(expected), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.logps, logps, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.lse, torch.logsumexp(z / s.head.temperature, 1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_backward_of_the_reference_is_the_gradient_of_its_forward(options: Options) -> None:
    s = testing.head_sample(Shape((3, 2), 5, 13, ""), torch.float64, options=options)
    leaves = [x for x in (s.hidden, s.head.weight, s.head.bias) if x is not None]
    leaves = [x.double().clone().requires_grad_() for x in leaves]
    hidden, weight, bias = (*leaves, None)[:3]
    head = Head(weight, bias, *s.options)
    saved = reference.token_logprobs(hidden, head, s.targets)
    g_logps, g_entropy = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((g_logps * saved.logps + g_entropy * saved.entropy).sum(), leaves)
    found = reference.logprobs_backward(g_logps, g_entropy, hidden, head, s.targets, saved, Needs())
    for got, want in zip(found, expected, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_peaked_sample_reaches_its_confidence() -> None:
    rest = -torch.expm1(oracle(SMALL, torch.bfloat16, "cpu", "peaked", OPTIONS["plain"]).logps)
    assert rest[0] > 0.8
    assert 5e-7 < rest[-1] < 2e-6


@pytest.mark.parametrize("kind", ["bias+", "bias-", "hidden+", "hidden-"])
def test_offset_sample_reaches_its_offset(kind: str) -> None:
    s = sample(SMALL, torch.float32, "cpu", kind=kind)
    z = F.linear(s.hidden, s.head.weight, s.head.bias) * (1 if kind.endswith("+") else -1)
    assert 80 < float(z.min())
    assert 110 < float(z.max()) < 125


def test_bounds_name_what_fails() -> None:
    s = sample(SMALL, torch.float32, "cpu")
    good = oracle(SMALL, torch.float32, "cpu", "random", OPTIONS["plain"])
    testing.assert_bounds(good, good, s.cu_seqlens)
    logps, phi = good.logps.clone(), good.features.clone()
    logps[7] += 2e-5
    phi[2] *= 1 + 2e-5
    with pytest.raises(AssertionError, match=r"logp, absolute: token 7 is off by 2e-05 > 1e-05 \(1 of 23 fail\)"):
        testing.assert_bounds(good._replace(logps=logps), good, s.cu_seqlens)
    with pytest.raises(AssertionError, match=r"Phi, relative: response 2 of 9 tokens is off by 2e-05 > 1e-05"):
        testing.assert_bounds(good._replace(features=phi), good, s.cu_seqlens)
    phi[1, 0] = 1e-30
    with pytest.raises(AssertionError, match=r"response 1 of 0 tokens is off by 1e-30 > 1e-34"):
        testing.assert_bounds(good._replace(features=phi), good, s.cu_seqlens)
    with pytest.raises(AssertionError, match="entropy, absolute: token 0 is off by nan"):
        testing.assert_bounds(good._replace(entropy=logps * torch.nan), good, s.cu_seqlens)


# Forward.


@every_forward
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=lambda shape: f"N{shape.N}-d{shape.d}-V{shape.V}")
def test_shapes(backend: str | None, device: str, dtype: torch.dtype, shape: Shape) -> None:
    result = check(backend, device, dtype, shape)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in result] == [wide] * 4
    s = sample(shape, dtype, device, kind="random", options=OPTIONS["plain"])
    with use_backend(backend):
        without_features = token_logprobs(s.hidden, s.head, s.targets)
    testing.assert_bounds(without_features, oracle(shape, dtype, device, "random", OPTIONS["plain"]))


@every_forward
def test_long_products(backend: str | None, device: str, dtype: torch.dtype) -> None:
    """d of a real model, with partial sums that grow evenly: units that truncate them, as tensor cores do, drift."""
    check(backend, device, dtype, Shape((9, 3), 2048, 300, "128 additions in units that take 16 products"), "peaked")


@every_forward
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lse", ["unknown", "given", "perturbed"])
def test_kinds_of_logits(backend: str | None, device: str, dtype: torch.dtype, kind: str, lse: str) -> None:
    given = None
    if lse != "unknown":
        given = oracle(SMALL, dtype, device, kind, OPTIONS["plain"]).lse.float()
    if lse == "perturbed":
        # Another pass, of other kernels, may be off by more than rounding; it only steers the shift of exponents.
        noise = torch.randn(SMALL.N, generator=torch.Generator().manual_seed(1)).to(given.device)
        given = given + 1e-4 * noise.sign()
    result = check(backend, device, dtype, SMALL, kind, lse=given)
    assert all(bool(x.isfinite().all()) for x in result)


@every_forward
def test_responses_of_a_token_with_few_words(backend: str | None, device: str, dtype: torch.dtype) -> None:
    check(backend, device, dtype, Shape((1,) * 48, 64, 1500, "nothing that errors of logits average over"), "spread")


@pytest.mark.parametrize("off", [20.0, -20.0])
@every_forward
def test_an_lse_of_another_head(backend: str | None, device: str, dtype: torch.dtype, off: float) -> None:
    """It only steers rounding: results are the right ones."""
    given = oracle(SMALL, dtype, device, "random", OPTIONS["plain"]).lse.float() + off
    check(backend, device, dtype, SMALL, "random", lse=given)


@pytest.mark.parametrize("wrong", [0.0, 1e10, -1e20, 3e38, *WRONG_LSE])
@every_forward
def test_an_lse_of_something_else(backend: str | None, device: str, dtype: torch.dtype, wrong: float) -> None:
    """The same, however wrong it is, for all tokens or some."""
    check(backend, device, dtype, SMALL, "random", lse=torch.full((SMALL.N,), wrong, device=device))
    with use_backend(backend):
        check_lse_of_something_else(SMALL, dtype, wrong, device)


@over_backends("token_logprobs", "sequence_features", but=("reference",))
@pytest.mark.parametrize("given", [False, True], ids=["", "lse"])
def test_long_response_of_the_policy_itself(backend: str | None, device: str, dtype: torch.dtype, given: bool) -> None:
    """The feature is a smaller part of what is summed for each further token."""
    shape, options = Shape((16384, 513), 16, 64, "far more tokens than words"), OPTIONS["plain"]
    s = sample(shape, dtype, device, kind="drawn", options=options)
    exact = oracle(shape, dtype, device, "drawn", options)
    lse = exact.lse.float() if given else None
    testing.assert_bounds(features(s, backend, lse=lse), exact, s.cu_seqlens)


@every_forward
@pytest.mark.parametrize("given", [False, True], ids=["", "lse"])
def test_sure_tokens(backend: str | None, device: str, dtype: torch.dtype, given: bool) -> None:
    with use_backend(backend):
        check_sure_tokens(SMALL, dtype, device, given=given)


@every_case
@pytest.mark.parametrize("options", ["plain", "bias", "softcap"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF], ids=["nan", "nan-of-cuda"])
def test_a_diverged_head_shows(backend: str | None, device: str, dtype: torch.dtype, options: str, bits: int) -> None:
    """NaN of one word, nobody's target: every result is NaN, and not as if the word were unlikely."""
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS[options])
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(device)
    word = next(v for v in range(s.head.weight.shape[0] // 2, s.head.weight.shape[0]) if v not in s.targets)
    weight, bias = s.head.weight.clone(), s.head.bias
    if bias is None:
        weight[word] = nan.to(dtype)
    else:
        bias = bias.clone()
        bias[word] = nan.to(bias.dtype)
    diverged = replace(s, head=replace(s.head, weight=weight, bias=bias))
    for lse in (None, testing.oracle(s).lse.float()):
        found = features(diverged, backend, lse=lse)
        assert found.features[s.cu_seqlens.diff() > 0].isnan().all()
        assert all(x.isnan().all() for x in found[1:])
    hidden = s.hidden.clone().requires_grad_()
    with use_backend(backend):
        token_logprobs(hidden, diverged.head, s.targets).logps.sum().backward()
    assert hidden.grad.isnan().all()


@every_forward
def test_nan_of_one_response_beside_a_given_lse(backend: str | None, device: str, dtype: torch.dtype) -> None:
    """The others keep their bits: what is wrong with one must not choose the way for all."""
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS["plain"])
    lse = oracle(SMALL, dtype, device, "random", OPTIONS["plain"]).lse.float()
    clean = features(s, backend, lse=lse)
    hidden = s.hidden.clone()
    hidden[6] = torch.nan
    found = features(s, backend, hidden=hidden, lse=lse)
    assert found.features[2].isnan().all() and found.logps[6].isnan()
    others = torch.arange(5, device=device) != 2
    assert same_bits(found.features[others], clean.features[others])
    token = torch.arange(SMALL.N, device=device)
    rest = token != 6
    for got, want in zip(found[1:], clean[1:], strict=True):
        assert same_bits(got[rest], want[rest])


@every_forward
def test_logits_beyond_the_digits_of_fp32(backend: str | None, device: str, dtype: torch.dtype) -> None:
    with use_backend(backend):
        check_logits_beyond_the_digits_of_fp32(dtype, device)


@every_forward
@pytest.mark.parametrize("lse", ["unknown", "given"])
def test_masked_words(backend: str | None, device: str, dtype: torch.dtype, lse: str) -> None:
    given = oracle(SMALL, dtype, device, "random", OPTIONS["bias"]).lse.float() if lse == "given" else None
    with use_backend(backend):
        check_masked_words(SMALL, dtype, device, lse=given)


@every_case
def test_gradients_of_masked_words(backend: str | None, device: str, dtype: torch.dtype) -> None:
    with use_backend(backend):
        check_gradients_of_masked_words(SMALL, dtype, device)


@pytest.mark.parametrize("logit_scale", [-1e-3, 1e18])
def test_masked_words_of_other_scales(logit_scale: float) -> None:
    """Where a negative scale turns the sign of a mask around, and where one of -1e30 would be -inf after it."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [1e-18], [0.0]])
    for backend in testing.available_backends(ops=HEAD_OPS):
        head = LMHead(weight, torch.tensor([0, 0, -torch.inf]) * logit_scale / abs(logit_scale), 1.0, logit_scale)
        leaf = hidden.clone().requires_grad_()
        with use_backend(backend):
            out = token_logprobs(leaf, head, torch.tensor([0]))
            out.entropy.sum().backward()
        expected = torch.distributions.Categorical(logits=weight[:2, 0].double() * logit_scale)
        assert out.logps.item() == pytest.approx(float(expected.logits[0]), abs=1e-6)
        assert out.entropy.item() == pytest.approx(float(expected.entropy()), abs=1e-6)
        assert bool(leaf.grad.isfinite().all())


@every_forward
@pytest.mark.parametrize("V", [1, 257], ids=["one-word", "one-word-past-a-tile"])
@pytest.mark.parametrize(("option", "value"), [("temperature", 2.0**-30), ("logit_scale", 2.0**30)])
def test_a_target_alone_in_its_tile(
    backend: str | None, device: str, dtype: torch.dtype, option: str, value: float, V: int
) -> None:
    """What CPU kernels take for the maximum of no logits must stay finite, too, times what makes logits of products."""
    s = sample(Shape((4, 1), 16, V, "tiles of 256 words, and nothing but the target in the last"), dtype, device)
    head = replace(s.head, weight=s.head.weight * 2.0**-15, **{option: value})
    targets = torch.tensor([V - 1, 0, V - 1, V // 2, V - 1], device=device)
    s = replace(s, hidden=s.hidden * 2.0**-15, head=head, targets=targets)
    exact = testing.oracle(s)
    for lse in (None, exact.lse.float()):
        found = features(s, backend, lse=lse)
        # What may be left of a feature that is 0 has the scale's size.
        small = torch.where(exact.features == 0, found.features / head.logit_scale, found.features)
        testing.assert_bounds(found._replace(features=small), exact, s.cu_seqlens)


@every_forward
def test_a_target_that_the_bias_rules_out(backend: str | None, device: str, dtype: torch.dtype) -> None:
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS["bias"])
    bias = s.head.bias.float().clone()
    bias[s.targets[3]] = -1e30
    s = replace(s, head=replace(s.head, bias=bias))
    exact = testing.oracle(s)
    found = features(s, backend)
    # log p of such a target is a fp32 number of 1e30: held to a relative bound, the others' to all.
    ruled_out = exact.logps < -1e29
    assert ruled_out[3] and not ruled_out.all()
    torch.testing.assert_close(found.logps[ruled_out].double(), exact.logps[ruled_out], rtol=1e-6, atol=0)
    logps = torch.where(ruled_out, exact.logps, found.logps)
    testing.assert_bounds(found._replace(logps=logps), exact, s.cu_seqlens)


@every_forward
def test_a_bias_that_rules_out_all_words_but_two(backend: str | None, device: str, dtype: torch.dtype) -> None:
    """Tiles of masked words alone come before either: no word of those may count for something in the entropy."""
    s = sample(Shape((3, 2), 16, 100_000, "CPU kernels sum a thirty-second at a time"), dtype, device)
    words = torch.tensor([49_999, 99_999], device=device)
    bias = torch.full((100_000,), -1e30, device=device)
    bias[words] = 0
    s = replace(s, head=replace(s.head, bias=bias), targets=words[torch.arange(5, device=device) % 2])
    testing.assert_bounds(features(s, backend), testing.oracle(s), s.cu_seqlens)


@every_forward
@pytest.mark.parametrize("kind", ["random", "peaked"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(backend: str | None, device: str, dtype: torch.dtype, kind: str, options: Options) -> None:
    check(backend, device, dtype, SMALL, kind, options)
    given = oracle(SMALL, dtype, device, kind, options).lse.float()
    check(backend, device, dtype, SMALL, kind, options, lse=given)


@every_forward
@pytest.mark.parametrize("kind", ["bias+", "bias-"])
def test_saturated_softcap(backend: str | None, device: str, dtype: torch.dtype, kind: str) -> None:
    """At |z| = 4 caps the slope 1 - tanh^2 is 1e-3: formed from a rounded tanh it has lost four digits."""
    check(backend, device, dtype, SMALL, kind, Options(softcap=30.0))


@every_forward
def test_entropy_of_confident_tokens_is_relatively_exact(backend: str | None, device: str, dtype: torch.dtype) -> None:
    """The gradient of H has a factor log p_y + H, both as small as 1 - p_y there: an absolute bound would not do."""
    result = check(backend, device, dtype, SMALL, "peaked")
    expected = oracle(SMALL, dtype, device, "peaked", OPTIONS["plain"])
    confident = expected.logps.exp() > 0.5
    assert int(confident.sum()) > 15
    relative = ((result.entropy - expected.entropy).abs() / expected.entropy)[confident]
    assert float(relative.max()) <= testing.ENTROPY_RELATIVE


@every_forward
def test_responses_without_weight(backend: str | None, device: str, dtype: torch.dtype) -> None:
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS["plain"])
    weights = s.token_weights.clone()
    weights[5:14] = 0
    result = features(s, backend, token_weights=weights)
    assert torch.equal(result.features[1:3], torch.zeros_like(result.features[1:3]))
    expected = oracle(SMALL, dtype, device, "random", OPTIONS["plain"])
    others = torch.tensor([True, True, False, True, True], device=device)[:, None]
    testing.assert_bounds(result, expected._replace(features=torch.where(others, expected.features, 0)), s.cu_seqlens)


@every_forward
@pytest.mark.parametrize(
    ("given", "powers"),
    [
        (torch.float32, (-149, 0, 125)),  # from the smallest number that it has
        (torch.bfloat16, (125, -133, 0)),
        (torch.float64, (-1070, 1020, -200)),
    ],
    ids=str,
)
def test_features_do_not_depend_on_the_scale_of_weights(
    backend: str | None, device: str, dtype: torch.dtype, given: torch.dtype, powers: tuple[int, ...]
) -> None:
    """Bit for bit, each response by itself, for all that a dtype holds; on a GPU for sums and inverses in fp32."""
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS["plain"])
    if device == "cuda":
        powers = tuple(max(-100, min(power, 100)) for power in powers)
    weights = torch.randint(0, 5, (SMALL.N,), generator=torch.Generator().manual_seed(4)).to(device, torch.float64)
    power = torch.tensor([powers[b % 3] for b in range(len(SMALL.lengths))], device=device).double()
    power = power.repeat_interleave(s.cu_seqlens.diff())
    scaled = (weights * torch.exp2(power // 2) * torch.exp2(power - power // 2)).to(given)
    expected = features(s, backend, token_weights=weights)
    for found, want in zip(features(s, backend, token_weights=scaled), expected, strict=True):
        assert same_bits(found, want)


@every_forward
def test_defaults(backend: str | None, device: str, dtype: torch.dtype) -> None:
    """No weights means ones; a bare weight is a head; offsets may be int64."""
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS["plain"])
    result = features(s, backend, head=s.head.weight, token_weights=None, cu_seqlens=s.cu_seqlens.long())
    explicit = features(s, backend, token_weights=torch.ones_like(s.token_weights))
    for found, expected in zip(result, explicit, strict=True):
        assert same_bits(found, expected)


def strided_views(s: HeadSample) -> list[tuple[str, HeadSample]]:
    """The sample's values in memory of other layouts."""

    def columns(x: Tensor) -> Tensor:
        return F.pad(x, (1, 2), value=float("nan"))[:, 1:-2]

    def every_other_row(x: Tensor) -> Tensor:
        spread = x.new_full((2 * x.shape[0], x.shape[1]), float("nan"))
        spread[::2] = x
        return spread[::2]

    def transposed(x: Tensor) -> Tensor:
        return x.T.contiguous().T

    def view(layout: Callable[[Tensor], Tensor]) -> HeadSample:
        bias = None if s.head.bias is None else layout(s.head.bias[:, None])[:, 0]
        head = LMHead(layout(s.head.weight), bias, s.head.temperature, s.head.logit_scale, s.head.softcap)
        assert not head.weight.is_contiguous()
        weights = layout(s.token_weights[:, None])[:, 0]
        return HeadSample(layout(s.hidden), head, every_other(s.targets), s.cu_seqlens, weights)

    def every_other(x: Tensor) -> Tensor:
        return torch.stack((x, x - x - 1), 1)[:, 0]

    return [(layout.__name__, view(layout)) for layout in (columns, every_other_row, transposed)]


@every_forward
def test_strided_inputs(backend: str | None, device: str, dtype: torch.dtype) -> None:
    options = OPTIONS["bias"]
    original = sample(SMALL, dtype, device, kind="random", options=options)
    expected = oracle(SMALL, dtype, device, "random", options)
    for _, s in strided_views(original):
        testing.assert_bounds(features(s, backend), expected, s.cu_seqlens)


@every_case
def test_unwritten_memory_is_not_read(
    backend: str | None, device: str, dtype: torch.dtype, poisoned_memory: None
) -> None:
    for shape in (SMALL, HEAD_SHAPES[1], HEAD_SHAPES[7]):
        check(backend, device, dtype, shape, options=OPTIONS["together"])
    result, exact, allowed = gradients(sample(SMALL, dtype, device, kind="random"), backend)
    testing.assert_gradients(result, exact, allowed)


@every_forward
def test_parts_of_a_response_add_up(backend: str | None, device: str, dtype: torch.dtype) -> None:
    """As ranks of a context-parallel group, or several calls, do: Phi is a weighted mean of the parts' Phi."""
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS["plain"])
    whole = features(s, backend)
    for b, cut, end in ((0, 2, 5), (2, 6, 14), (4, 22, 23)):
        start = int(s.cu_seqlens[b])
        parts = [
            features(
                s,
                backend,
                hidden=s.hidden[i:j],
                targets=s.targets[i:j],
                cu_seqlens=torch.tensor([0, j - i], device=device),
                token_weights=s.token_weights[i:j],
            )
            .features[0]
            .double()
            for i, j in ((start, cut), (cut, end))
        ]
        totals = [s.token_weights[i:j].double().sum() for i, j in ((start, cut), (cut, end))]
        combined = (totals[0] * parts[0] + totals[1] * parts[1]) / (totals[0] + totals[1])
        # Each part and the whole are exact to PHI_RELATIVE of their own length.
        allowed = testing.PHI_RELATIVE * (
            (totals[0] * parts[0].norm() + totals[1] * parts[1].norm()) / (totals[0] + totals[1])
            + whole.features[b].double().norm()
        )
        assert float((combined - whole.features[b]).norm()) <= float(allowed)


@every_case
@pytest.mark.parametrize("rows", [0, 1, 3, 17], ids=["tiny", "one-row", "three-rows", "seventeen-rows"])
def test_any_workspace(backend: str | None, device: str, dtype: torch.dtype, rows: int) -> None:
    """A workspace of a byte, and of sizes that cut tokens, responses and vocabulary at odd places."""
    itemsize = 8 if dtype == torch.float64 else 4
    workspace_bytes = max(1, rows * SMALL.V * itemsize)
    check(backend, device, dtype, SMALL, options=OPTIONS["together"], workspace_bytes=workspace_bytes)
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS["together"])
    result, exact, allowed = gradients(s, backend, workspace_bytes=workspace_bytes)
    testing.assert_gradients(result, exact, allowed)


@every_case
def test_any_plan(backend: str | None, device: str, dtype: torch.dtype) -> None:
    """Workspaces for every plan that saves a product, and for none: each within bounds; in C++ the same bits."""
    shape = Shape((130, 0, 77, 1, 256, 64, 72), 40, 1531, "several blocks of 64 tokens and of vocabulary")
    logits = 4 * shape.N * shape.V
    found = []
    for workspace_bytes in (1, logits // 4, logits // 2, 4 * logits):
        found.append(check(backend, device, dtype, shape, kind="peaked", workspace_bytes=workspace_bytes))
    if backend == "native":
        for other in found[1:]:
            for x, y in zip(other, found[0], strict=True):
                assert same_bits(x, y)


class LargestOverVocabulary(TorchDispatchMode):
    """Remembers the largest new tensor, in bytes, that has a dimension of V; weights and their gradients aside."""

    def __init__(self, V: int, d: int) -> None:
        super().__init__()
        self.V, self.d, self.bytes = V, d, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and self.V in x.shape and self.d not in x.shape:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out


@every_case
def test_logits_never_exist_as_a_whole(backend: str | None, device: str, dtype: torch.dtype) -> None:
    """No tensor with a dimension of V is larger than the workspace, though [N, V] would be four times its size."""
    shape = Shape((50, 100, 1, 49), 16, 1105, "N = 200, for a workspace of 50 rows")
    s = sample(shape, dtype, device, kind="random", options=OPTIONS["bias"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    workspace_bytes = 50 * shape.V * wide.itemsize
    ones = torch.ones(shape.N, dtype=wide, device=device)
    inputs = (s.hidden, s.record, s.targets)
    responses, saved = Responses(s.cu_seqlens, s.token_weights), TokenLogprobs(ones, ones, ones)
    with use_backend(backend):
        run, logprobs, backward = (
            resolve(op, torch.device(device), dtype) for op in ("sequence_features", *HEAD_OPS[::2])
        )
    for call in (
        lambda: logprobs(*inputs, workspace_bytes),
        lambda: run(*inputs, responses, workspace_bytes),
        lambda: backward(ones, ones, *inputs, saved, Needs(), workspace_bytes),
    ):
        with LargestOverVocabulary(shape.V, shape.d) as seen:
            call()
        assert seen.bytes <= workspace_bytes


def test_the_torch_backend_frees_logits_before_it_makes_others() -> None:
    V, N = 1105, 200
    head = Head(torch.randn(V, 16), None)
    inputs = (torch.randn(N, 16), head, torch.zeros(N, dtype=torch.int64))
    workspace_bytes = 50 * V * 4
    with LiveMemory(least=V * 16 * 4 + 1) as memory:
        eager.token_logprobs(*inputs, workspace_bytes)
    assert memory.peak <= workspace_bytes


CALLS_IN_LITTLE_MEMORY = """
import re, resource, torch
from g2rl_kernels import sequence_features, use_backend

torch.set_num_threads(1)
N, d, V = 16, 1024, 8192
hidden, weight, targets = torch.ones(N, d).bfloat16(), torch.ones(V, d).bfloat16(), torch.zeros(N, dtype=torch.int64)
cu_seqlens = torch.arange(257) // 16  # partial sums of so many responses take 32 MB
with use_backend("native"):
    sequence_features(hidden[:1], weight[:9], targets[:1], torch.tensor([0, 1]))
    in_use = 1024 * int(re.search(r"VmSize:\\s*(\\d+)", open("/proc/self/status").read())[1])
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (20 << 20),) * 2)
    lse = None
    for _ in range(2):
        for workspace_bytes in (1, 8 << 20):
            found = sequence_features(hidden, weight, targets, cu_seqlens, None, lse, workspace_bytes=workspace_bytes)
        lse = found.lse
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux counts it")
@pytest.mark.skipif("native" not in testing.available_backends(ops=HEAD_OPS), reason="not compiled")
def test_partial_sums_of_native_features_are_within_the_workspace() -> None:
    run = subprocess.run([sys.executable, "-c", CALLS_IN_LITTLE_MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_rows_too_far_apart_for_offsets_of_32_bits_are_copied() -> None:
    """As the last positions of long sequences are, `hidden_states[:, -1]`."""
    for stride, copied in ((4, False), (8192 * 512, False), (8192 * 4096, True)):
        x = torch.empty_strided((3, 4), (stride, 1), device="meta")
        assert (unit_stride(x) is not x) == copied
        assert unit_stride(x).stride(0) == (4 if copied else stride)


def test_a_single_row_or_column_has_the_strides_that_kernels_expect() -> None:
    """PyTorch takes any for contiguous there; Triton's descriptors of tensors, for one, do not."""
    for shape, stride in (((1, 4), (8192 * 4096, 1)), ((1, 1), (8, 8)), ((3, 1), (1, 8))):
        x = torch.empty_strided(shape, stride, device="meta")
        assert unit_stride(x).stride() == (shape[1], 1)


def test_the_torch_backend_cuts_the_long_sums_of_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def counted(a: Tensor, b: Tensor) -> Tensor:
        lengths.append(a.shape[1])
        return mm(a, b)

    monkeypatch.setattr(products, "CHAIN", {"cpu": 16})
    monkeypatch.setattr(products, "mm", counted)
    s = sample(Shape((5, 3), 35, 70, "two chains and a rest"), torch.bfloat16)
    with use_backend("torch"):
        testing.assert_bounds(token_logprobs(s.hidden, s.head, s.targets), testing.oracle(s))
    assert set(lengths) == {16, 3}


def library_treats_rows_alike(s: HeadSample) -> bool:
    """Whether the library gives a row of a product the same bits wherever in a block of rows it stands.

    The `torch` backend can promise no more for 16-bit numbers and fp32; the native kernels multiply themselves.
    """
    weight = s.head.weight
    w = weight if weight.is_cuda else weight.float()
    random = torch.Generator().manual_seed(4)
    with exact_products(weight):
        for b in (w.T, w):
            row = torch.randn(1, b.shape[0], generator=random).to(weight.device, weight.dtype).to(w.dtype)
            block = mm(row.expand(64 if not w.is_cuda else 256, -1).contiguous(), b)
            if not torch.equal(block, block[:1].expand_as(block)):
                return False
    return True


@every_forward
@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        Shape((67, 3, 64), 129, 257, "more tokens than a tile has rows"),
        Shape(
            (3, 70, 1), 1030, 96, "a hidden size over which libraries cut their sums, at places that depend on the rows"
        ),
        Shape((1, 2), 4, 33001, "a vocabulary over which PyTorch cuts a single row's sums between threads"),
    ],
    ids=lambda shape: f"d{shape.d}-V{shape.V}",
)
def test_responses_do_not_depend_on_their_batch(
    backend: str | None, device: str, dtype: torch.dtype, shape: Shape
) -> None:
    """Bit for bit: alone, among others, and among others in another order.

    Where the library's products do not keep it, the `torch` backend is held to the bounds alone.
    """
    s = sample(shape, dtype, device, kind="random", options=OPTIONS["bias"])
    together = features(s, backend)
    cu = s.cu_seqlens.tolist()
    ranges = list(zip(cu[:-1], cu[1:], strict=True))

    def of(order: list[int]) -> SequenceFeatures:
        tokens = torch.cat([torch.arange(*ranges[b]) for b in order]).to(device)
        offsets = torch.tensor([0, *(ranges[b][1] - ranges[b][0] for b in order)], device=device).cumsum(0)
        return features(
            s,
            backend,
            hidden=s.hidden[tokens],
            targets=s.targets[tokens],
            cu_seqlens=offsets,
            token_weights=s.token_weights[tokens],
        )

    promised = device == "cpu" and (dtype == torch.float64 or library_treats_rows_alike(s))
    if backend == "torch" and not promised:
        exact = oracle(shape, dtype, device, "random", OPTIONS["bias"])
        for b, (start, end) in enumerate(ranges):
            expected = SequenceFeatures(exact.features[b : b + 1], *(x[start:end] for x in exact[1:]))
            testing.assert_bounds(of([b]), expected)
        return
    for b, (start, end) in enumerate(ranges):
        alone = of([b])
        assert same_bits(alone.features[0], together.features[b])
        for found, expected in zip(alone[1:], together[1:], strict=True):
            assert same_bits(found, expected[start:end])
    backwards = of(list(range(len(ranges)))[::-1])
    assert same_bits(backwards.features.flip(0), together.features)


@pytest.fixture
def other_numbers_of_threads() -> Iterator[Iterator[int]]:
    """Sets each number in turn, and puts PyTorch's own back."""
    before = torch.get_num_threads()

    def numbers() -> Iterator[int]:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            yield threads

    yield numbers()
    torch.set_num_threads(before)


@pytest.mark.skipif("native" not in testing.available_backends(ops=HEAD_OPS), reason="not compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens_per_response", [2, 70], ids=["threads-over-vocabulary", "threads-over-responses"])
def test_native_bits_do_not_depend_on_the_number_of_threads(
    dtype: torch.dtype, tokens_per_response: int, other_numbers_of_threads: Iterator[int]
) -> None:
    shape = Shape((tokens_per_response,) * 3, 96, 1531, "few tokens, and more than a block of 64")
    s = sample(shape, dtype, "cpu", kind="peaked", options=OPTIONS["bias"])
    expected, expected_gradients = features(s, "native"), gradients(s, "native")[0]
    for _ in other_numbers_of_threads:
        for found, want in zip(features(s, "native"), expected, strict=True):
            assert same_bits(found, want)
        for found, want in zip(gradients(s, "native")[0], expected_gradients, strict=True):
            assert same_bits(found, want)


@every_case
def test_same_inputs_same_bits(backend: str | None, device: str, dtype: torch.dtype) -> None:
    s = sample(HEAD_SHAPES[7], dtype, device, kind="random", options=OPTIONS["plain"])
    for found, expected in zip(features(s, backend), features(s, backend), strict=True):
        assert same_bits(found, expected)
    for found, expected in zip(gradients(s, backend)[0], gradients(s, backend)[0], strict=True):
        assert found is expected is None or same_bits(found, expected)


@pytest.fixture
def restore_precision():  # noqa: ANN201
    """Puts every setting of fp32 products back."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    for matmul in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul):
        matmul.fp32_precision = "none"


def settings() -> tuple[str, ...]:
    backends = torch.backends
    return (
        backends.fp32_precision,
        backends.mkldnn.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
        backends.cuda.matmul.fp32_precision,
    )


@every_case
def test_global_precision_settings_change_nothing(
    backend: str | None, device: str, dtype: torch.dtype, restore_precision: None
) -> None:
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS["plain"])
    expected = features(s, backend)
    expected_gradients = gradients(s, backend)[0]

    def unchanged() -> None:
        before = settings()
        for found, want in zip(features(s, backend), expected, strict=True):
            assert same_bits(found, want)
        assert same_bits(gradients(s, backend)[0].hidden, expected_gradients.hidden)
        assert settings() == before

    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    unchanged()
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    unchanged()
    # A product's setting that followed the global one must go on following it.
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    torch.set_float32_matmul_precision("medium")
    unchanged()
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_multiplies(restore_precision: None) -> None:
    """It waits for no lock that nobody gives back, and has the settings of before."""
    inside, done = threading.Event(), threading.Event()

    def multiply() -> None:
        with exact_products(torch.zeros(1, dtype=torch.bfloat16)):
            inside.set()
            done.wait()

    before = settings()
    thread = threading.Thread(target=multiply)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        kept = settings() == before
        with exact_products(torch.zeros(1, dtype=torch.bfloat16)):
            os._exit(0 if kept else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert settings() == before


@every_case
def test_autocast_changes_nothing(backend: str | None, device: str, dtype: torch.dtype) -> None:
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS["plain"])
    expected, expected_gradients = features(s, backend), gradients(s, backend)[0]
    with torch.autocast(device, dtype=torch.bfloat16):
        result, result_gradients = features(s, backend), gradients(s, backend)[0]
    for found, want in zip((*result, *result_gradients[:2]), (*expected, *expected_gradients[:2]), strict=True):
        assert same_bits(found, want)


# Backward.


def gradients(
    s: HeadSample,
    backend: str | None,
    g_logps: Tensor | None = None,
    g_entropy: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> tuple[Gradients, Gradients, Gradients]:
    """Of a backend; exact; and the errors allowed."""
    if g_logps is None:
        g_logps, g_entropy = upstream(s)
    with use_backend(backend):
        found = testing.gradients(s, g_logps, g_entropy, workspace_bytes)
    return found, *testing.oracle_gradients(s, g_logps, g_entropy)


@every_case
@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "bias+"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients(backend: str | None, device: str, dtype: torch.dtype, kind: str, options: Options) -> None:
    s = sample(SMALL, dtype, device, kind=kind, options=options)
    result, exact, allowed = gradients(s, backend)
    assert [None if x is None else x.dtype for x in result] == [
        dtype,
        dtype,
        None if s.head.bias is None else s.head.bias.dtype,
    ]
    testing.assert_gradients(result, exact, allowed)


@every_case
@pytest.mark.parametrize("shape", HEAD_SHAPES, ids=lambda shape: f"N{shape.N}-d{shape.d}-V{shape.V}")
def test_gradients_of_shapes(backend: str | None, device: str, dtype: torch.dtype, shape: Shape) -> None:
    s = sample(shape, dtype, device, kind="random", options=OPTIONS["bias"])
    result, exact, allowed = gradients(s, backend)
    testing.assert_gradients(result, exact, allowed)


@every_case
@pytest.mark.parametrize("which", ["logps", "entropy"])
def test_gradients_of_one_output(backend: str | None, device: str, dtype: torch.dtype, which: str) -> None:
    """Through `sequence_features`, by the loss alone that a caller writes; the other output takes no part."""
    for kind in ("random", "peaked"):
        s = sample(SMALL, dtype, device, kind=kind, options=OPTIONS["plain"])
        g = upstream(s)[0]
        hidden, weight = s.hidden.detach().requires_grad_(), s.head.weight.detach().requires_grad_()
        (getattr(features(s, backend, hidden=hidden, head=weight), which) * g).sum().backward()
        nothing = torch.zeros_like(g)
        exact, allowed = testing.oracle_gradients(s, *((g, nothing) if which == "logps" else (nothing, g)))
        testing.assert_gradients(Gradients(hidden.grad, weight.grad, None), exact, allowed)


@every_case
def test_gradients_of_confident_tokens_keep_their_size(backend: str | None, device: str, dtype: torch.dtype) -> None:
    """d log p_y / dh of a token of 1 - p_y = 1e-6, which p_y - 1 from a rounded p_y makes wrong by 6 %, or 0."""
    s = sample(SMALL, dtype, device, kind="peaked", options=OPTIONS["plain"])
    # Sized such that the gradient is of order one for each token, within reach of fp16.
    g = (
        (-torch.expm1(oracle(SMALL, dtype, device, "peaked", OPTIONS["plain"]).logps))
        .reciprocal()
        .to(upstream(s)[0].dtype)
    )
    result, exact, _ = gradients(s, backend, g, torch.zeros_like(g))
    relative = (result.hidden.double() - exact.hidden).norm(dim=1) / exact.hidden.norm(dim=1)
    # One rounding of G, one of the result, and the contract's relative error of log p.
    assert float(relative.max()) <= 2 * testing.ROUNDOFF[dtype] + testing.LOGP_RELATIVE


@every_case
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
def test_only_some_inputs_need_gradients(
    backend: str | None, device: str, dtype: torch.dtype, wanted: tuple[str, ...]
) -> None:
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS["bias"])
    inputs = {"hidden": s.hidden, "weight": s.head.weight, "bias": s.head.bias}
    inputs = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    g_logps, g_entropy = upstream(s)
    with use_backend(backend):
        out = token_logprobs(inputs["hidden"], LMHead(inputs["weight"], inputs["bias"]), s.targets)
        torch.autograd.backward((out.logps, out.entropy), (g_logps, g_entropy))
    assert tuple(name for name, x in inputs.items() if x.grad is not None) == wanted
    exact, allowed = testing.oracle_gradients(s, g_logps, g_entropy)
    testing.assert_gradients(Gradients(**{name: x.grad for name, x in inputs.items()}), exact, allowed)


@every_case
def test_gradients_of_strided_inputs(backend: str | None, device: str, dtype: torch.dtype) -> None:
    original = sample(SMALL, dtype, device, kind="random", options=OPTIONS["bias"])
    for _, s in strided_views(original):
        result, exact, allowed = gradients(s, backend)
        testing.assert_gradients(result, exact, allowed)


@every_case
def test_what_needs_no_gradient_has_none(backend: str | None, device: str, dtype: torch.dtype) -> None:
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS["plain"])
    result = features(s, backend, hidden=s.hidden.detach().requires_grad_())
    assert [x.requires_grad for x in result] == [False, True, True, False]
    assert not any(x.requires_grad for x in features(s, backend))
    with torch.inference_mode():
        inferred = features(s, backend)
    assert all(same_bits(found, want.detach()) for found, want in zip(inferred, result, strict=True))


def test_second_derivatives_are_refused() -> None:
    """Not silently zero."""
    s = sample(SMALL, torch.float64, "cpu", kind="random", options=OPTIONS["plain"])
    hidden = s.hidden.detach().requires_grad_()
    (first,) = torch.autograd.grad(token_logprobs(hidden, s.head, s.targets).logps.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


@pytest.mark.parametrize(
    ("N", "V", "entries", "most_columns", "expected"),
    [
        (10, 300, 10 * 304, 300, (10, 300)),  # all of it, with rows that are padded to 16 bytes
        (10, 300, 10 * 300, 300, (10, 256)),
        (1000, 1100, 1000 * 800, 1100, (1000, 640)),  # two strips, alike but for what is left
        (10, 40000, 10 * 40000, 1 << 14, (10, 13440)),
        (100, 1000, 100 * 128, 1000, (100, 128)),
        (1000, 1000, 30000, 1000, (128, 128)),  # no more for all tokens
        (1000, 1000, 10, 1000, (7, 128)),
        (5, 50, 100, 50, (2, 50)),
    ],
)
def test_strips_of_the_backward_pass(
    N: int, V: int, entries: int, most_columns: int, expected: tuple[int, int]
) -> None:
    assert _chunks(N, V, entries, most_columns) == expected
