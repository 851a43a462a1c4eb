"""Matrix products that take the model's dtype and accumulate and return fp32 (or fp64), whatever the global settings.

PyTorch's own ``bf16 @ bf16`` rounds its result to bf16, and a global "tf32" or "bf16" setting makes fp32 products
inexact. Both would break the numerics contract, so every product of the backend goes through this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def fp32_precision(precision: str) -> Iterator[None]:
    """What fp32 products compute with inside the block: "ieee", or "bf16" (operands rounded, fp32 sums; CPU only)."""
    cpu, cuda = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = cpu.fp32_precision, cuda.fp32_precision
    cpu.fp32_precision, cuda.fp32_precision = precision, "ieee"
    try:
        yield
    finally:
        cpu.fp32_precision, cuda.fp32_precision = before


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for equal dtypes with fp32 sums and result (fp64 for fp64)."""
    if a.dtype in (torch.float32, torch.float64):
        with fp32_precision("ieee"):
            return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    # fp32 operands that hold bf16 values lose nothing when the product rounds them to bf16: this is the processor's bf16
    # unit with an fp32 result, and four times as fast as a true fp32 product.
    with fp32_precision("bf16" if a.dtype == torch.bfloat16 else "ieee"):
        return a.float() @ b.float()


def mm_fp32_left(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for fp32 `a` and `b` of the model's dtype, exact to fp32.

    For bf16, `a` is split into three bf16 terms, 8 bits of its significand each: nothing of it is lost.
    """
    if b.dtype == torch.bfloat16:
        high = a.bfloat16()
        rest = a - high.float()
        middle = rest.bfloat16()
        low = (rest - middle.float()).bfloat16()
        terms = mm(torch.cat((low, middle, high)), b).view(3, a.shape[0], b.shape[1])
        return terms.sum(0)
    return mm(a.to(torch.promote_types(a.dtype, b.dtype)), b.to(a.dtype))
