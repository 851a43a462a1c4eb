"""What each rank of test_split_head.py runs; all that it finds is saved for the parent to check.

    python -m tests.ops.split_head_ranks RANK RANKS FOLDER BACKEND[,BACKEND]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from g2rl_kernels import LMHead, sequence_features, token_logprobs, use_backend
from g2rl_kernels.distributed import all_reduce
from g2rl_kernels.testing import OPTIONS, SMALL, HeadSample, Shape, head_sample
from tests.ops.head_cases import upstream

# Whose features of a few words and tokens Triton's interpreter makes in seconds.
TINY = Shape((5, 0, 3), 24, 70, "an empty response; a tile of words and a ragged one")


class Case(NamedTuple):
    """One head, split.

    Attributes:
        words: of the parts' sizes by number of ranks; those of one part have no target.
    """

    shape: Shape = SMALL
    dtype: torch.dtype = torch.float32
    kind: str = "random"
    options: str = "plain"
    lse: bool = False


CASES = {
    **{f"{name}-{kind}": Case(kind=kind, options=name) for name in OPTIONS for kind in ("random", "peaked")},
    **{kind: Case(kind=kind) for kind in ("bias+", "bias-", "hidden+", "hidden-")},
    **{f"together-{dtype}": Case(dtype=getattr(torch, dtype), options="together") for dtype in ("bfloat16", "float16")},
    "peaked-bfloat16": Case(dtype=torch.bfloat16, kind="peaked"),
    "lse": Case(kind="peaked", options="together", lse=True),
    "no-responses": Case(Shape((), 16, 64, "")),
    "no-tokens": Case(Shape((0,), 16, 64, "")),
    "two-words": Case(Shape((2, 1), 1, 3, "a word or two for each rank")),
}
TINY_CASES = {
    f"tiny-{options}-{dtype}": Case(TINY, getattr(torch, dtype), "peaked", options)
    for options in ("plain", "together")
    for dtype in ("float32", "float16")
}


def parts(V: int, ranks: int) -> list[int]:
    """First words of uneven parts, and V."""
    return [0, 1 + V // 3, V] if ranks == 2 else [0, V // 3, V // 3 + max(1, V // 8), V]


def sample(case: Case, ranks: int) -> HeadSample:
    """The last part has no targets."""
    s = head_sample(case.shape, case.dtype, kind=case.kind, options=OPTIONS[case.options])
    return s if case.kind == "peaked" else replace(s, targets=s.targets % parts(case.shape.V, ranks)[-2])


def run(case: Case, rank: int, ranks: int) -> dict[str, Tensor]:
    s, words = sample(case, ranks), parts(case.shape.V, ranks)
    of_rank = slice(words[rank], words[rank + 1])
    hidden, weight = s.hidden.clone().requires_grad_(), s.head.weight[of_rank].clone().requires_grad_()
    bias = None if s.head.bias is None else s.head.bias[of_rank].clone().requires_grad_()
    head = LMHead(weight, bias, *s.head.options[:2], s.head.softcap, dist.group.WORLD)
    lse = torch.zeros(case.shape.N) if case.lse else None
    out = sequence_features(hidden, head, s.targets, s.cu_seqlens, s.token_weights, lse)
    torch.autograd.backward((out.logps, out.entropy), upstream(s))
    found = {name: x.detach() for name, x in out._asdict().items()}
    found |= {"hidden": hidden.grad, "weight": weight.grad} | ({} if bias is None else {"bias": bias.grad})
    alone = token_logprobs(s.hidden, replace(head, allreduce_dgrad=False), s.targets)
    assert all(torch.equal(x, y) for x, y in zip(alone, out[1:], strict=True))
    return found


def main() -> None:
    rank, ranks, folder, backends = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4].split(",")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=2))
    found = {}
    for backend in backends:
        for name, case in (CASES if backend in ("native", "torch") else TINY_CASES).items():
            with use_backend(backend):
                found[backend, name] = run(case, rank, ranks)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
