"""Triton kernels in Triton's interpreter, on CPU tensors, held to the contract.

Run by test_triton_interpreter.py in a process of its own, with TRITON_INTERPRET=1 from the start. The interpreter takes
a time per tile and per operation: shapes are small, and each is ragged against tiles of 16 tokens, 64 words and 32
dimensions and against splits of 256 words.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from head_cases import (
    PLANS,
    WRONG_LSE,
    check,
    check_gradients,
    check_gradients_of_masked_words,
    check_logits_beyond_the_digits_of_fp32,
    check_lse_of_something_else,
    check_masked_parts,
    check_masked_words,
    check_parts,
    check_second_response_first,
    check_sure_tokens,
    features,
    given,
    oracle,
    sample,
)
from torch import Tensor
from triton.runtime import interpreter

from g2rl_kernels import LMHead, Shaping, g2rl_advantages, sequence_features, testing, token_logprobs, use_backend
from g2rl_kernels.backends.triton import configs, kernels
from g2rl_kernels.backends.triton.candidates import KERNELS
from g2rl_kernels.backends.triton.configs import Tile
from g2rl_kernels.backends.triton.responses import inverse_and_flags
from g2rl_kernels.testing import OPTIONS, Shape

RAGGED = Shape((5, 0, 9, 1, 8), 63, 321, "N = 23 prime, odd d, two splits of V, an empty and a one-token response")
ALIGNED = Shape((5, 0, 18, 1, 8), 40, 321, "rows that TMA can address, d and responses that end inside tiles")
LONG = Shape((37, 1), 17, 70, "a response over three tiles of tokens, one ragged tile of V beyond a whole one")
SHAPES = (
    Shape((), 16, 64, "no responses"),
    Shape((0,), 16, 64, "no tokens, one empty response"),
    Shape((3, 2), 1, 1, "a vocabulary of one: splits and tiles without any word but the target"),
    Shape((16, 1, 15), 64, 256, "nothing ragged in d and V; responses end on and off a tile edge"),
    LONG,
)
LOADS = ((RAGGED, "plain"), (ALIGNED, "softcap"))  # by pointers and by TMA
# bf16 products are made in fp32 there, as the interpreter's own are wrong; one case shows that loads and splits are
# right.
DTYPES = (torch.float32, torch.float16)
LOGITS = [("random", torch.float32), *((kind, torch.float16) for kind in ("random", "peaked", "bias+", "hidden-"))]


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.set_num_threads(1)
    monkeypatch.setattr(interpreter, "_patch_lang", once_in_each_module(interpreter._patch_lang))
    with use_backend("triton"):
        yield


def once_in_each_module(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton's language is patched for a kernel, and again in each call of a function by it: a third of all time."""
    patched: set[int] = set()

    def patch_for(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None  # to a function, which takes nothing back: its kernel does
        patched.add(module)
        scope = patch(function)
        return SimpleNamespace(restore=lambda: (patched.clear(), scope.restore()))

    return patch_for


@pytest.mark.parametrize(("kind", "dtype"), LOGITS, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_plans_and_logits(plan: str, kind: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    s = sample(RAGGED, dtype, kind=kind, options=OPTIONS["plain"])
    check(RAGGED, dtype, kind, lse=given(plan, s, request))


@pytest.mark.parametrize("given", [False, True], ids=["", "lse"])
def test_sure_tokens(given: bool) -> None:
    check_sure_tokens(RAGGED, torch.float32, given=given)


@pytest.mark.parametrize("wrong", WRONG_LSE[-3:])
def test_an_lse_of_something_else(wrong: float) -> None:
    check_lse_of_something_else(RAGGED, torch.float32, wrong)


def test_logits_beyond_the_digits_of_fp32() -> None:
    """Without the fused multiplications of a chip nothing is above its maximum here."""
    check_logits_beyond_the_digits_of_fp32(torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["plain", "together"])
def test_parts_of_the_vocabulary(options: str, dtype: torch.dtype) -> None:
    """A part of one word, one of a split and a tile, and one of less than a split."""
    check_parts(sample(RAGGED, dtype, kind="peaked", options=OPTIONS[options]), (0, 1, 280, 321))


@pytest.mark.parametrize("plan", PLANS[:3])
def test_masked_words(plan: str, request: pytest.FixtureRequest) -> None:
    s = sample(RAGGED, torch.float16, kind="random", options=OPTIONS["bias"])
    check_masked_words(RAGGED, torch.float16, lse=given(plan, s, request))


def test_gradients_and_parts_of_masked_words() -> None:
    """Of a split and parts of it."""
    check_gradients_of_masked_words(RAGGED, torch.float16)
    check_masked_parts(sample(RAGGED, torch.float16, kind="random", options=OPTIONS["bias"]), (0, 1, 280, 321))


@pytest.mark.parametrize("off", [20.0, 5.0, -20.0])
def test_an_lse_of_another_head(off: float) -> None:
    expected = oracle(RAGGED, torch.float16, "cpu", "random", OPTIONS["plain"])
    check(RAGGED, torch.float16, lse=expected.lse.float() + off)


@pytest.mark.parametrize("error", ["rounded", "shared", "of-one-token", "of-a-token-without-weight"])
@pytest.mark.parametrize("lse_near", [0.1, 5.0, 100.0, 200.0])
def test_which_responses_a_given_lse_is_too_far_off_for(lse_near: float, error: str) -> None:
    """Not for what fp32 rounds, whatever its size, nor for what all of a response's tokens are off by alike."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 300, 0, 2, 517])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    N = int(lengths.sum())
    a = torch.rand(N, generator=random) + 0.1
    exact = lse_near * (1 + 0.2 * torch.rand(N, generator=random, dtype=torch.float64))
    lse = exact.float()
    wrong = torch.zeros(N, dtype=torch.float64)
    if error == "shared":
        wrong += 1e-3
    elif error.startswith("of-"):
        wrong[[0, 100, 301]] = 2e-5
        if error.endswith("weight"):
            a[[0, 100, 301]] = 0
    S = torch.exp(exact - lse.double() + wrong).float()
    inverse, flags, flagged = inverse_and_flags(cu_seqlens, a, S, lse)
    expected = [1, 3] if error == "of-one-token" else []
    assert flags.nonzero()[:, 0].tolist() == expected == flagged[1 : 1 + flagged[0]].tolist()
    for b, (first, last) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        of = slice(first, last)
        total = a[of].double() @ (torch.ones(last - first).double() if flags[b] else S[of].double())
        assert float(inverse[b]) == pytest.approx(1 / float(total) if total > 0 else 0.0, rel=3e-7)


def test_a_product_is_not_made_twice_for_a_rounded_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of another pass, rounded to fp32 near 120."""
    s = sample(RAGGED, torch.float32, kind="bias+", options=OPTIONS["plain"])
    counts = []

    def spy(*arguments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = inverse_and_flags(*arguments)
        counts.append(int(found[2][0]))
        return found

    monkeypatch.setattr(kernels, "inverse_and_flags", spy)
    features(s, lse=token_logprobs(s.hidden, s.head, s.targets).lse)
    assert counts == [0]


@pytest.mark.parametrize("options", ["plain", "softcap", "together"])
@pytest.mark.parametrize("plan", PLANS)
def test_rows_loaded_by_tma(plan: str, options: str, request: pytest.FixtureRequest) -> None:
    """Those of the next response too, and what lies beyond N and V."""
    s = sample(ALIGNED, torch.float16, kind="random", options=OPTIONS[options])
    assert configs.tile("residuals", s.hidden, s.head.weight).USE_TMA
    assert not configs.tile("residuals", *(x[:, 1:] for x in (s.hidden, s.head.weight))).USE_TMA
    testing.assert_bounds(
        features(s, lse=given(plan, s, request)),
        oracle(ALIGNED, torch.float16, "cpu", "random", OPTIONS[options]),
        s.cu_seqlens,
    )


@pytest.mark.parametrize(("shape", "options"), LOADS, ids=["pointers-plain", "tma-softcap"])
@pytest.mark.parametrize("plan", PLANS)
def test_nan_stays_in_its_response(plan: str, shape: Shape, options: str, request: pytest.FixtureRequest) -> None:
    """Others, before and after it in memory, keep their bits."""
    s = sample(shape, torch.float16, kind="random", options=OPTIONS[options])
    lse = given(plan, s, request)
    clean = features(s, lse=lse)
    first, last = int(s.cu_seqlens[2]), int(s.cu_seqlens[3])
    hidden = s.hidden.clone()
    hidden[first] = torch.nan
    found = sequence_features(hidden, s.head, s.targets, s.cu_seqlens, s.token_weights, lse)
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(found.features[others], clean.features[others]) and found.features[2].isnan().all()
    for name in ("logps", "entropy", "lse"):
        got, want = getattr(found, name), getattr(clean, name)
        assert got[first].isnan() and torch.equal(got[:first], want[:first]), name
        assert torch.equal(got[first + 1 :], want[first + 1 :]), name
    assert last > first + 1


@pytest.mark.parametrize(("shape", "options"), LOADS, ids=["pointers-plain", "tma-softcap"])
@pytest.mark.parametrize("plan", PLANS)
def test_nan_of_a_word_shows_in_every_token(
    plan: str, shape: Shape, options: str, request: pytest.FixtureRequest
) -> None:
    """A word that is nobody's target; a diverged head must not look like one that finds the word unlikely."""
    s = sample(shape, torch.float16, kind="random", options=OPTIONS[options])
    lse = given(plan, s, request)
    weight = s.head.weight.clone()
    weight[next(v for v in range(100, 321) if v not in s.targets)] = torch.nan
    head = LMHead(weight, s.head.bias, s.head.temperature, s.head.logit_scale, s.head.softcap)
    found = sequence_features(s.hidden, head, s.targets, s.cu_seqlens, s.token_weights, lse)
    for x in (found.logps, found.entropy, found.lse, found.features[s.cu_seqlens.diff() > 0]):
        assert x.isnan().all()
    hidden = s.hidden.detach().requires_grad_()
    out = token_logprobs(hidden, head, s.targets)
    assert out.logps.isnan().all() and out.entropy.isnan().all() and out.lse.isnan().all()
    (gradient,) = torch.autograd.grad(out.logps.sum(), hidden)
    assert gradient.isnan().all()


def test_bf16(kept: None) -> None:
    check(RAGGED, torch.bfloat16, "peaked", OPTIONS["together"])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"N{shape.N}-d{shape.d}-V{shape.V}")
@pytest.mark.parametrize("plan", ["recomputed", "kept", "given"])
def test_shapes(plan: str, shape: Shape, request: pytest.FixtureRequest) -> None:
    s = sample(shape, torch.float16, kind="random", options=OPTIONS["plain"])
    check(shape, torch.float16, lse=given(plan, s, request))
    testing.assert_bounds(
        token_logprobs(s.hidden, s.head, s.targets), oracle(shape, torch.float16, "cpu", "random", OPTIONS["plain"])
    )


@pytest.mark.parametrize("options", ["temperature", "logit-scale", "softcap", "together"])
@pytest.mark.parametrize("plan", ["recomputed", "kept", "given"])
def test_options(plan: str, options: str, request: pytest.FixtureRequest) -> None:
    s = sample(LONG, torch.float32, kind="peaked", options=OPTIONS[options])
    check(LONG, torch.float32, "peaked", OPTIONS[options], lse=given(plan, s, request))


@pytest.mark.parametrize("rows", [0, 3, 17])
@pytest.mark.parametrize("plan", ["recomputed", "kept", "given"])
def test_any_workspace(plan: str, rows: int, request: pytest.FixtureRequest) -> None:
    s = sample(LONG, torch.float32, kind="random", options=OPTIONS["bias"])
    lse = given(plan, s, request)
    check(LONG, torch.float32, options=OPTIONS["bias"], lse=lse, workspace_bytes=max(1, rows * LONG.V * 6))


@pytest.mark.parametrize("plan", ["recomputed", "kept", "given"])
def test_responses_do_not_depend_on_their_batch(plan: str, request: pytest.FixtureRequest) -> None:
    """Bit for bit. Chunks of kept logits end inside responses, at other tokens of them when they stand elsewhere."""
    s = sample(LONG, torch.float16, kind="random", options=OPTIONS["plain"])
    limit = 2**28 if plan == "given" else 11 * LONG.V * 6
    check_second_response_first(s, lse=given(plan, s, request), workspace_bytes=limit)


@pytest.mark.parametrize(
    ("dtype", "kind", "options", "rows"),
    [
        (torch.float32, "random", "together", 1000),
        (torch.float32, "peaked", "plain", 1000),
        (torch.float16, "random", "bias", 9),
        (torch.float16, "peaked", "softcap", 1000),
        (torch.float16, "bias+", "together", 9),  # a saturated cap: G is 1e-13 of its bound
        (torch.bfloat16, "bias+", "plain", 1000),
    ],
)
def test_gradients(dtype: torch.dtype, kind: str, options: str, rows: int) -> None:
    """Workspaces that cut both ways."""
    s = sample(RAGGED, dtype, kind=kind, options=OPTIONS[options])
    check_gradients(s, workspace_bytes=rows * RAGGED.V * dtype.itemsize)


@pytest.mark.parametrize(
    ("sizes", "d"), [((3, 1, 0, 2), 37), ((16, 16), 64), ((40, 7), 33)], ids=["ragged", "tile", "two-tiles-of-rows"]
)
def test_group_op(sizes: tuple[int, ...], d: int) -> None:
    """All rules and options against the reference; near-equal directions, a Phi of 0, invalid rows, equal rewards."""
    random = torch.Generator().manual_seed(0)
    B = sum(sizes)
    phi = torch.randn(B, d, generator=random)
    phi[1::4] = phi[0] * (1 + 1e-4) + 1e-4 * torch.randn(d, generator=random)
    phi[2] = 0
    rewards = torch.randint(0, 2, (B,), generator=random).float() * 2 - 1
    rewards[: sizes[0]] = 0.3
    cu_groups = torch.tensor([0, *sizes]).cumsum(0)
    valid = torch.rand(B, generator=random) > 0.2
    for rule, uniform, normalize in itertools.product(
        ("scale", "centered", "literal"), ("shape", "drop"), ("std", "none")
    ):
        shaping = Shaping(0.7, 1.5, rule, 1e-2, uniform)
        for mask in (None, valid) if normalize == "std" else (valid,):
            found = g2rl_advantages(phi, rewards, cu_groups, shaping, mask, normalize=normalize)
            with use_backend("reference"):
                expected = g2rl_advantages(phi, rewards, cu_groups, shaping, mask, normalize=normalize)
            for name, got, want in zip(found._fields, found, expected, strict=True):
                # Both are float64 rounded to fp32; strength and clip reach the kernel as fp32.
                torch.testing.assert_close(
                    got, want, rtol=3e-7, atol=3e-7, msg=lambda text, name=name: f"{name}: {text}"
                )


@pytest.mark.parametrize("kernel", KERNELS)
def test_tuner_compares_like_with_like(kernel: str) -> None:
    """What benchmarks.tune runs has the same results with every tile, and gets a time."""
    tune = pytest.importorskip("benchmarks.tune", reason="needs rich")
    tiles = (Tile(16, 64, 32, 1, 1), Tile(32, 16, 64, 1, 1))
    rows = [{"tile": tile, "role": role, "status": "ok"} for tile, role in zip(tiles, ("table", "other"), strict=True)]
    tune.time_rows(kernel, rows, sample(LONG, torch.float32), rounds=1)
    for row in rows:
        assert row["status"] == "ok" and row["median_s"] > 0 and row["times_floor"] > 0, row


def test_tuner_prints_a_line_until_its_time_is_up() -> None:
    tune = pytest.importorskip("benchmarks.tune", reason="needs rich")
    tile = Tile(16, 64, 32, 1, 1)
    rows = {kernel: [{"tile": tile, "role": "table", "status": "ok"}] for kernel in ("projection", "statistics")}
    report = tune.Report(torch.device("cpu"), None)
    place = (torch.device("cpu"), 90)
    shape = tune.Shape("tiny", "tiny", 24, 3, 32, 321)
    tune.tune(rows, shape, "fp32", place, float("inf"), report)
    assert report.content["lines"] == [
        f'("{kernel}", False, 90): Tile(16, 64, 32, 1, 1),' for kernel in ("projection", "statistics")
    ]
    tune.tune(rows, shape, "fp32", place, 0.0, report)
    assert len(report.content["left_out"]) == 2 and not report.wrong
