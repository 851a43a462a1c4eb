"""Pass 1: for each token, sums over the vocabulary that leave the target out, in splits of the vocabulary.

With u_v the token's logit divided by T, y its target, and sums over v != y of one split:

    m = max u_v,   S = sum exp(u_v - m),   X = sum exp(u_v - m) (u_v - m),   z_y (0 in splits without y)

`partials` [4, splits, N] holds m, S, X and raw z_y; `merge` joins the splits. With KEEP, raw logits z are stored as
well. Splits are fixed columns of the vocabulary, so a token's results do not depend on its batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from g2rl_kernels.backends.triton import configs
from g2rl_kernels.backends.triton.configs import Tile
from g2rl_kernels.backends.triton.inputs import bias_or_weight, constants, operands
from g2rl_kernels.backends.triton.tiles import LOWEST, NO_WORDS, apply_options, dot_rows, grouped, load_rows, rounded_up
from g2rl_kernels.records import Head


@triton.jit(do_not_specialize=["N"])
def _statistics_kernel(
    hidden,
    weight,
    bias,
    targets,
    partials,
    kept,
    N,
    V,
    D,
    stride_h,
    stride_w,
    stride_kept,
    inner_scale,
    scale,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
    UPCAST: tl.constexpr,
    USE_TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    splits = tl.cdiv(V, SPLIT)
    block, split = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), splits, GROUP)
    n0 = block * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_V)
    n = n0 + rows
    y = tl.load(targets + n, mask=n < N, other=-1).to(tl.int32)

    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    S = tl.zeros((BLOCK_N,), tl.float32)
    X = tl.zeros((BLOCK_N,), tl.float32)
    z_y = tl.zeros((BLOCK_N,), tl.float32)
    for v0 in range(split * SPLIT, tl.minimum((split + 1) * SPLIT, V), BLOCK_V):
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in range(0, D, BLOCK_D):
            h = load_rows(hidden, n0, N, k, D, stride_h, USE_TMA, BLOCK_N, BLOCK_D)
            w = load_rows(weight, v0, V, k, D, stride_w, USE_TMA, BLOCK_V, BLOCK_D)
            z = dot_rows(h, w, z, UPCAST)
        v = v0 + columns
        if HAS_BIAS:
            z += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
        if KEEP:
            # Whole tiles: `kept` has room for them, and masks would cost registers.
            at = kept + (tl.cast(n0, tl.int64) * stride_kept + v0)
            tl.store(at + (rows[:, None] * stride_kept + columns[None, :]), z)
        is_target = v[None, :] == y[:, None]
        z_y += tl.sum(tl.where(is_target, z, 0.0), 1)
        u, _ = apply_options(z, inner_scale, scale, SOFTCAP)
        u = tl.where(is_target | (v >= V)[None, :], LOWEST, u)

        # A NaN is no maximum, but stays in S and X.
        largest = tl.maximum(m, rounded_up(tl.max(u, 1)))
        # Where all words were left out, any other shift keeps their exponentials 0.
        shift = tl.where(largest < NO_WORDS, 0.0, largest)
        x = u - shift[:, None]
        e = tl.exp(x)
        moved = m - shift
        factor = tl.exp(moved)
        # The products with `moved` come first: S and X are 0 where it is LOWEST.
        X = (X + S * moved) * factor + tl.sum(x * e, 1)
        S = S * factor + tl.sum(e, 1)
        m = largest

    row = split.to(tl.int64)
    tl.store(partials + row * N + n, m, mask=n < N)
    tl.store(partials + (row + splits) * N + n, S, mask=n < N)
    tl.store(partials + (row + 2 * splits) * N + n, X, mask=n < N)
    tl.store(partials + (row + 3 * splits) * N + n, z_y, mask=n < N)


def _tile(hidden: Tensor, head: Head, keep: bool) -> Tile:
    return configs.tile("statistics", hidden, head.weight, "softcap" if head.softcap > 0 else "kept" if keep else "")


def kept_bytes(head: Head) -> int:
    return 4 * head.V


def room_for_kept(hidden: Tensor, head: Head, rows: int) -> Tensor:
    """[rows, V] rounded up to whole tiles, fp32."""
    tile = _tile(hidden, head, True)
    shape = (triton.cdiv(rows, tile.BLOCK_N) * tile.BLOCK_N, triton.cdiv(head.V, tile.BLOCK_V) * tile.BLOCK_V)
    return torch.empty(shape, dtype=torch.float32, device=hidden.device)


def statistics(hidden: Tensor, head: Head, targets: Tensor, kept: Tensor | None = None) -> Tensor:
    """partials [4, splits, N] of tokens hidden [N, d]; `kept` from `room_for_kept` receives raw logits."""
    N, D = hidden.shape
    V = head.V
    tile = _tile(hidden, head, kept is not None)
    split = configs.statistics_split(hidden)
    partials = torch.empty(4, triton.cdiv(V, split), N, dtype=torch.float32, device=hidden.device)
    h, w = operands(hidden, head.weight, tile)
    _statistics_kernel[(triton.cdiv(N, tile.BLOCK_N) * partials.shape[1],)](
        h,
        w,
        bias_or_weight(head),
        targets,
        partials,
        partials if kept is None else kept,
        N,
        V,
        D,
        hidden.stride(0),
        head.weight.stride(0),
        0 if kept is None else kept.stride(0),
        head.inner_scale,
        head.scale,
        KEEP=kept is not None,
        SPLIT=split,
        GROUP=configs.GROUP,
        **constants(head),
        **tile.kwargs(),
    )
    return partials


def statistics_bytes(hidden: Tensor, head: Head) -> int:
    """Of `partials`, for one token."""
    return 4 * 4 * triton.cdiv(head.V, configs.statistics_split(hidden))
