"""One small ragged call of every op on a GPU, forward and backward, for tools that watch every access.

    compute-sanitizer --tool memcheck python -m benchmarks.once --backend cuda

Results are held to the numerics contract.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.arguments import need_gpu
from benchmarks.candidates.lineup import BACKEND_NAMES
from g2rl_kernels import g2rl_advantages, sequence_features, testing, token_logprobs, use_backend
from g2rl_kernels.plans import backward


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.once", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", required=True, choices=BACKEND_NAMES)
    parser.add_argument("--no-cublas", action="store_true", help="products of the backward pass by other kernels")
    arguments = parser.parse_args()
    need_gpu(parser)
    if arguments.no_cublas:
        backward.mm, backward.mm_rounded = _mm, _mm_rounded
    shape = testing.Shape((130, 0, 1, 37, 129), 136, 1105, "responses end on and off tiles of 64, 128 and 192")
    for dtype in (torch.bfloat16, torch.float32):
        options = testing.Options(softcap=20.0, bias="weight")
        s = testing.head_sample(shape, dtype, "cuda", options=options)
        expected = testing.oracle(s)
        s.hidden.requires_grad_()
        with use_backend(arguments.backend):
            for lse in (None, expected.lse.float()):
                for workspace_bytes in (None, 1 << 20):
                    out = sequence_features(
                        s.hidden, s.head, s.targets, s.cu_seqlens, s.token_weights, lse, workspace_bytes=workspace_bytes
                    )
                    testing.assert_bounds(out, expected, s.cu_seqlens)
            logps, entropy, _ = token_logprobs(s.hidden, s.head, s.targets)
            (logps.sum() + entropy.sum()).backward()
            result = g2rl_advantages(out.features[[0, 2, 3, 4]], torch.rand(4, device="cuda"), 2)
        torch.cuda.synchronize()
        assert s.hidden.grad is not None and bool(s.hidden.grad.isfinite().all())
        assert bool(result.advantages.isfinite().all())
        print(f"{arguments.backend}, {dtype}: ok")


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Racecheck ends in a failure of its own inside the kernel that cuBLAS takes for this."""
    return (a.float()[:, :, None] * b.float()).sum(1)


def _mm_rounded(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(_mm(a, b))


if __name__ == "__main__":
    main()
