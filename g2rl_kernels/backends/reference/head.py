"""Token log-probabilities, entropy and sequence features, one token at a time (paper eq. 5 to 8)."""

from __future__ import annotations

import torch
from torch import Tensor


def _result(tensor: Tensor, hidden: Tensor) -> Tensor:
    return tensor if hidden.dtype == torch.float64 else tensor.float()


def _logits(
    h: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, logit_scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """u = z / T [V] of one token, and the slope dz / d(logit_scale (W h + b)) [V] of the soft cap."""
    z = weight @ h
    if bias is not None:
        z = z + bias
    z = logit_scale * z
    slope = torch.ones_like(z)
    if softcap > 0:
        # The derivative of tanh; 1 - tanh^2 has no digits left where the cap saturates.
        slope = torch.cosh(z / softcap) ** -2
        z = softcap * torch.tanh(z / softcap)
    return z / temperature, slope


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float,
    workspace_bytes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    no_responses = targets.new_zeros(1)
    return sequence_features(
        hidden, weight, bias, targets, no_responses, None, None, temperature, logit_scale, softcap, workspace_bytes
    )[1:]


def sequence_features(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    lse: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    workspace_bytes: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A given `lse` is not used: the oracle computes its own."""
    h, W = hidden.double(), weight.double()
    b = None if bias is None else bias.double()
    a = torch.ones_like(h[:, 0]) if token_weights is None else token_weights.double()

    logps, entropy, lses, phis = [], [], [], []
    for t in range(h.shape[0]):
        u, slope = _logits(h[t], W, b, temperature, logit_scale, softcap)
        lse_t = torch.logsumexp(u, 0)
        log_p = u - lse_t
        p = log_p.exp()
        y = int(targets[t])
        onehot = torch.zeros_like(p)
        onehot[y] = 1
        logps.append(log_p[y])
        entropy.append(-(p * log_p).sum())
        lses.append(lse_t)
        if cu_seqlens.shape[0] > 1:
            phis.append(logit_scale * (W.T @ ((onehot - p) * slope)))

    features = []
    offsets = cu_seqlens.tolist()
    for start, end in zip(offsets[:-1], offsets[1:], strict=True):
        total = a[start:end].sum()
        if start == end or float(total) == 0:
            features.append(torch.zeros_like(W[0]))
        else:
            features.append(sum(a[t] * phis[t] for t in range(start, end)) / total)

    def stack(rows: list[Tensor], *empty: int) -> Tensor:
        return _result(torch.stack(rows) if rows else h.new_zeros(0, *empty), hidden)

    return stack(features, h.shape[1]), stack(logps), stack(entropy), stack(lses)


def logprobs_backward(
    grad_logps: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logps: Tensor,
    entropy: Tensor,
    lse: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float,
    workspace_bytes: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """With u = z / T: dlogp/du = e_y - p and dH/du = -p (log p + H). The forward's results are recomputed, not used."""
    h, W = hidden.double(), weight.double()
    b = None if bias is None else bias.double()
    grad_h, grad_W, grad_b = (h.new_zeros(shape) for shape in (h.shape, W.shape, W.shape[:1]))
    for t in range(h.shape[0]):
        u, slope = _logits(h[t], W, b, temperature, logit_scale, softcap)
        log_p = torch.log_softmax(u, 0)
        p = log_p.exp()
        onehot = torch.zeros_like(p)
        onehot[int(targets[t])] = 1
        H = -(p * log_p).sum()
        grad_u = grad_logps[t].double() * (onehot - p) - grad_entropy[t].double() * p * (log_p + H)
        grad_z = grad_u * slope * logit_scale / temperature
        grad_h[t] = W.T @ grad_z
        grad_W += torch.outer(grad_z, h[t])
        grad_b += grad_z
    return (
        grad_h.to(hidden.dtype) if need_hidden else None,
        grad_W.to(weight.dtype) if need_weight else None,
        grad_b.to(bias.dtype) if need_bias and bias is not None else None,
    )
