"""Gradients of raw logits for a strip of the vocabulary, from recomputed logits.

With u = z / T, p = exp(u - lse), g_t and g'_t the gradients of log p_t and H_t:

    G_tv = slope_tv logit_scale / T * (-p_tv (g_t + g'_t (log p_tv + H_t)))            v != y_t
    G_ty = slope_ty logit_scale / T * (g_t (1 - p_y) - g'_t p_y (log p_y + H_t))       given

G is rounded once, to the model's dtype. fp16 has a short range of exponents, so there each row is scaled into it, by
row_scales for a product over the vocabulary; a product over tokens needs one scale for all: `G_even`, scaled by
even_scale.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from g2rl_kernels.backends.triton import configs
from g2rl_kernels.backends.triton.inputs import bias_or_weight, constants, operands
from g2rl_kernels.backends.triton.tiles import apply_options, dot_rows, grouped, load_rows
from g2rl_kernels.records import Head


@triton.jit(do_not_specialize=["N"])
def _grad_logits_kernel(
    hidden,
    weight,
    bias,
    targets,
    rows_in,
    even_scale,
    G,
    G_even,
    N,
    D,
    v_start,
    v_end,
    stride_h,
    stride_w,
    stride_rows,
    stride_g,
    inner_scale,
    scale,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    UPCAST: tl.constexpr,
    USE_TMA: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n_block, v_block = grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(v_end - v_start, BLOCK_V), GROUP)
    n0 = n_block * BLOCK_N
    v0 = v_start + v_block * BLOCK_V
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for k in range(0, D, BLOCK_D):
        h = load_rows(hidden, n0, N, k, D, stride_h, USE_TMA, BLOCK_N, BLOCK_D)
        w = load_rows(weight, v0, v_end, k, D, stride_w, USE_TMA, BLOCK_V, BLOCK_D)
        z = dot_rows(h, w, z, UPCAST)

    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    n, v = n0 + rows, v0 + columns
    inside = n < N
    if HAS_BIAS:
        z += tl.load(bias + v, mask=v < v_end, other=0.0).to(tl.float32)[None, :]
    y = tl.load(targets + n, mask=inside, other=-1).to(tl.int32)
    # Rows of `rows_in`: lse, H, g, g', the target's gradient, row_scales. Rows beyond N are not stored.
    lse = tl.load(rows_in + n, mask=inside, other=0.0)
    H = tl.load(rows_in + stride_rows + n, mask=inside, other=0.0)
    g_logp = tl.load(rows_in + 2 * stride_rows + n, mask=inside, other=0.0)
    g_entropy = tl.load(rows_in + 3 * stride_rows + n, mask=inside, other=0.0)
    of_target = tl.load(rows_in + 4 * stride_rows + n, mask=inside, other=0.0)
    u, slope = apply_options(z, inner_scale, scale, SOFTCAP)
    log_p = u - lse[:, None]
    of_others = -tl.exp(log_p) * (g_logp[:, None] + g_entropy[:, None] * (log_p + H[:, None]))
    grad = tl.where(v[None, :] == y[:, None], of_target[:, None], of_others) * slope

    at = tl.cast(n0, tl.int64) * stride_g + (v0 - v_start) + (rows[:, None] * stride_g + columns[None, :])
    mask = inside[:, None] & (v < v_end)[None, :]
    if SCALED:
        row_scale = tl.load(rows_in + 5 * stride_rows + n, mask=inside, other=0.0)
        tl.store(G_even + at, (grad * tl.load(even_scale)).to(G_even.dtype.element_ty), mask=mask)
        grad = grad * row_scale[:, None]
    tl.store(G + at, grad.to(G.dtype.element_ty), mask=mask)


def grad_logits(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows_in: Tensor,
    strip: range,
    G: Tensor,
    G_even: Tensor | None = None,
    even_scale: Tensor | None = None,
) -> None:
    """Write G [N, len(strip)] for rows_in [6, N], where g, g' and the target's gradient include logit_scale / T."""
    N, D = hidden.shape
    work = "softcap" if head.softcap > 0 else "scaled" if G_even is not None else ""
    tile = configs.tile("grad_logits", hidden, head.weight, work)
    h, w = operands(hidden, head.weight, tile)
    _grad_logits_kernel[(triton.cdiv(N, tile.BLOCK_N) * triton.cdiv(len(strip), tile.BLOCK_V),)](
        h,
        w,
        bias_or_weight(head),
        targets,
        rows_in,
        rows_in if even_scale is None else even_scale,
        G,
        G if G_even is None else G_even,
        N,
        D,
        strip.start,
        strip.stop,
        hidden.stride(0),
        head.weight.stride(0),
        rows_in.stride(0),
        G.stride(0),
        head.inner_scale,
        head.scale,
        SCALED=G_even is not None,
        GROUP=configs.GROUP,
        **constants(head),
        **tile.kwargs(),
    )
