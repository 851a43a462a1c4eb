"""Features from residuals: one product of B rows, exact to fp32.

    Phi[b] = logit_scale * (R[b] / sum a) @ W          [B, V] x [V, d] -> [B, d]

R stays fp32. For bf16 weights its entries are split into three bf16 terms of 8 bits each, for fp16 into two terms of 11
bits, scaled into fp16's range: R[b] / sum a lies in [-1, 1], its entries around 1 / V. Each step's product is added to
the sums by an fp32 addition: units for 16-bit products truncate what they accumulate, which over V terms would show.
The vocabulary is split in fixed parts, joined by a second kernel in fixed order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from g2rl_kernels.backends.triton import configs
from g2rl_kernels.backends.triton.inputs import upcast
from g2rl_kernels.backends.triton.tiles import grouped
from g2rl_kernels.records import Head

# R / sum a times 2^15 fills fp16's range up to 65504; the second term is 2^11 times smaller.
_FP16_RANGE = tl.constexpr(2.0**15)
_FP16_DIGITS = tl.constexpr(2.0**11)
_JOIN_BLOCK = 1024


@triton.jit
def _split_product(x, w, UPCAST: tl.constexpr):
    """x @ w in fp32 for fp32 x [BLOCK_N, BLOCK_V] and w [BLOCK_V, BLOCK_D] of the model's dtype."""
    if UPCAST:
        return tl.dot(x, w.to(tl.float32), input_precision="ieee")
    elif w.dtype == tl.bfloat16:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(high, w, tl.dot(middle, w, tl.dot(low, w)))
    elif w.dtype == tl.float16:
        x = x * _FP16_RANGE
        high = x.to(tl.float16)
        low = ((x - high.to(tl.float32)) * _FP16_DIGITS).to(tl.float16)
        return (tl.dot(high, w) + tl.dot(low, w) * (1.0 / _FP16_DIGITS)) * (1.0 / _FP16_RANGE)
    else:
        return tl.dot(x, w, input_precision="ieee")


@triton.jit(do_not_specialize=["B"])
def _projection_kernel(
    R,
    inverse,
    weight,
    partials,
    B,
    V,
    D,
    stride_w,
    UPCAST: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_N counts responses here."""
    d_tiles = tl.cdiv(D, BLOCK_D)
    b_tiles = tl.cdiv(B, BLOCK_N)
    split = tl.program_id(0) // (d_tiles * b_tiles)
    b_tile, d_tile = grouped(tl.program_id(0) % (d_tiles * b_tiles), b_tiles, d_tiles, GROUP)
    b = b_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    d = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    factor = tl.load(inverse + b, mask=b < B, other=0.0)
    rows = R + b.to(tl.int64)[:, None] * V

    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for v0 in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, V), BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        x = tl.load(rows + v[None, :], mask=(b < B)[:, None] & (v < V)[None, :], other=0.0) * factor[:, None]
        at = weight + v.to(tl.int64)[:, None] * stride_w + d[None, :]
        w = tl.load(at, mask=(v < V)[:, None] & (d < D)[None, :], other=0.0)
        total += _split_product(x, w, UPCAST)
    at = partials + (split.to(tl.int64) * B + b)[:, None] * D + d[None, :]
    tl.store(at, total, mask=(b < B)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["elements"])
def _join_kernel(partials, features, elements, splits, logit_scale, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(0, splits):
        total += tl.load(partials + (i + tl.full((), s, tl.int64) * elements), mask=i < elements, other=0.0)
    tl.store(features + i, total * logit_scale, mask=i < elements)


def projection_bytes(head: Head, responses: int) -> int:
    """Of the memory that `project` takes for so many responses."""
    return 4 * _splits(head) * responses * head.weight.shape[1]


def _splits(head: Head) -> int:
    return triton.cdiv(head.V, configs.projection_split(head.weight))


def project(R: Tensor, inverse: Tensor, head: Head, features: Tensor) -> None:
    """Write features [B, d] (contiguous) from R [B, V] and inverse [B] = 1 / sum a."""
    B, V = R.shape
    D = features.shape[1]
    tile = configs.tile("projection", head.weight, head.weight)
    splits = _splits(head)
    partials = torch.empty(splits, B, D, dtype=torch.float32, device=R.device)
    _projection_kernel[(splits * triton.cdiv(B, tile.BLOCK_N) * triton.cdiv(D, tile.BLOCK_D),)](
        R,
        inverse,
        head.weight,
        partials,
        B,
        V,
        D,
        head.weight.stride(0),
        UPCAST=upcast(head),
        SPLIT=configs.projection_split(head.weight),
        GROUP=configs.GROUP,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_V=tile.BLOCK_V,
        BLOCK_D=tile.BLOCK_D,
        num_stages=tile.num_stages,
        **configs.warps(tile.num_warps),
    )
    _join_kernel[(triton.cdiv(B * D, _JOIN_BLOCK),)](
        partials, features, B * D, splits, head.logit_scale, BLOCK=_JOIN_BLOCK, **configs.warps(4)
    )
