"""What features need to know of each response: the sum of its token weights, and whether a given lse was too far off.

inverse[b] = 1 / sum_{t in b} a_t (0 without weight),   flags[b] = max_{t in b, a_t > 0} |S_t - 1| > tolerance
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# A token whose S is off by x makes p wrong by a factor 1 + x. Summation alone moves S by 1e-6 at most; the bound is
# 1e-5.
LSE_TOLERANCE = 3e-6
_BLOCK_N = 256


@triton.jit
def _responses_kernel(cu_seqlens, token_weights, S, inverse, flags, tolerance, BLOCK_N: tl.constexpr):
    b = tl.program_id(0)
    start = tl.load(cu_seqlens + b).to(tl.int32)
    end = tl.load(cu_seqlens + b + 1).to(tl.int32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    worst = tl.zeros((BLOCK_N,), tl.float32)
    for n0 in range(start, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        a = tl.load(token_weights + n, mask=n < end, other=0.0).to(tl.float32)
        off = tl.abs(tl.load(S + n, mask=n < end, other=1.0) - 1.0)
        total += a
        worst = tl.maximum(worst, tl.where(a > 0, off, 0.0))
    a_sum = tl.sum(total, 0)
    tl.store(inverse + b, tl.where(a_sum > 0, 1.0 / tl.where(a_sum > 0, a_sum, 1.0), 0.0))
    tl.store(flags + b, (tl.max(worst, 0) > tolerance).to(tl.int32))


def inverse_and_flags(cu_seqlens: Tensor, token_weights: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """inverse [B] fp32 and flags [B] int32 from a [N] and S [N]."""
    B = cu_seqlens.shape[0] - 1
    inverse = torch.empty(B, dtype=torch.float32, device=S.device)
    flags = torch.empty(B, dtype=torch.int32, device=S.device)
    if B:
        _responses_kernel[(B,)](
            cu_seqlens, token_weights, S, inverse, flags, LSE_TOLERANCE, BLOCK_N=_BLOCK_N, num_warps=4
        )
    return inverse, flags
