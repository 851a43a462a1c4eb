"""How far off are the sums of a GPU's units for 16-bit products, and how often must they be promoted to fp32?

    python -m benchmarks.bias [--json FILE] [--d 2048 ...]
    TRITON_INTERPRET=1 python -m benchmarks.bias --device cpu --d 128 --V 512    # no reading: whether this file works

Tensor cores truncate what they add up, each time they take another 16 products, so errors of one sign grow with d. For
logits of `torch.mm` (fp32 output) and of one chain of tensor-core products that is added to an fp32 sum every so many
products, against float64: the signed error relative to |z| (all logits, and those of the targets), and what it does to
log-probabilities, entropy and Phi when everything after the product is exact. The contract allows 1e-5 for each of the
last three, everything included.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import triton
import triton.language as tl
from rich.table import Table
from torch import Tensor

from benchmarks.arguments import at_least, device_here
from benchmarks.reporting.reports import begin, result_file, write_report
from g2rl_kernels import testing
from g2rl_kernels.backends.triton.tiles import dot_rows
from g2rl_kernels.products import mm

_BLOCK = 64
# Products after which a chain is added to the fp32 sum; 0: never.
_PROMOTE = (64, 128, 256, 512, 1024, 0)


@triton.jit
def _chain_kernel(hidden, weight, out, N, V, D, CHAIN: tl.constexpr, BLOCK: tl.constexpr):
    """out = hidden weight^T, promoted after CHAIN blocks of products."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK)
    z = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(0, D, BLOCK * CHAIN):
        if CHAIN == 1:
            h = tl.load(hidden + n[:, None] * D + (k0 + k)[None, :], mask=(n < N)[:, None], other=0.0)
            w = tl.load(weight + v[:, None] * D + (k0 + k)[None, :], mask=(v < V)[:, None], other=0.0)
            z = dot_rows(h, w, z, False)
        else:
            part = tl.zeros((BLOCK, BLOCK), tl.float32)
            for k1 in range(k0, tl.minimum(k0 + BLOCK * CHAIN, D), BLOCK):
                h = tl.load(hidden + n[:, None] * D + (k1 + k)[None, :], mask=(n < N)[:, None], other=0.0)
                w = tl.load(weight + v[:, None] * D + (k1 + k)[None, :], mask=(v < V)[:, None], other=0.0)
                part = tl.dot(h, tl.trans(w), part)
            z += part
    tl.store(out + n.to(tl.int64)[:, None] * V + v[None, :], z, mask=(n < N)[:, None] & (v < V)[None, :])


def chain(hidden: Tensor, weight: Tensor, promote: int) -> Tensor:
    """Logits [N, V] fp32; d is a multiple of 64."""
    (N, d), V = hidden.shape, weight.shape[0]
    out = torch.empty(N, V, dtype=torch.float32, device=hidden.device)
    grid = (triton.cdiv(N, _BLOCK), triton.cdiv(V, _BLOCK))
    _chain_kernel[grid](hidden, weight, out, N, V, d, CHAIN=(promote or d) // _BLOCK, BLOCK=_BLOCK, num_warps=4)
    return out


def reading(z: Tensor, sample: testing.HeadSample, exact: Tensor) -> dict[str, float]:
    """Errors of fp32 logits z [N, V] against `exact` in float64, and of what follows from them in float64."""
    y, W = sample.targets[:, None], sample.head.weight.double()

    def follow(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = u.log_softmax(1)
        p = log_p.exp()
        residual = (-p).scatter(1, y, -torch.expm1(log_p.gather(1, y))) * sample.token_weights.double()[:, None]
        lengths = sample.cu_seqlens.diff().tolist()
        R = torch.stack([part.sum(0) for part in residual.split(lengths)])
        return log_p.gather(1, y)[:, 0], -(p * log_p).sum(1), R @ W

    found, wanted = follow(z.double()), follow(exact)
    error = (z.double() - exact) * exact.sign()
    scale = exact.abs().mean(1, keepdim=True)
    at_target = ((z.gather(1, y).double() - exact.gather(1, y)) / exact.gather(1, y))[:, 0]
    return {
        "bias": float((error / scale).mean()),
        "bias at target": float(at_target.median()),
        "log p": float((found[0] - wanted[0]).abs().max()),
        "entropy": float((found[1] - wanted[1]).abs().max()),
        "Phi": float(((found[2] - wanted[2]).norm(dim=1) / wanted[2].norm(dim=1)).max()),
    }


def measure(device: torch.device, d: int, V: int, kind: str) -> list[dict[str, Any]]:
    """A row for each product."""
    sample = testing.head_sample(testing.Shape((1, 3, 60, 64), d, V, ""), torch.bfloat16, device, kind=kind)
    hidden, weight = sample.hidden, sample.head.weight
    exact = hidden.double() @ weight.double().T
    products = {"torch.mm": mm(hidden, weight.T)}
    if device.type == "cpu":  # where the interpreter's products of bf16 tiles are garbage
        hidden, weight = hidden.float(), weight.float()
    products |= {f"promoted / {p or 'never'}": chain(hidden, weight, p) for p in _PROMOTE if p < d}
    return [{"d": d, "kind": kind, "product": name, **reading(z, sample, exact)} for name, z in products.items()]


def _hidden_size(text: str) -> int:
    if not text.isdecimal() or int(text) % _BLOCK or not int(text):
        raise argparse.ArgumentTypeError(f"expected a multiple of {_BLOCK}, found {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bias", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--d", type=_hidden_size, action="append", help=f"a multiple of {_BLOCK}; repeatable")
    parser.add_argument("--V", type=at_least(1), default=8192, help="vocabulary size")
    parser.add_argument("--json", type=result_file, metavar="FILE")
    parser.add_argument("--device", type=device_here, choices=("cpu", "cuda"), default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    console, facts = begin(device)
    columns = ("bias", "bias at target", "log p", "entropy", "Phi")
    rows: list[dict[str, Any]] = []
    table = Table("d", "kind", "product", *columns)
    for d in arguments.d or (576, 1024, 2048, 4096, 8192):
        for kind in ("peaked", "random"):
            rows += measure(device, d, arguments.V, kind)
            write_report(arguments.json, facts, bias=rows)
    for row in rows:
        table.add_row(str(row["d"]), row["kind"], row["product"], *(f"{row[name]:.1e}" for name in columns))
    console.print(table)


if __name__ == "__main__":
    main()
