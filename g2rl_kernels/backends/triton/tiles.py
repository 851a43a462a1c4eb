"""Device functions that several kernels share: a tile of raw logits, the head's options, functions Triton lacks.

Symbols of all kernels: N tokens, d hidden, V vocab, B responses; z = W h + b raw logits, u = z / T with scale and soft
cap applied, `slope` = dz/dz_raw of the soft cap.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Stands for the u of a word that is left out, and for a maximum over none: exp(LOWEST - m) is 0 for every m, and its
# products with 0 are no NaN, as those of -inf would be. So no bound is needed, which would swallow a diverged head's.
LOWEST = tl.constexpr(-1e30)
# A maximum below this is one over no words.
NO_WORDS = tl.constexpr(-1e29)


@triton.jit
def dot_rows(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b^T in fp32, exact for fp32 operands. UPCAST: the interpreter's product of bf16 tiles returns garbage.

    Each tile is summed from 0 and added to `acc`. Units for 16-bit products truncate their fp32 sums, each time they
    add 16 products: over d = 2048 that makes all logits 2e-6 of themselves too small, and Phi off by 3e-5. In fp32 one
    chain of d roundings is off by 1e-5 at d = 2048. Without an explicit limit the compiler would join the sums again.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.dtype == tl.float32:
        return acc + tl.dot(a, tl.trans(b), input_precision="ieee", max_num_imprecise_acc=a.shape[1])
    else:
        return acc + tl.dot(a, tl.trans(b), max_num_imprecise_acc=a.shape[1])


@triton.jit
def load_rows(x, first_row, end_row, k, D, stride, USE_TMA: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """x[first_row : first_row + ROWS, k : k + BLOCK_D], 0 beyond D and, without TMA, beyond `end_row`.

    `x` is a tensor descriptor under USE_TMA, else a pointer. TMA gives whatever follows `end_row` inside the tensor:
    what such rows lead to is masked by the caller.
    """
    if USE_TMA:
        return x.load([first_row, k])
    else:
        rows = tl.arange(0, ROWS)
        columns = k + tl.arange(0, BLOCK_D)
        inside = (first_row + rows < end_row)[:, None] & (columns < D)[None, :]
        at = x + tl.cast(first_row, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def tanh_and_slope(x):
    """tanh x, to about one unit in the last place, and 1 / cosh^2 x, which 1 - tanh^2 is not where tanh is near 1."""
    t = tl.exp(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * t / (1.0 + t)
    s = x * x
    # Taylor series below 1/4, where 1 - 2t / (1 + t) cancels; the next term is under 1e-8 of the sum.
    small = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    value = tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0, -large, large))
    return value, 4.0 * t / ((1.0 + t) * (1.0 + t))


@triton.jit
def apply_options(z, inner_scale, scale, SOFTCAP: tl.constexpr):
    """u from raw logits: scale * z, or scale * tanh(inner_scale * z) under a soft cap; and the cap's slope."""
    if SOFTCAP:
        value, slope = tanh_and_slope(z * inner_scale)
        return value * scale, slope
    else:
        return z * scale, 1.0


@triton.jit
def rounded_up(u):
    """u, which was rounded, as a maximum to count others from: no less than it was before.

    Near 1e10 fp32 rounds by hundreds. The difference from such a maximum is rounded once, as the compiler fuses it with
    the product that u comes from, and its exponential would be infinite.
    """
    return u + tl.abs(u) * 1.1920929e-07


@triton.jit
def log1p_of_ratio(q):
    """log(1 + q) for q in [0, 1] to about one unit in the last place: 2 atanh(q / (2 + q)) by its series."""
    s = q / (2.0 + q)
    x = s * s
    series = 1.0 / 13 + x * (1.0 / 15)
    series = 1.0 / 9 + x * (1.0 / 11 + x * series)
    series = 1.0 / 5 + x * (1.0 / 7 + x * series)
    return 2.0 * s * (1.0 + x * (1.0 / 3 + x * series))


@triton.jit
def grouped(pid, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a program, such that consecutive programs share few rows and columns: both stay in L2."""
    per_group = GROUP * columns
    first = pid // per_group * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size
