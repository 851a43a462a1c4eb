"""Token log-probabilities, entropy and sequence features, one token at a time (paper eq. 5 to 8)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from g2rl_kernels.records import Gradients, Head, Needs, Responses, SequenceFeatures, TokenLogprobs


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
    W, cu_seqlens = exact.weight, responses.cu_seqlens
    a = torch.ones_like(h[:, 0]) if responses.token_weights is None else responses.token_weights.double()

    logps, entropy, lses, phis = [], [], [], []
    for t in range(h.shape[0]):
        u, slope = _logits(h[t], exact)
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
            phis.append(head.logit_scale * (W.T @ ((onehot - p) * slope)))

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

    return SequenceFeatures(stack(features, h.shape[1]), stack(logps), stack(entropy), stack(lses))


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
    """With u = z / T: dlogp/du = e_y - p and dH/du = -p (log p + H). The forward's results are recomputed, not used."""
    h, exact = hidden.double(), _double(head)
    W = exact.weight
    grad_h, grad_W, grad_b = (h.new_zeros(shape) for shape in (h.shape, W.shape, W.shape[:1]))
    for t in range(h.shape[0]):
        u, slope = _logits(h[t], exact)
        log_p = torch.log_softmax(u, 0)
        p = log_p.exp()
        onehot = torch.zeros_like(p)
        onehot[int(targets[t])] = 1
        H = -(p * log_p).sum()
        grad_u = grad_logps[t].double() * (onehot - p) - grad_entropy[t].double() * p * (log_p + H)
        grad_z = grad_u * slope * head.logit_scale / head.temperature
        grad_h[t] = W.T @ grad_z
        grad_W += torch.outer(grad_z, h[t])
        grad_b += grad_z
    return Gradients(
        grad_h.to(hidden.dtype) if needs.hidden else None,
        grad_W.to(head.weight.dtype) if needs.weight else None,
        grad_b.to(head.bias.dtype) if needs.bias and head.bias is not None else None,
    )
