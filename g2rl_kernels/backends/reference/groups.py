"""Group mathematics one response at a time in float64 (paper eq. 2, 9 to 13)."""

from __future__ import annotations

import torch
from torch import Tensor

from g2rl_kernels.records import GroupAdvantages, Shaping


def _groups(cu_groups: Tensor) -> list[range]:
    offsets = cu_groups.tolist()
    return [range(start, end) for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


def group_similarity(features: Tensor, cu_groups: Tensor, m_max: int) -> Tensor:
    phi = features.double()
    groups = _groups(cu_groups)
    S = phi.new_zeros(len(groups), m_max, m_max)
    for g, members in enumerate(groups):
        for i in members:
            for j in members:
                lengths = phi[i].norm() * phi[j].norm()
                if float(lengths) > 0:
                    S[g, i - members.start, j - members.start] = phi[i] @ phi[j] / lengths
    return S.to(features.dtype)


def exploration_scores(similarity: Tensor, rewards: Tensor, cu_groups: Tensor, valid: Tensor | None) -> Tensor:
    S, r = similarity.double(), rewards.double()
    nu = torch.zeros_like(r)
    for g, members in enumerate(_groups(cu_groups)):
        first = members.start
        usable = [j for j in members if (S[g, j - first, j - first] > 0 if valid is None else valid[j])]
        for i in usable:
            peers = [j for j in usable if j != i]
            if peers:
                w = torch.softmax(r[peers], 0)
                similar = S[g, i - first, [j - first for j in peers]]
                nu[i] = (1 - (w * similar**2).sum()).clamp(min=0).sqrt()
    return nu.to(rewards.dtype)


def shape_rewards(rewards: Tensor, scores: Tensor, cu_groups: Tensor, valid: Tensor | None, shaping: Shaping) -> Tensor:
    r, nu = rewards.double(), scores.double()
    shaped = r.clone()
    for members in _groups(cu_groups):
        usable = [i for i in members if valid is None or bool(valid[i])]
        if not usable:
            continue
        low, high = nu[usable].min(), nu[usable].max()
        uniform = bool((r[usable] == r[usable[0]]).all())
        if float(high - low) < shaping.min_range or high == low or (uniform and shaping.uniform_groups == "drop"):
            continue
        for i in usable:
            nubar = (nu[i] - low) / (high - low)
            factor = {
                "scale": 1 + shaping.strength * nubar,
                "centered": 1 + shaping.strength * (2 * nubar - 1),
                "literal": 1 + shaping.strength * r[i] * nubar,
            }[shaping.rule]
            bound = r[i].abs().clamp(min=shaping.clip)
            shaped[i] = (r[i] * factor).clamp(-bound, bound)
    return shaped.to(rewards.dtype)


def group_advantages(rewards: Tensor, cu_groups: Tensor, normalize: str) -> Tensor:
    r = rewards.double()
    A = torch.zeros_like(r)
    for members in _groups(cu_groups):
        if len(members) == 0:
            continue
        of_group = r[members.start : members.stop]
        centered = of_group - of_group.mean()
        if bool((of_group == of_group[0]).all()):
            centered = torch.zeros_like(centered)
        if normalize == "std":
            centered = centered / (centered.square().mean() + 1e-6).sqrt()
        A[members.start : members.stop] = centered
    return A.to(rewards.dtype)


def g2rl_advantages(
    features: Tensor,
    rewards: Tensor,
    cu_groups: Tensor,
    m_max: int,
    valid: Tensor | None,
    shaping: Shaping,
    normalize: str,
) -> GroupAdvantages:
    nonzero = features.abs().amax(1) > 0 if features.shape[1] else torch.zeros_like(rewards, dtype=torch.bool)
    usable = nonzero if valid is None else nonzero & valid
    S = group_similarity(features.double(), cu_groups, m_max)
    r = rewards.double()
    nu = exploration_scores(S, r, cu_groups, usable)
    shaped = shape_rewards(r, nu, cu_groups, usable, shaping)
    A = group_advantages(shaped, cu_groups, normalize)
    return GroupAdvantages(*(x.to(features.dtype) for x in (A, shaped, nu, S)))
