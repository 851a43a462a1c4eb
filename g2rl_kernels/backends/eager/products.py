"""Products in blocks of rows, so that a row's bits do not depend on how many others come along."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from g2rl_kernels.products import mm

# Tensor cores truncate what they add up: after k products a sum is 9e-10 k of itself too small (measured on an H100).
# So longer sums of 16-bit numbers are made in chains of so many products, which are added up in fp32, rounded.
CHAIN = {"cuda": 128}


def mm_in_chains(a: Tensor, b: Tensor, rows: int) -> Tensor:
    """`mm_in_blocks`, exact to fp32 where the device's own sums of so many products are not."""
    K = a.shape[1]
    chain = CHAIN.get(a.device.type, K) if b.dtype.itemsize == 2 else K
    chains = (mm_in_blocks(a[:, k : k + chain], b[k : k + chain], rows) for k in range(0, K, chain))
    return reduce(Tensor.add_, chains)


def mm_in_blocks(a: Tensor, b: Tensor, rows: int) -> Tensor:
    """`mm` in blocks of exactly `rows` rows, the last one padded.

    Libraries choose the order of their sums by the shapes of a product. With one shape for all, a row of the result
    does not depend on how many others come along, as far as the library treats all rows of a block alike. On an AMD
    processor fp64 rows did depend on the batch; where in a block was not found out. So on a CPU every fp64 row is a
    product of its own, from aligned memory: nothing about it depends on the batch.
    """
    b = b if b.is_cuda or b.dtype == torch.float64 else b.float()
    a = a.to(b.dtype)
    if b.dtype == torch.float64 and not b.is_cuda:
        rows_alone = [mm(row.clone(memory_format=torch.contiguous_format), b) for row in a.split(1)]
        return torch.cat(rows_alone) if rows_alone else a.new_empty(0, b.shape[1])
    n = a.shape[0]
    padding = -n % rows
    if padding:
        a = torch.cat((a, a.new_zeros(padding, a.shape[1])))
    return torch.cat([mm(block, b) for block in a.split(rows)])[:n]


def mm_fp32_left(a: Tensor, b: Tensor, rows: int) -> Tensor:
    """a @ b in blocks of rows for fp32 (fp64) `a` and `b` of the model's dtype, exact to fp32.

    For bf16, `a` is split into three bf16 terms, 8 bits of its significand each: nothing of it is lost.
    """
    if b.dtype == torch.bfloat16:
        high = a.bfloat16()
        rest = a - high.float()
        middle = rest.bfloat16()
        low = (rest - middle.float()).bfloat16()
        terms = mm_in_blocks(torch.cat((low, middle, high)), b, rows).view(3, a.shape[0], b.shape[1])
        return terms.sum(0)
    return mm_in_blocks(a, b.to(a.dtype), rows)
