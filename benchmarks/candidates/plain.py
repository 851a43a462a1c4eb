"""What is written without a fused op, in plain PyTorch: baselines that need nothing installed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.workloads import GroupSample
from g2rl_kernels.testing import HeadSample


def eager_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p [N] and entropy [N], differentiable: logits in the model's dtype, the rest in fp32."""
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def segment_means(phi: Tensor, s: HeadSample) -> Tensor:
    """Weighted means of token gradients [N, d] over each response: paper eq. 8."""
    sizes = s.cu_seqlens.diff()
    response = torch.repeat_interleave(torch.arange(len(sizes), device=phi.device), sizes)
    sums = phi.new_zeros(len(sizes), phi.shape[1]).index_add_(0, response, phi * s.token_weights[:, None])
    totals = phi.new_zeros(len(sizes)).index_add_(0, response, s.token_weights)
    return torch.where(totals > 0, 1 / totals, 0)[:, None] * sums


def per_token_features(s: HeadSample) -> dict[str, Tensor]:
    """phi_t = W[y_t] - p_t W for every token, then the mean: eq. 7 and 8 as they stand."""
    weight = s.head.weight
    log_p = F.linear(s.hidden, weight).float().log_softmax(-1)
    p = log_p.exp()
    phi = weight[s.targets].float() - (p.to(weight.dtype) @ weight).float()
    return {
        "features": segment_means(phi, s),
        "logps": log_p.gather(-1, s.targets[:, None])[:, 0],
        "entropy": -(p * log_p).sum(-1),
    }


def top_256_features(s: HeadSample) -> dict[str, Tensor]:
    """The softmax cut to the 256 likeliest tokens."""
    weight = s.head.weight
    phi = []
    for rows in torch.arange(s.hidden.shape[0], device=s.hidden.device).split(64):
        values, kept = F.linear(s.hidden[rows], weight).float().topk(min(256, weight.shape[0]), -1)
        mean = values.softmax(-1)[:, None] @ weight[kept].float()
        phi.append(weight[s.targets[rows]].float() - mean[:, 0])
    return {"features": segment_means(torch.cat(phi), s)}


def composed_advantages(s: GroupSample) -> dict[str, Tensor]:
    """Eq. 9 to 13 and 2, all groups at once, with lambda 1 and clip 3."""
    m = s.m
    r = s.rewards.view(-1, m)
    u = F.normalize(s.features.view(len(r), m, -1), dim=-1)
    S = u @ u.mT
    own = torch.eye(m, dtype=torch.bool, device=r.device)
    w = r[:, None, :].expand_as(S).masked_fill(own, -torch.inf).softmax(-1)
    nu = (1 - (w * S.square()).sum(-1)).clamp(min=0).sqrt()
    low, high = nu.amin(1, keepdim=True), nu.amax(1, keepdim=True)
    scaled = (r * (1 + (nu - low) / (high - low))).clamp(-3, 3)
    shaped = torch.where(high - low >= 1e-2, scaled, r)
    centred = shaped - shaped.mean(1, keepdim=True)
    A = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return {"advantages": A.flatten(), "shaped_rewards": shaped.flatten(), "scores": nu.flatten(), "similarity": S}
