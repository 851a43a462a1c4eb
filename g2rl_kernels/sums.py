"""From sums over the vocabulary without the target to a token's results: MATH.md, section 4.

Of each token, with a reference m: e_v = exp(u_v - m), S_rest = sum_{v != y} e_v, X_rest = sum_{v != y} e_v (u_v - m),
x_y = u_y - m.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from g2rl_kernels.products import wide
from g2rl_kernels.records import Head, TokenLogprobs


def logprobs_of_sums(x_y: Tensor, e_y: Tensor, S_rest: Tensor, X_rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p, entropy and log S [N].

    The entropy, too, leaves the target out of its sums: the gradient of a confident token needs log p_y + H, both
    small, to the last digit.
    """
    S = S_rest + e_y
    confident = e_y > S_rest
    logps = -torch.log1p(S_rest / e_y)
    log_S = torch.where(confident, x_y - logps, S.log())
    logps = torch.where(confident, logps, x_y - log_S)
    return logps, (S_rest * log_S - X_rest - e_y * logps) / S, log_S


class Joined(NamedTuple):
    """Tokens' results, and what their residuals need, [N] each, in float64.

    Attributes:
        results: not rounded.
        rest_share: 1 - p_y.
    """

    results: TokenLogprobs
    rest_share: Tensor


def moved_to(m: Tensor, m_of: Tensor, S_of: Tensor, X_of: Tensor, log_unit: float = 1.0) -> tuple[Tensor, Tensor]:
    """S_rest and X_rest [N] by the reference m [N], from those of parts [parts, N], each by a reference of its own.

    Args:
        log_unit: of references and X, in natural logarithms.
    """
    moved = m_of - m
    factor = torch.exp(moved * log_unit)
    return (S_of * factor).sum(0), ((X_of + S_of * moved) * factor).sum(0)


def join_parts(sums: Tensor, head: Head) -> Joined:
    """From the sums [4, parts, N] of all parts of the vocabulary: each part's m, S_rest, X_rest, and raw z_y or 0."""
    m_of, S_of, X_of, z_of = wide(sums)
    z_y = z_of.sum(0)
    u_y = head.scale * (torch.tanh(head.inner_scale * z_y) if head.softcap > 0 else z_y)
    m = torch.maximum(m_of.amax(0), u_y)
    S_rest, X_rest = moved_to(m, m_of, S_of, X_of)
    x_y = u_y - m
    e_y = x_y.exp()
    logps, entropy, log_S = logprobs_of_sums(x_y, e_y, S_rest, X_rest)
    return Joined(TokenLogprobs(logps, entropy, m + log_S), S_rest / (S_rest + e_y))
