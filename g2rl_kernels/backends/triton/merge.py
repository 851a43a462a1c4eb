"""From a token's sums in splits of the vocabulary to its log-probability, entropy and lse, and to its part in features.

With m the largest u of a token, S_rest = sum_{v != y} e_v, X_rest = sum_{v != y} e_v (u_v - m), e_v = exp(u_v - m), and
S = S_rest + e_y:

    log p_y = -log1p(S_rest / e_y)   where e_y > S_rest, else u_y - m - log S
    H       = (S_rest log S - X_rest - e_y log p_y) / S
    lse     = m + log S

`terms` [4, N], for features: m, the shift of exponents; a / S, the weight of the others' e_v; a S_rest / S times the
slope at y, what the target's residual adds; and S, which is 1 where a given lse that served as m was exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from g2rl_kernels.backends.triton import configs
from g2rl_kernels.backends.triton.tiles import LOWEST, apply_options, log1p_of_ratio
from g2rl_kernels.records import Head

_BLOCK_N = 32
_BLOCK_SPLITS = 32
_LEAST_SUM = tl.constexpr(1e-30)
_MOST_LEFT = tl.constexpr(16.0)


@triton.jit
def _plane(plane: tl.constexpr, partials, s, splits, N, n):
    """Addresses [BLOCK_SPLITS, BLOCK_N] of plane m, S, X or z_y."""
    return partials + (s.to(tl.int64) + plane * splits)[:, None] * N + n[None, :]


# Specialised on N, the kernel would sum in another order where N is a multiple of 16: a token's bits are its own.
@triton.jit(do_not_specialize=["N"])
def _merge_kernel(
    partials,
    given_lse,
    token_weights,
    results,
    terms,
    N,
    splits,
    stride_results,
    inner_scale,
    scale,
    SOFTCAP: tl.constexpr,
    GIVEN: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N

    # All sums run over tiles [BLOCK_SPLITS, BLOCK_N] in a fixed order. Planes of partials: m, S, X, z_y.
    z_y = tl.zeros((BLOCK_N,), tl.float32)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    for s0 in range(0, splits, BLOCK_SPLITS):
        s = s0 + tl.arange(0, BLOCK_SPLITS)
        mask = (s < splits)[:, None] & inside[None, :]
        z_y += tl.sum(tl.load(_plane(3, partials, s, splits, N, n), mask=mask, other=0.0), 0)
        if not GIVEN:
            m = tl.maximum(m, tl.max(tl.load(_plane(0, partials, s, splits, N, n), mask=mask, other=LOWEST), 0))
    u_y, slope_y = apply_options(z_y, inner_scale, scale, SOFTCAP)
    if GIVEN:
        m = tl.load(given_lse + n, mask=inside, other=0.0).to(tl.float32)
    else:
        m = tl.maximum(m, u_y)

    S_rest = tl.zeros((BLOCK_N,), tl.float32)
    X_rest = tl.zeros((BLOCK_N,), tl.float32)
    for s0 in range(0, splits, BLOCK_SPLITS):
        s = s0 + tl.arange(0, BLOCK_SPLITS)
        mask = (s < splits)[:, None] & inside[None, :]
        S = tl.load(_plane(1, partials, s, splits, N, n), mask=mask, other=0.0)
        X = tl.load(_plane(2, partials, s, splits, N, n), mask=mask, other=0.0)
        if not GIVEN:
            m_s = tl.load(_plane(0, partials, s, splits, N, n), mask=mask, other=LOWEST)
            moved = m_s - m[None, :]
            factor = tl.exp(moved)
            X = (X + S * moved) * factor
            S = S * factor
        S_rest += tl.sum(S, 0)
        X_rest += tl.sum(X, 0)

    x_y = u_y - m
    if not GIVEN:
        # What the rounding of m has left of the likeliest: near 1e10 hundreds.
        left = tl.where(x_y > _MOST_LEFT, _MOST_LEFT, tl.where(x_y < -_MOST_LEFT, -_MOST_LEFT, x_y))
        x_y = tl.where(u_y == m, left, x_y)
    e_y = tl.exp(x_y)
    S = S_rest + e_y
    if not GIVEN:
        # No exponential is left where the maximum was rounded up by hundreds, beside which its logarithm is nothing.
        S = tl.where(S < _LEAST_SUM, _LEAST_SUM, S)
    confident = e_y > S_rest
    log_p = -log1p_of_ratio(S_rest / tl.where(confident, e_y, 1.0))
    log_S = tl.where(confident, x_y - log_p, tl.log(S))
    log_p = tl.where(confident, log_p, x_y - log_S)
    entropy = (S_rest * log_S - X_rest - e_y * log_p) / S
    tl.store(results + n, log_p, mask=inside)
    tl.store(results + stride_results + n, entropy, mask=inside)
    tl.store(results + 2 * stride_results + n, m + log_S, mask=inside)
    if FEATURES:
        a = tl.load(token_weights + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(terms + n, m, mask=inside)
        # A token's residuals must add up to 0: near S = 1 a quotient's rounding has one sign, and another's another.
        weight = a / S
        tl.store(terms + N + n, weight, mask=inside)
        tl.store(terms + 2 * N + n, weight * S_rest * slope_y, mask=inside)
        tl.store(terms + 3 * N + n, S, mask=inside)


def merge(partials: Tensor, head: Head, results: Tensor, a: Tensor | None = None, lse: Tensor | None = None) -> Tensor:
    """Write log p, entropy and lse to results [3, N]; with `a` [N], return terms [4, N], else [4, 0].

    `lse` is the shift that `partials` were made with, where one was given.
    """
    _, splits, N = partials.shape
    features = a is not None
    terms = torch.empty(4, N if features else 0, dtype=torch.float32, device=partials.device)
    _merge_kernel[(triton.cdiv(N, _BLOCK_N),)](
        partials,
        partials if lse is None else lse,
        partials if a is None else a,
        results,
        terms,
        N,
        splits,
        results.stride(0),
        head.inner_scale,
        head.scale,
        SOFTCAP=head.softcap > 0,
        GIVEN=lse is not None,
        FEATURES=features,
        BLOCK_N=_BLOCK_N,
        BLOCK_SPLITS=_BLOCK_SPLITS,
        **configs.warps(4),
    )
    return terms
