"""Group mathematics on all groups at once, padded to the largest: [G, m_max, ...].

Computed in float64: a few thousand numbers cost nothing, and 1 - S^2 of near-equal directions would lose half of fp32's
digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from g2rl_kernels.group_layout import GroupLayout, largest_group
from g2rl_kernels.products import where_float64_is
from g2rl_kernels.records import GroupAdvantages, Shaping


@where_float64_is
def group_similarity(features: Tensor, cu_groups: Tensor, m_max: int) -> Tensor:
    layout = GroupLayout(cu_groups, features.shape[0], m_max)
    return _similarity(features.double(), layout).to(features.dtype)


def _similarity(phi: Tensor, layout: GroupLayout) -> Tensor:
    norm = phi.norm(dim=1, keepdim=True)
    directions = layout.spread(torch.where(norm > 0, phi / norm, 0))
    return directions @ directions.mT


@where_float64_is
def exploration_scores(similarity: Tensor, rewards: Tensor, cu_groups: Tensor, valid: Tensor | None) -> Tensor:
    layout = GroupLayout(cu_groups, rewards.shape[0], similarity.shape[1])
    diagonal = similarity.diagonal(dim1=1, dim2=2) > 0
    usable = layout.member & (diagonal if valid is None else layout.spread(valid))
    return layout.gather(_scores(similarity.double(), layout.spread(rewards.double()), usable)).to(rewards.dtype)


def _scores(S: Tensor, r: Tensor, usable: Tensor) -> Tensor:
    """nu [G, m_max]; 0 where not usable or without a usable peer."""
    peers = usable[:, :, None] & usable[:, None, :] & ~torch.eye(S.shape[1], dtype=torch.bool, device=S.device)
    exponents = torch.where(peers, r[:, None, :], -torch.inf)
    has_peers = peers.any(2)
    # Rows without peers are all -inf; their maximum is replaced so that no inf - inf arises.
    largest = exponents.amax(2, keepdim=True) if S.shape[1] else exponents.sum(2, keepdim=True)
    w = (exponents - torch.where(has_peers[:, :, None], largest, 0)).exp()
    similar = (w * S.square()).sum(2) / torch.where(has_peers, w.sum(2), 1)
    return torch.where(has_peers, (1 - similar).clamp(min=0).sqrt(), 0)


@where_float64_is
def shape_rewards(rewards: Tensor, scores: Tensor, cu_groups: Tensor, valid: Tensor | None, shaping: Shaping) -> Tensor:
    layout = GroupLayout(cu_groups, rewards.shape[0], largest_group(cu_groups))
    usable = layout.member if valid is None else layout.spread(valid)
    r, nu = layout.spread(rewards.double()), layout.spread(scores.double())
    return layout.gather(_shape(r, nu, usable, shaping)).to(rewards.dtype)


def _shape(r: Tensor, nu: Tensor, usable: Tensor, shaping: Shaping) -> Tensor:
    if r.shape[1] == 0:
        return r
    low, high = _range(nu, usable)
    span = high - low
    changes = usable & (span >= shaping.min_range) & (span > 0)
    if shaping.uniform_groups == "drop":
        lowest, highest = _range(r, usable)
        changes &= lowest < highest
    nubar = (nu - low) / torch.where(span > 0, span, 1)
    if shaping.rule == "scale":
        factor = 1 + shaping.strength * nubar
    elif shaping.rule == "centered":
        factor = 1 + shaping.strength * (2 * nubar - 1)
    else:
        factor = 1 + shaping.strength * r * nubar
    bound = r.abs().clamp(min=shaping.clip)
    return torch.where(changes, (r * factor).clamp(-bound, bound), r)


def _range(values: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest usable value of each group [G, 1]; equal where nothing is usable."""
    low = torch.where(usable, values, torch.inf).amin(1, keepdim=True)
    high = torch.where(usable, values, -torch.inf).amax(1, keepdim=True)
    any_usable = usable.any(1, keepdim=True)
    return torch.where(any_usable, low, 0), torch.where(any_usable, high, 0)


@where_float64_is
def group_advantages(rewards: Tensor, cu_groups: Tensor, normalize: str) -> Tensor:
    layout = GroupLayout(cu_groups, rewards.shape[0], largest_group(cu_groups))
    return layout.gather(_advantages(layout.spread(rewards.double()), layout.member, normalize)).to(rewards.dtype)


def _advantages(r: Tensor, member: Tensor, normalize: str) -> Tensor:
    if r.shape[1] == 0:
        return r
    # Relative to the first response, equal rewards centre to exactly 0 whatever their value.
    relative = torch.where(member, r - r[:, :1], 0)
    sizes = member.sum(1, keepdim=True).clamp(min=1)
    centered = torch.where(member, relative - relative.sum(1, keepdim=True) / sizes, 0)
    if normalize == "std":
        centered = centered / (centered.square().sum(1, keepdim=True) / sizes + 1e-6).sqrt()
    return centered


@where_float64_is
def g2rl_advantages(
    features: Tensor,
    rewards: Tensor,
    cu_groups: Tensor,
    m_max: int,
    valid: Tensor | None,
    shaping: Shaping,
    normalize: str,
) -> GroupAdvantages:
    layout = GroupLayout(cu_groups, rewards.shape[0], m_max)
    phi = features.double()
    S = _similarity(phi, layout)
    nonzero = (features != 0).any(1)
    usable = layout.spread(nonzero if valid is None else nonzero & valid)
    r = layout.spread(rewards.double())
    nu = _scores(S, r, usable)
    shaped = _shape(r, nu, usable, shaping)
    A = _advantages(shaped, layout.member, normalize)
    A, shaped, nu = (layout.gather(x).to(features.dtype) for x in (A, shaped, nu))
    return GroupAdvantages(A, shaped, nu, S.to(features.dtype))
