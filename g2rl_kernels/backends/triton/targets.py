"""Targets' residuals, for R that was summed without them because S_t was not known yet.

    R[b, v] += sum_{t in b, y_t = v} a_t slope_ty S_rest_t

Not divided by S_t, as the others' residuals are not: a token's residuals must add up to 0, or what all rows of W have
in common stays behind, which can be far longer than Phi.

One program owns (response, vocabulary tile) and compares the tile with all of the response's targets: N V comparisons,
a hundredth of the time of one product, and the same order of sums each time, which a scatter could not promise.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from g2rl_kernels.backends.triton import configs

_BLOCK_N = 32
_BLOCK_V = 512


@triton.jit
def _targets_kernel(
    targets, cu_seqlens, target_terms, S, flags, R, V, tiles, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr
):
    b = tl.program_id(0) // tiles
    v = tl.program_id(0) % tiles * BLOCK_V + tl.arange(0, BLOCK_V)
    # A flagged response was recomputed, with its targets.
    if tl.load(flags + b) != 0:
        return
    start = tl.load(cu_seqlens + b).to(tl.int32)
    end = tl.load(cu_seqlens + b + 1).to(tl.int32)
    at = R + b.to(tl.int64) * V + v
    r = tl.load(at, mask=v < V, other=0.0).to(tl.float64)
    for n0 in range(start, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        y = tl.load(targets + n, mask=n < end, other=-1).to(tl.int32)
        term = tl.load(target_terms + n, mask=n < end, other=0.0) * tl.load(S + n, mask=n < end, other=0.0)
        r += tl.sum(tl.where(v[None, :] == y[:, None], term[:, None], 0.0), 0)
    tl.store(at, r.to(tl.float32), mask=v < V)


def add_targets(targets: Tensor, cu_seqlens: Tensor, terms: Tensor, flags: Tensor, R: Tensor) -> None:
    """Add to R [B, V] in place, from terms [4, N], where flags [B] are 0."""
    B, V = R.shape
    tiles = triton.cdiv(V, _BLOCK_V)
    _targets_kernel[(B * tiles,)](
        targets,
        cu_seqlens,
        terms[2],
        terms[3],
        flags,
        R,
        V,
        tiles,
        BLOCK_N=_BLOCK_N,
        BLOCK_V=_BLOCK_V,
        **configs.warps(4),
    )
