"""What features need to know of each response: what divides its residuals, and whether a given lse was too far off.

    inverse[b] = 1 / sum_{t in b} a_t                                             0 without weight

A given lse stands for log of the sum that it makes, S_t, which is then 1 up to rounding. Residuals that were summed
with it have S_t as a factor. What a response's tokens have in common of it is divided out; the others' deviation is an
error of Phi, and where it is more than rounding the response is flagged, to be computed anew:

    inverse[b] = 1 / sum_{t in b} a_t S_t,    flagged if any a_t > 0 has |S_t - S_b| > tolerance_t, or |S_b - 1| > 1/2,
    S_b = sum a_t S_t / sum a_t               which leaves a small S_b no digits, as S_b - 1 is what is summed
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from g2rl_kernels.backends.triton import configs

# Of S_t, relative: its summation moves it by 1e-6 at most.
_TOLERANCE = tl.constexpr(3e-6)
# lse is a fp32 number, off by half a unit in the last place; fp32 has 23 bits after the leading one.
_EXPONENT = tl.constexpr(0x7F800000)
_HALF_UNIT = tl.constexpr(2.0**-24)
_FARTHEST = tl.constexpr(0.5)
_BLOCK_N = 256
_BLOCK_B = 1024


@triton.jit
def _responses_kernel(cu_seqlens, token_weights, S, lse, inverse, flags, GIVEN: tl.constexpr, BLOCK_N: tl.constexpr):
    b = tl.program_id(0)
    start = tl.load(cu_seqlens + b).to(tl.int32)
    end = tl.load(cu_seqlens + b + 1).to(tl.int32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    for n0 in range(start, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        a = tl.load(token_weights + n, mask=n < end, other=0.0).to(tl.float32)
        total += a
        if GIVEN:
            # Relative to 1, which keeps digits that a sum of S would round away.
            weighted += a * (tl.load(S + n, mask=n < end, other=1.0) - 1.0)
    a_sum = tl.sum(total, 0)
    of_one = tl.where(a_sum > 0, 1.0 / tl.where(a_sum > 0, a_sum, 1.0), 0.0)
    if GIVEN:
        mean = tl.sum(weighted, 0) * of_one
        flagged = tl.zeros((BLOCK_N,), tl.int32)
        for n0 in range(start, end, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            a = tl.load(token_weights + n, mask=n < end, other=0.0).to(tl.float32)
            deviation = tl.abs((tl.load(S + n, mask=n < end, other=1.0) - 1.0) - mean)
            # The largest power of two that is not above |lse|.
            given = tl.load(lse + n, mask=n < end, other=0.0)
            binade = (given.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)
            near = deviation <= binade * _HALF_UNIT + _TOLERANCE
            # A NaN is not near.
            flagged = tl.maximum(flagged, ((a > 0) & (near == 0)).to(tl.int32))
        flag = tl.where(tl.abs(mean) <= _FARTHEST, tl.max(flagged, 0), 1)
        tl.store(flags + b, flag)
        of_one = tl.where(flag == 0, of_one / (1.0 + mean), of_one)
    tl.store(inverse + b, of_one)


@triton.jit
def _flagged_kernel(flags, flagged, B, BLOCK_B: tl.constexpr):
    """How many flags are set, and then which: in one program, as a few thousand flags take no longer."""
    count = tl.full((), 0, tl.int32)
    for b0 in range(0, B, BLOCK_B):
        b = b0 + tl.arange(0, BLOCK_B)
        flag = tl.load(flags + b, mask=b < B, other=0)
        tl.store(flagged + count + tl.cumsum(flag, 0), b, mask=flag != 0)
        count += tl.sum(flag, 0)
    tl.store(flagged, count)


def inverse_weights(cu_seqlens: Tensor, a: Tensor) -> Tensor:
    """1 / sum a [B] fp32, from a [N]."""
    B = cu_seqlens.shape[0] - 1
    inverse = torch.empty(B, dtype=torch.float32, device=a.device)
    if B:
        _responses_kernel[(B,)](cu_seqlens, a, a, a, inverse, a, GIVEN=False, BLOCK_N=_BLOCK_N, **configs.warps(4))
    return inverse


def inverse_and_flags(cu_seqlens: Tensor, a: Tensor, S: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """inverse [B] fp32, flags [B] int32 and flagged [1 + B] int32 (how many, then which) from a, S and lse [N]."""
    B = cu_seqlens.shape[0] - 1
    inverse = torch.empty(B, dtype=torch.float32, device=S.device)
    flags = torch.empty(B, dtype=torch.int32, device=S.device)
    flagged = torch.empty(1 + B, dtype=torch.int32, device=S.device)
    if B:
        _responses_kernel[(B,)](cu_seqlens, a, S, lse, inverse, flags, GIVEN=True, BLOCK_N=_BLOCK_N, **configs.warps(4))
    _flagged_kernel[(1,)](flags, flagged, B, BLOCK_B=_BLOCK_B, **configs.warps(4))
    return inverse, flags, flagged
