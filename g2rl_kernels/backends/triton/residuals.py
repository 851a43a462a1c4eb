"""Pass 2: residuals of each response's tokens summed in vocabulary space, from recomputed logits.

    R[b, v] = sum_{t in b} a_t slope_tv ([v = y_t] S_rest_t / S_t  -  [v != y_t] exp(u_tv - m_t) / S_t)     [B, V]

One program owns (response, vocabulary tile), loops over the response's tokens in blocks counted from its first one, and
writes its part of R once: no atomics, and nothing depends on other responses. Vocabulary lies along the rows of a tile,
so that a sum over tokens stays inside a thread but for its last two steps.

With a given lse in place of m, sums that pass 1 would find come out of the same product (STATISTICS): S and X of each
(vocabulary tile, token) in `partials` [4, tiles, N], as `merge` takes them. S_t is not known then, so it is taken as 1
and targets are left out; `targets.add_targets` adds them, and ONLY_FLAGGED recomputes responses where lse was too far
off.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from g2rl_kernels.backends.triton import configs
from g2rl_kernels.backends.triton.configs import Tile
from g2rl_kernels.backends.triton.inputs import bias_or_weight, constants, operands
from g2rl_kernels.backends.triton.tiles import LOWEST, apply_options, dot_rows, grouped, load_rows
from g2rl_kernels.records import Head


@triton.jit(do_not_specialize=["B", "N"])
def _residuals_kernel(
    hidden,
    weight,
    bias,
    targets,
    cu_seqlens,
    shift,
    others,
    target_terms,
    flagged,
    R,
    partials,
    B,
    N,
    V,
    D,
    stride_h,
    stride_w,
    inner_scale,
    scale,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    ONLY_FLAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
    USE_TMA: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(V, BLOCK_V)
    if ONLY_FLAGGED:
        # `flagged` holds how many responses, and then which: each program takes its tile of all of them.
        tile, first, last = tl.program_id(0), 0, tl.load(flagged)
    else:
        first, tile = grouped(tl.program_id(0), B, tiles, GROUP)
        last = first + 1
    v0 = tile * BLOCK_V
    v = v0 + tl.arange(0, BLOCK_V)
    if HAS_BIAS:
        offset = tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[:, None]

    for i in range(first, last):
        b = i
        if ONLY_FLAGGED:
            b = tl.load(flagged + 1 + i)
        start = tl.load(cu_seqlens + b).to(tl.int32)
        end = tl.load(cu_seqlens + b + 1).to(tl.int32)
        # One fp32 sum of tens of thousands of tokens would lose digits, of which `add_targets` cancels the first.
        r = tl.zeros((BLOCK_V,), tl.float64)
        for n0 in range(start, end, BLOCK_N):
            z = tl.zeros((BLOCK_V, BLOCK_N), tl.float32)
            for k in range(0, D, BLOCK_D):
                w = load_rows(weight, v0, V, k, D, stride_w, USE_TMA, BLOCK_V, BLOCK_D)
                h = load_rows(hidden, n0, end, k, D, stride_h, USE_TMA, BLOCK_N, BLOCK_D)
                z = dot_rows(w, h, z, UPCAST)
            n = n0 + tl.arange(0, BLOCK_N)
            inside = n < end
            if USE_TMA:
                # The next response's rows were loaded too: a NaN of theirs times a weight of 0 would be one here.
                if n0 + BLOCK_N > end:
                    z = tl.where(inside[None, :], z, 0.0)
            if HAS_BIAS:
                z += offset
            y = tl.load(targets + n, mask=inside, other=-1).to(tl.int32)
            # Beyond the response every exponential is 0.
            m = tl.load(shift + n, mask=inside, other=-LOWEST).to(tl.float32)
            a = tl.load(others + n, mask=inside, other=0.0).to(tl.float32)
            u, slope = apply_options(z, inner_scale, scale, SOFTCAP)
            x = u - m[None, :]
            is_target = v[:, None] == y[None, :]
            if STATISTICS:
                e = tl.where(is_target | (v >= V)[:, None], 0.0, tl.exp(x))
                row = tile.to(tl.int64)
                z_y = tl.sum(tl.where(is_target, z, 0.0), 0)
                tl.store(partials + (row + tiles) * N + n, tl.sum(e, 0), mask=inside)
                tl.store(partials + (row + 2 * tiles) * N + n, tl.sum(x * e, 0), mask=inside)
                tl.store(partials + (row + 3 * tiles) * N + n, z_y, mask=inside)
                r -= tl.sum(e * slope * a[None, :], 1)
            else:
                of_target = tl.load(target_terms + n, mask=inside, other=0.0)
                r += tl.sum(tl.where(is_target, of_target[None, :], -(tl.exp(x) * slope * a[None, :])), 1)
        tl.store(R + tl.cast(b, tl.int64) * V + v, r.to(tl.float32), mask=v < V)


def _tile(hidden: Tensor, head: Head, statistics: bool) -> Tile:
    work = "softcap" if head.softcap > 0 else "statistics" if statistics else ""
    return configs.tile("residuals", hidden, head.weight, work)


def residuals(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    cu_seqlens: Tensor,
    terms: Tensor,
    R: Tensor,
    flagged: Tensor | None = None,
) -> None:
    """Write R [B, V] of responses cu_seqlens [B + 1] from terms [4, N]; with flagged [1 + B], of those named there."""
    _launch(hidden, head, targets, cu_seqlens, terms[0], terms[1], terms[2], R, flagged=flagged)


def residuals_and_statistics(
    hidden: Tensor, head: Head, targets: Tensor, cu_seqlens: Tensor, a: Tensor, lse: Tensor, R: Tensor
) -> Tensor:
    """Write R [B, V] without targets, taking lse [N] for exact; returns partials [4, tiles, N], all set but m."""
    tiles = triton.cdiv(head.V, _tile(hidden, head, True).BLOCK_V)
    partials = torch.empty(4, tiles, hidden.shape[0], dtype=torch.float32, device=hidden.device)
    _launch(hidden, head, targets, cu_seqlens, lse, a, a, R, partials=partials)
    return partials


def statistics_bytes(hidden: Tensor, head: Head) -> int:
    """Of `partials`, for one token."""
    return 4 * 4 * triton.cdiv(head.V, _tile(hidden, head, True).BLOCK_V)


def _launch(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    cu_seqlens: Tensor,
    shift: Tensor,
    others: Tensor,
    target_terms: Tensor,
    R: Tensor,
    flagged: Tensor | None = None,
    partials: Tensor | None = None,
) -> None:
    B = R.shape[0]
    N, D = hidden.shape
    tile = _tile(hidden, head, partials is not None)
    h, w = operands(hidden, head.weight, tile)
    _residuals_kernel[((B if flagged is None else 1) * triton.cdiv(head.V, tile.BLOCK_V),)](
        h,
        w,
        bias_or_weight(head),
        targets,
        cu_seqlens,
        shift,
        others,
        target_terms,
        cu_seqlens if flagged is None else flagged,
        R,
        R if partials is None else partials,
        B,
        N,
        head.V,
        D,
        hidden.stride(0),
        head.weight.stride(0),
        head.inner_scale,
        head.scale,
        STATISTICS=partials is not None,
        ONLY_FLAGGED=flagged is not None,
        GROUP=configs.GROUP,
        **constants(head),
        **tile.kwargs(),
    )
