"""Backward of log-probabilities and entropy: gradients of logits in strips of the vocabulary, two products for each.

    dH += G W[strip],   dW[strip] = G^T H,   dbias[strip] = sum_t G_t          G [N, strip], see `grad_logits`

Sums are fp32 and their order is fixed; G takes the workspace and no more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from g2rl_kernels.plans import Kernels
from g2rl_kernels.plans.inputs import on_device_of
from g2rl_kernels.products import exact_products, mm, mm_rounded
from g2rl_kernels.records import Gradients, Head, Needs, TokenLogprobs
from g2rl_kernels.workspace import workspace_or_default

# Columns of strips are multiples of this where the workspace allows, tokens of chunks too.
_STEP = 128
# 16 bytes in numbers of 16 bits.
_ALIGNED = 8
# Of a strip in fp32: a library that adds up 131072 products one by one is off by 1e-4 of a gradient's largest term.
_FP32_COLUMNS = 1 << 14
# fp16 ends at 65504 and at 2^-24; entries are at most 1 before scaling by this.
_FP16_RANGE = 2.0**15
_FP16_SMALLEST = 2.0**-24
# The reciprocal of this is finite, and this times _PROVISIONAL.
_LARGEST_SCALE = 2.0**109
# What makes a row overflow unless its largest entry is below 2^-16 of its bound; the others lose 2^-24 without it.
_PROVISIONAL = 2.0**16


def logprobs_backward(
    kernels: Kernels,
    upstream: tuple[Tensor, Tensor],
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    saved: TokenLogprobs,
    needs: Needs,
    workspace_bytes: int,
) -> Gradients:
    """`upstream`: gradients of log p and of entropy [N]."""
    (N, d), V, dtype, device = hidden.shape, head.V, head.weight.dtype, hidden.device
    need_bias = needs.bias and head.bias is not None
    scaled = dtype == torch.float16
    rows_in, even_scale = _rows_in(head, *upstream, saved, scaled)

    grad_weight = hidden.new_empty(V, d) if needs.weight else None
    grad_bias = torch.zeros(V, dtype=torch.float32, device=device) if need_bias else None
    entries = workspace_or_default(workspace_bytes, device) // ((2 if scaled else 1) * dtype.itemsize)
    rows, columns = _chunks(N, V, entries, _FP32_COLUMNS if dtype == torch.float32 else V)
    whole = rows >= N > 0
    # Of all tokens at once, the first strip's share is what the others are added to.
    grad_hidden = torch.zeros(N, d, dtype=torch.float32, device=device) if needs.hidden and not whole else None
    if grad_weight is not None and N == 0:
        grad_weight.zero_()
    with exact_products(head.weight), on_device_of(hidden):
        for v0 in range(0, V if N else 0, columns):
            strip = range(v0, min(v0 + columns, V))
            of_strip = slice(strip.start, strip.stop)
            grad_w = None
            for n0 in range(0, N, rows):
                at = slice(n0, min(n0 + rows, N))
                h = hidden[at]
                G, even, row_scales, scale = _grad_logits(
                    kernels, h, head, targets[at], rows_in[:, at], even_scale, strip
                )
                if needs.hidden:
                    part = mm(G, head.weight[of_strip])
                    part = part.div_(row_scales[:, None]) if scaled else part
                    if grad_hidden is None:
                        grad_hidden = part
                    else:
                        grad_hidden[at] += part
                if grad_weight is not None and whole and not scaled:
                    mm_rounded(even.T, h, grad_weight[of_strip])
                elif grad_weight is not None:
                    part = mm(even.T, h)
                    part = part / scale if scaled else part
                    grad_w = part if grad_w is None else grad_w.add_(part)
                if grad_bias is not None:
                    grad_bias[of_strip] += even.sum(0, dtype=torch.float32) / scale
                del G, even  # before there are others
            if grad_weight is not None and grad_w is not None:
                grad_weight[of_strip] = grad_w
    return Gradients(
        None if grad_hidden is None else grad_hidden.to(dtype),
        grad_weight,
        None if grad_bias is None or head.bias is None else grad_bias.to(head.bias.dtype),
    )


def _grad_logits(
    kernels: Kernels, hidden: Tensor, head: Head, targets: Tensor, rows_in: Tensor, even_scale: Tensor, strip: range
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G [n, strip] for a product over words and for one over tokens, the first's scales of rows [n], the second's."""
    G = _strip(hidden, len(strip))
    if head.weight.dtype != torch.float16:
        kernels.grad_logits(hidden, head, targets, rows_in, strip, G, None, even_scale)
        return G, G, rows_in[5], even_scale
    G_even = _strip(hidden, len(strip))
    if head.softcap:
        rows_in = rows_in.clone()
        rows_in[5] *= _PROVISIONAL
        kernels.grad_logits(hidden, head, targets, rows_in, strip, G, G_even, even_scale)
        rows_in[5] = _fitted(rows_in[5], G)
        even_scale = rows_in[5].amin()
    kernels.grad_logits(hidden, head, targets, rows_in, strip, G, G_even, even_scale)
    return G, G_even, rows_in[5], even_scale


def _chunks(N: int, V: int, entries: int, most_columns: int) -> tuple[int, int]:
    """Tokens and columns of a strip of at most `entries` (at least V: a row always fits); all tokens if possible."""
    entries = max(entries, V)
    rows = max(1, min(N, entries // min(_STEP, V)))
    if _STEP < rows < N:
        rows = rows // _STEP * _STEP
    columns = entries // rows
    if most_columns >= V and columns >= _padded(V):
        return rows, V
    columns = min(columns, most_columns)
    if columns <= _STEP:
        return rows, min(V, columns)
    strips = -(-V // (columns // _STEP * _STEP))
    return rows, -(-V // (strips * _STEP)) * _STEP  # alike, but for the last


def _strip(like: Tensor, columns: int) -> Tensor:
    """[N, columns] for N rows of `like`; rows begin at multiples of 16 bytes, for without that products are slow."""
    return like.new_empty(like.shape[0], _padded(columns))[:, :columns]


def _padded(columns: int) -> int:
    return -(-columns // _ALIGNED) * _ALIGNED


def _rows_in(
    head: Head, grad_logps: Tensor, grad_entropy: Tensor, saved: TokenLogprobs, scaled: bool
) -> tuple[Tensor, Tensor]:
    """What `grad_logits` takes of each token [6, N], and the scale for all of G."""
    logps, entropy, lse = saved
    factor = head.logit_scale / head.temperature
    g, g_entropy = grad_logps.float() * factor, grad_entropy.float() * factor
    # 1 - p_y by expm1: exact where log p_y is.
    of_target = g * -torch.expm1(logps) - g_entropy * logps.exp() * (logps + entropy)
    rows_in = torch.stack((lse, entropy, g, g_entropy, of_target, torch.ones_like(lse)))
    if not scaled:
        return rows_in, lse.new_ones(())
    # |p log p| <= 1 / e, and p, slope <= 1: no entry of a row is larger than this.
    largest = g.abs() + g_entropy.abs() * (entropy + 0.5)
    rows_in[5] = (_FP16_RANGE / largest).clamp(max=_LARGEST_SCALE)
    return rows_in, rows_in[5].amin() if largest.numel() else lse.new_ones(())


def _fitted(provisional: Tensor, G: Tensor) -> Tensor:
    """Scales of rows [n] by what G [n, strip] has become under `_PROVISIONAL` times the scales of `_rows_in`.

    Where the cap is saturated its slope makes entries as small as 1e-20 of their bound, which fp16 cannot hold. A row
    that overflows has entries near its bound, whose scale it keeps; one that vanishes fits 2^55 times as large a scale.
    """
    largest = torch.linalg.vector_norm(G, torch.inf, dim=1).float()
    fitted = _FP16_RANGE / largest.clamp(_FP16_SMALLEST, _FP16_RANGE * _PROVISIONAL) * provisional
    return fitted.clamp(max=_LARGEST_SCALE)
