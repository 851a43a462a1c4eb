"""Ops for a part of the vocabulary, on every backend, without ranks: together, parts hold the contract of the whole."""

from __future__ import annotations

import pytest
import torch
from backend_cases import FLOAT_DTYPES, over_backends
from head_cases import check_masked_parts, check_parts, joined_parts, sample

from g2rl_kernels import testing, use_backend
from g2rl_kernels.testing import OPTIONS, SMALL, HeadSample, Shape

PART_OPS = ("token_sums", "part_features", "logprobs_backward")
every_backend = over_backends(*PART_OPS)
every_other_dtype = over_backends(*PART_OPS, dtypes=FLOAT_DTYPES[::2])
# A single word, a part with few targets, and one that is ragged against every tile.
WORDS = (0, 1, 130, SMALL.V)


@every_backend
@pytest.mark.parametrize("kind", ["random", "peaked"])
def test_options(backend: str | None, device: str, dtype: torch.dtype, kind: str) -> None:
    for options in OPTIONS.values():
        with use_backend(backend):
            check_parts(sample(SMALL, dtype, device, kind=kind, options=options), WORDS)


@every_other_dtype
@pytest.mark.parametrize("kind", ["flat", "bias+", "bias-", "hidden+", "hidden-"])
def test_kinds_of_logits(backend: str | None, device: str, dtype: torch.dtype, kind: str) -> None:
    s = sample(SMALL, dtype, device, kind=kind, options=OPTIONS["plain"])
    with use_backend(backend):
        check_parts(s, WORDS, testing.accumulation_error(s) if kind.startswith("hidden") else None)


@every_backend
def test_masked_words(backend: str | None, device: str, dtype: torch.dtype) -> None:
    with use_backend(backend):
        check_masked_parts(sample(SMALL, dtype, device, options=OPTIONS["bias"]), WORDS)


@every_other_dtype
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape((), 16, 64, "no responses"), (0, 60, 64)),
        (Shape((0,), 16, 64, "no tokens, one empty response"), (0, 60, 64)),
        (Shape((2, 1), 1, 2, "parts of one word: nothing but the target, or nothing of it"), (0, 1, 2)),
        (Shape((70, 1), 129, 1105, "tokens beyond one block; eight parts"), (*range(0, 1104, 138), 1105)),
    ],
    ids=["no-responses", "no-tokens", "words", "eight"],
)
def test_shapes(backend: str | None, device: str, dtype: torch.dtype, shape: Shape, words: tuple[int, ...]) -> None:
    with use_backend(backend):
        check_parts(sample(shape, dtype, device, kind="random", options=OPTIONS["plain"]), words)


@over_backends(*PART_OPS, dtypes=(torch.bfloat16, torch.float32), but=("torch",))
def test_bits_do_not_depend_on_the_batch(backend: str | None, device: str, dtype: torch.dtype) -> None:
    """The last response of 8 tokens, alone and behind the others; the torch backend leaves it to the library."""
    s = sample(SMALL, dtype, device, kind="random", options=OPTIONS["together"])
    last = slice(SMALL.N - 8, None)
    cu_seqlens = torch.tensor([0, 8], device=device)
    alone = HeadSample(s.hidden[last], s.head, s.targets[last], cu_seqlens, s.token_weights[last])
    with use_backend(backend):
        together, found = joined_parts(s, WORDS), joined_parts(alone, WORDS)
    assert torch.equal(found.features[0], together.features[-1])
    assert all(torch.equal(x, y[last]) for x, y in zip(found[1:], together[1:], strict=True))
