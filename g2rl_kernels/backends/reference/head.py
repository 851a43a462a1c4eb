"""Token log-probabilities, entropy and sequence features, one token at a time (paper eq. 5 to 8)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from g2rl_kernels.records import Gradients, Head, Needs, Responses, SequenceFeatures, TokenLogprobs
from g2rl_kernels.sums import join_parts


def _result(tensor: Tensor, hidden: Tensor) -> Tensor:
    return tensor if hidden.dtype == torch.float64 else tensor.float()


def _logits(h: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """u = z / T [V] of one token, and the slope dz / d(logit_scale (W h + b)) [V] of the soft cap."""
    z = head.weight @ h
    if head.bias is not None:
        z = z + head.bias
    z = head.logit_scale * z
    slope = torch.ones_like(z)
    if head.softcap > 0:
        # The derivative of tanh; 1 - tanh^2 has no digits left where the cap saturates.
        slope = torch.cosh(z / head.softcap) ** -2
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature, slope


def _double(head: Head) -> Head:
    return replace(head, weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int = 0) -> TokenLogprobs:
    no_responses = Responses(targets.new_zeros(1))
    return TokenLogprobs(*sequence_features(hidden, head, targets, no_responses)[1:])


def sequence_features(
    hidden: Tensor, head: Head, targets: Tensor, responses: Responses, workspace_bytes: int = 0
) -> SequenceFeatures:
    """A given `lse` is not used: the oracle computes its own."""
    h, exact = hidden.double(), _double(head)
    logps, entropy, lses, phis = [], [], [], []
    for t in range(h.shape[0]):
        u, slope = _logits(h[t], exact)
        lse_t = torch.logsumexp(u, 0)
        log_p = u - lse_t
        p = log_p.exp()
        y = int(targets[t])
        logps.append(log_p[y])
        entropy.append(-(p * log_p).sum())
        lses.append(lse_t)
        if responses.cu_seqlens.shape[0] > 1:
            # e_y - p, whose target is the sum of the others: 1 - p_y has no digits left where p_y is near 1.
            residual = -p
            residual[y] = 0
            residual[y] = -residual.sum()
            phis.append(head.logit_scale * (exact.weight.T @ (residual * slope)))

    def stack(numbers: list[Tensor]) -> Tensor:
        return _result(torch.stack(numbers) if numbers else h.new_zeros(0), hidden)

    return SequenceFeatures(_mean(phis, responses, hidden), stack(logps), stack(entropy), stack(lses))


def _mean(phis: list[Tensor], responses: Responses, hidden: Tensor) -> Tensor:
    """Phi [B, d] from the tokens' phi."""
    a = hidden.new_ones(hidden.shape[0]) if responses.token_weights is None else responses.token_weights
    offsets, a = responses.cu_seqlens.tolist(), a.double()
    features = [hidden.new_zeros(hidden.shape[1]).double() for _ in offsets[1:]]
    for b, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        total = a[start:end].sum()
        if start < end and float(total) != 0:
            features[b] = sum(a[t] * phis[t] for t in range(start, end)) / total
    return _result(torch.stack(features) if features else hidden.new_zeros(0, hidden.shape[1]), hidden)


def token_sums(hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int = 0) -> Tensor:
    h, exact = hidden.double(), _double(head)
    sums = h.new_zeros(4, h.shape[0], dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    for t in range(h.shape[0]):
        u, _ = _logits(h[t], exact)
        y = int(targets[t])
        sums[0, t] = u.max()
        x = u - sums[0, t].double()
        if abs(float(x.max())) > 1:  # no digits of fp32 are left for so large a maximum, as of words that are masked
            x = u - u.max()
        e = x.exp()
        if y >= 0:
            e[y] = 0
            sums[3, t] = exact.weight[y] @ h[t] + (0 if exact.bias is None else exact.bias[y])
        sums[1, t], sums[2, t] = e.sum(), (e * x).sum()
    return sums


def part_features(
    hidden: Tensor, head: Head, targets: Tensor, responses: Responses, sums: Tensor, workspace_bytes: int = 0
) -> SequenceFeatures:
    h, exact = hidden.double(), _double(head)
    joined = join_parts(sums, exact)
    phis = []
    for t in range(h.shape[0] if responses.cu_seqlens.shape[0] > 1 else 0):
        u, slope = _logits(h[t], exact)
        residual = -torch.exp(u - joined.results.lse[t])
        if int(targets[t]) >= 0:
            residual[int(targets[t])] = joined.rest_share[t]
        phis.append(head.logit_scale * (exact.weight.T @ (residual * slope)))
    return SequenceFeatures(_mean(phis, responses, hidden), *(_result(x, hidden) for x in joined.results))


def logprobs_backward(
    grad_logps: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    saved: TokenLogprobs,
    needs: Needs,
    workspace_bytes: int = 0,
) -> Gradients:
    """With u = z / T: dlogp/du = e_y - p and dH/du = -p (log p + H)."""
    h, exact = hidden.double(), _double(head)
    W = exact.weight
    grad_h, grad_W, grad_b = (h.new_zeros(shape) for shape in (h.shape, W.shape, W.shape[:1]))
    for t in range(h.shape[0]):
        u, slope = _logits(h[t], exact)
        logp, H, lse = (x[t].double() for x in saved)
        log_p = u - lse
        g_logp, g_H = grad_logps[t].double(), grad_entropy[t].double()
        grad_u = -log_p.exp() * (g_logp + g_H * (log_p + H))
        if int(targets[t]) >= 0:
            grad_u[int(targets[t])] = -g_logp * torch.expm1(logp) - g_H * logp.exp() * (logp + H)
        grad_z = grad_u * slope * head.logit_scale / head.temperature
        grad_h[t] = W.T @ grad_z
        grad_W += torch.outer(grad_z, h[t])
        grad_b += grad_z
    return Gradients(
        grad_h.to(hidden.dtype) if needs.hidden else None,
        grad_W.to(head.weight.dtype) if needs.weight else None,
        grad_b.to(head.bias.dtype) if needs.bias and head.bias is not None else None,
    )
