"""The whole group mathematics in one launch: one program for each group of m responses.

    S_ij = <Phi_i, Phi_j> / (|Phi_i| |Phi_j|)                              [m, m]
    nu_i = sqrt(max(1 - sum_j w_ij S_ij^2, 0)),  w_ij = exp(r_j) / sum_{k != i} exp(r_k), j and k usable peers of i
    r~_i = clip(r_i * factor(nubar_i), -c_i, c_i),   c_i = max(c, |r_i|),   nubar = (nu - min nu) / (max nu - min nu)
    A_i  = (r~_i - mean r~) / sqrt(var r~ + 1e-6)

A response is usable if it is marked valid and Phi is not 0. Everything is float64: 1 - S^2 of near-equal directions
would lose half of fp32's digits, and the sums are short. Rows of S are made BLOCK_ROWS at a time, so that m = 128 fits
registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from g2rl_kernels.backends.triton import configs
from g2rl_kernels.plans.inputs import on_device_of, unit_stride
from g2rl_kernels.records import RULES, GroupAdvantages, Shaping

_CENTERED = tl.constexpr(RULES.index("centered"))
_LITERAL = tl.constexpr(RULES.index("literal"))
# tl.dot takes no fewer rows.
_LEAST = 16
_BLOCK_D = 32


@triton.jit
def _group_kernel(
    features,
    rewards,
    cu_groups,
    valid,
    advantages,
    shaped_rewards,
    scores,
    similarity,
    D,
    m_max,
    stride_f,
    strength,
    clip,
    min_range,
    HAS_VALID: tl.constexpr,
    RULE: tl.constexpr,
    DROP_UNIFORM: tl.constexpr,
    DIVIDE_BY_STD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    g = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_groups + g).to(tl.int64)
    size = (tl.load(cu_groups + g + 1).to(tl.int64) - start).to(tl.int32)
    j = tl.arange(0, BLOCK_M)
    member = j < size
    columns = tl.arange(0, BLOCK_D)
    phi_j = features + (start + j)[:, None] * stride_f
    r = tl.load(rewards + start + j, mask=member, other=0.0).to(tl.float64)

    squares = tl.zeros((BLOCK_M,), tl.float64)
    for k in range(0, D, BLOCK_D):
        mask = member[:, None] & (k + columns < D)[None, :]
        x = tl.load(phi_j + (k + columns)[None, :], mask=mask, other=0.0).to(tl.float64)
        squares += tl.sum(x * x, 1)
    usable = squares > 0
    # Products of numbers of any size that fp32 holds stay within float64.
    inverse_j = tl.where(usable, 1.0 / tl.sqrt(tl.where(usable, squares, 1.0)), 0.0)
    if HAS_VALID:
        usable = usable & (tl.load(valid + start + j, mask=member, other=0) != 0)
    usable_count = tl.sum(usable.to(tl.int32), 0)

    nu = tl.zeros((BLOCK_M,), tl.float64)
    for first in range(0, m_max, BLOCK_ROWS):
        i = first + tl.arange(0, BLOCK_ROWS)
        phi_i = features + (start + i)[:, None] * stride_f
        S = tl.zeros((BLOCK_ROWS, BLOCK_M), tl.float64)
        for k in range(0, D, BLOCK_D):
            inside = (k + columns < D)[None, :]
            x = tl.load(phi_i + (k + columns)[None, :], mask=(i < size)[:, None] & inside, other=0.0)
            y = tl.load(phi_j + (k + columns)[None, :], mask=member[:, None] & inside, other=0.0)
            S = tl.dot(x.to(tl.float64), tl.trans(y.to(tl.float64)), S, out_dtype=tl.float64)
        same = i[:, None] == j[None, :]
        # Values of responses i, picked from those of all j.
        inverse_i = tl.sum(tl.where(same, inverse_j[None, :], 0.0), 1)
        S = S * inverse_i[:, None] * inverse_j[None, :]
        at = similarity + (g * m_max + i)[:, None] * m_max + j[None, :]
        tl.store(at, S.to(tl.float32), mask=(i < m_max)[:, None] & (j < m_max)[None, :])

        # exp(r_j) relative to the largest peer of i, which differs from the group's where i itself is the largest.
        peers = usable[None, :] & (same == 0)
        top = tl.max(tl.where(peers, r[None, :], float("-inf")), 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        w = tl.where(peers, tl.exp(tl.where(peers, r[None, :] - top[:, None], 0.0)), 0.0)
        total = tl.sum(w, 1)
        similar = tl.sum(w * S * S, 1) / tl.where(total > 0, total, 1.0)
        nu_i = tl.where(total > 0, tl.sqrt(tl.maximum(1.0 - similar, 0.0)), 0.0)
        nu += tl.sum(tl.where(same, nu_i[:, None], 0.0), 0)
    nu = tl.where(usable & (usable_count > 1), nu, 0.0)

    low = tl.min(tl.where(usable, nu, float("inf")), 0)
    high = tl.max(tl.where(usable, nu, float("-inf")), 0)
    # As a block: the interpreter does not mix masks of scalars and blocks.
    span = tl.zeros((BLOCK_M,), tl.float64) + (high - low)
    changes = usable & (span >= min_range) & (span > 0)
    if DROP_UNIFORM:
        lowest = tl.min(tl.where(usable, r, float("inf")), 0)
        highest = tl.max(tl.where(usable, r, float("-inf")), 0)
        changes = changes & (span * 0.0 + (highest - lowest) > 0)
    nubar = tl.where(changes, nu - low, 0.0) / tl.where(span > 0, span, 1.0)
    if RULE == _CENTERED:
        nubar = 2.0 * nubar - 1.0
    if RULE == _LITERAL:
        nubar = nubar * r
    bound = tl.maximum(tl.abs(r), clip)
    shaped = tl.minimum(tl.maximum(r * (1.0 + nubar * strength), -bound), bound)
    shaped = tl.where(changes, shaped, r)

    # Relative to the first response, equal rewards centre to exactly 0 whatever their value.
    relative = tl.where(member, shaped - tl.sum(tl.where(j == 0, shaped, 0.0), 0), 0.0)
    count = tl.maximum(size, 1).to(tl.float64)
    A = tl.where(member, relative - tl.sum(relative, 0) / count, 0.0)
    if DIVIDE_BY_STD:
        A = A / tl.sqrt(tl.sum(A * A, 0) / count + 1e-6)
    tl.store(scores + start + j, nu.to(tl.float32), mask=member)
    tl.store(shaped_rewards + start + j, shaped.to(tl.float32), mask=member)
    tl.store(advantages + start + j, A.to(tl.float32), mask=member)


def g2rl_advantages(
    features: Tensor,
    rewards: Tensor,
    cu_groups: Tensor,
    m_max: int,
    valid: Tensor | None,
    shaping: Shaping,
    normalize: str,
) -> GroupAdvantages:
    features = unit_stride(features)
    rewards = rewards.contiguous()
    G, D = cu_groups.shape[0] - 1, features.shape[1]
    advantages, shaped_rewards, scores = (torch.empty_like(rewards) for _ in range(3))
    similarity = torch.empty(G, m_max, m_max, dtype=features.dtype, device=features.device)
    if G and m_max:
        block_m = max(_LEAST, triton.next_power_of_2(m_max))
        with on_device_of(features):
            _group_kernel[(G,)](
                features,
                rewards,
                cu_groups.contiguous(),
                features if valid is None else valid.contiguous().view(torch.uint8),
                advantages,
                shaped_rewards,
                scores,
                similarity,
                D,
                m_max,
                features.stride(0),
                shaping.strength,
                shaping.clip,
                shaping.min_range,
                HAS_VALID=valid is not None,
                RULE=RULES.index(shaping.rule),
                DROP_UNIFORM=shaping.uniform_groups == "drop",
                DIVIDE_BY_STD=normalize == "std",
                BLOCK_M=block_m,
                BLOCK_ROWS=_LEAST,
                BLOCK_D=_BLOCK_D,
                **configs.warps(4 if block_m <= 32 else 8),
            )
    return GroupAdvantages(advantages, shaped_rewards, scores, similarity)
