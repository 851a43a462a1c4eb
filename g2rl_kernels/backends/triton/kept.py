"""Residuals summed in vocabulary space from logits that pass 1 kept, for a chunk of tokens.

    R[b, v] += sum_{t in b and chunk} a_t slope_tv ([v = y_t] S_rest_t / S_t  -  [v != y_t] exp(u_tv - m_t) / S_t)

One program owns (response, vocabulary tile) and adds tokens one by one: chunks can end anywhere without changing a bit.
Sums of a segment, so many tokens of a response, are added to R when they are whole: one sum of tens of thousands would
lose digits. What a chunk that ends inside a segment has of it is carried to the next.
Logits are kept in fp32. Exponentials in 16 bits, with a scale for each row and tile, round by up to 2^-12 of themselves
in fp16 and 2^-9 in bf16. A response of one token with few likely words shows that in full: Phi was off by 3e-5 in fp16
and by 2e-4 in bf16, of 64 tokens by 9e-6 and 6e-5, where 1e-5 is allowed for all errors together. Their roots in 16
bits, which the CUDA kernels for Hopper keep, would hold.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from g2rl_kernels.backends.triton import configs
from g2rl_kernels.backends.triton.tiles import apply_options
from g2rl_kernels.records import Head

_BLOCK_V = 512
_TOKENS = 4
_SEGMENT = 512


@triton.jit(do_not_specialize=["first", "last"])
def _kept_kernel(
    kept,
    targets,
    cu_seqlens,
    terms,
    R,
    carry_from,
    carry_to,
    first,
    last,
    V,
    tiles,
    stride_kept,
    stride_terms,
    inner_scale,
    scale,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TOKENS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    b = tl.program_id(0) // tiles
    v = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    begin = tl.load(cu_seqlens + b).to(tl.int32)
    finish = tl.load(cu_seqlens + b + 1).to(tl.int32)
    start = tl.maximum(begin, first)
    end = tl.minimum(finish, last)
    if start >= end:
        return
    at = R + b.to(tl.int64) * V + v
    r = tl.load(carry_from + v, mask=v < tl.where((start - begin) % SEGMENT == 0, 0, V), other=0.0)
    total = tl.load(at, mask=v < V, other=0.0)
    for n0 in range(start - (start - begin) % TOKENS, end, TOKENS):
        if (n0 >= start) & ((n0 - begin) % SEGMENT == 0):
            total += r
            r = tl.zeros_like(r)
        # Loads of several tokens are under way at once; they are added one by one.
        for i in tl.static_range(TOKENS):
            n = n0 + i
            inside = (n >= start) & (n < end)
            # Rows of `kept` and columns of `terms` count from the chunk's first token.
            t = n - first
            z = tl.load(kept + tl.cast(t, tl.int64) * stride_kept + v, mask=v < tl.where(inside, V, 0), other=0.0)
            y = tl.load(targets + n, mask=inside, other=-1).to(tl.int32)
            m = tl.load(terms + t, mask=inside, other=0.0)
            a = tl.load(terms + stride_terms + t, mask=inside, other=0.0)
            of_target = tl.load(terms + 2 * stride_terms + t, mask=inside, other=0.0)
            u, slope = apply_options(z, inner_scale, scale, SOFTCAP)
            # Before the first token and behind the last this adds 0.
            r += tl.where(v == y, of_target, -(tl.exp(u - m) * slope * a))
    if (end == finish) | ((end - begin) % SEGMENT == 0):
        tl.store(at, total + r, mask=v < V)
    else:
        tl.store(at, total, mask=v < V)
        tl.store(carry_to + v, r, mask=v < V)


def add_kept(
    kept: Tensor,
    head: Head,
    targets: Tensor,
    cu_seqlens: Tensor,
    terms: Tensor,
    R: Tensor,
    carry: tuple[Tensor, Tensor],
    chunk: range,
) -> None:
    """Add a chunk of n tokens, with raw logits `kept` [n, V] and `terms` [4, n], to R [B, V]; see `plans.Kernels`."""
    B, V = R.shape
    tiles = triton.cdiv(V, _BLOCK_V)
    _kept_kernel[(B * tiles,)](
        kept,
        targets,
        cu_seqlens,
        terms,
        R,
        *carry,
        chunk.start,
        chunk.stop,
        V,
        tiles,
        kept.stride(0),
        terms.stride(0),
        head.inner_scale,
        head.scale,
        SOFTCAP=head.softcap > 0,
        BLOCK_V=_BLOCK_V,
        TOKENS=_TOKENS,
        SEGMENT=_SEGMENT,
        **configs.warps(4),
    )
