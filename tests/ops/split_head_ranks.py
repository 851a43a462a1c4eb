"""What each rank of test_split_head.py runs; all that it finds is saved for the parent to check.

python -m tests.ops.split_head_ranks RANK RANKS FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from g2rl_kernels import LMHead, sequence_features, token_logprobs, use_backend
from g2rl_kernels.distributed import all_reduce
from g2rl_kernels.testing import OPTIONS, SMALL, HeadSample, Shape, head_sample
from tests.ops.head_cases import upstream

BACKENDS = ("native", "torch")


class Case(NamedTuple):
    """A head to be split, and how; see `testing.head_sample`."""

    dtype: torch.dtype = torch.float32
    kind: str = "random"
    options: str = "plain"
    lse: bool = False
    shape: Shape = SMALL


CASES = {
    "plain": Case(),
    "peaked": Case(kind="peaked", options="softcap"),
    "bf16": Case(torch.bfloat16, "peaked", "together"),
    "fp16": Case(torch.float16, "random", "bias", lse=True),
    "edges": Case(),
    "large": Case(kind="bias-", options="bias"),
    "no-responses": Case(shape=Shape((), 16, 64, "")),
    "no-tokens": Case(shape=Shape((0,), 16, 64, "")),
}


def first_words(V: int, ranks: int) -> list[int]:
    """Of uneven parts, and V."""
    return [0, 1 + V // 3, V] if ranks == 2 else [0, V // 3, V // 3 + V // 8, V]


def sample(name: str, ranks: int) -> HeadSample:
    """No target is in the last part, but of peaked samples, and of "edges": first and last words of parts."""
    case = CASES[name]
    s = head_sample(case.shape, case.dtype, kind=case.kind, options=OPTIONS[case.options])
    words = torch.tensor(first_words(case.shape.V, ranks))
    if name == "edges":
        edges = torch.cat((words[:-1], words[1:] - 1))
        return replace(s, targets=edges[s.targets % len(edges)])
    return s if case.kind == "peaked" else replace(s, targets=s.targets % words[-2])


def leaf(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().clone().requires_grad_()


def part_of_head(s: HeadSample, rank: int, ranks: int, **changes: Any) -> LMHead:
    words = first_words(s.head.weight.shape[0], ranks)
    mine = slice(words[rank], words[rank + 1])
    bias = None if s.head.bias is None else leaf(s.head.bias[mine])
    return replace(s.head, weight=leaf(s.head.weight[mine]), bias=bias, process_group=dist.group.WORLD, **changes)


def forward_and_backward(s: HeadSample, head: LMHead, lse: Tensor | None = None) -> dict[str, Tensor]:
    """Results and gradients, by name."""
    hidden = leaf(s.hidden)
    out = sequence_features(hidden, head, s.targets, s.cu_seqlens, s.token_weights, lse)
    torch.autograd.backward((out.logps, out.entropy), upstream(s))
    found = {"grad_hidden": hidden.grad, "grad_weight": head.weight.grad}
    if head.bias is not None:
        found["grad_bias"] = head.bias.grad
    return found | {name: x.detach() for name, x in out._asdict().items()}


def split(rank: int, ranks: int) -> dict[str, Any]:
    """Each case on each backend; the same with hidden's gradient as shares; log-probabilities alone."""
    found = {}
    for backend in BACKENDS:
        for name, case in CASES.items():
            s = sample(name, ranks)
            with use_backend(backend):
                lse = torch.linspace(-1, 1, case.shape.N) if case.lse else None
                head = part_of_head(s, rank, ranks)
                of_case = forward_and_backward(s, head, lse)
                of_case["alone"] = token_logprobs(s.hidden, head, s.targets)
                shares = forward_and_backward(s, part_of_head(s, rank, ranks, allreduce_dgrad=False))
            found |= {f"{backend}-{name}": of_case, f"{backend}-{name}-shares": shares}
    return found


def reversed_parts(rank: int, ranks: int) -> dict[str, Tensor]:
    """The last rank has the first words, and says so."""
    s = sample("plain", ranks)
    words = first_words(SMALL.V, ranks)
    mine = ranks - 1 - rank
    weight = leaf(s.head.weight[words[mine] : words[mine + 1]])
    return forward_and_backward(s, LMHead(weight, process_group=dist.group.WORLD, vocab_start=words[mine]))


class _SumOverRanks(torch.autograd.Function):
    """What follows an embedding that is split as the head is: shares are summed, and each gets the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce(x, dist.group.WORLD.group_name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def loss_of_tied(weight: Tensor, embedded: Callable[[Tensor], Tensor], head: LMHead | Tensor, s: HeadSample) -> Tensor:
    ids = s.targets.roll(1)
    out = token_logprobs(torch.tanh(embedded(ids)), head, s.targets)
    return out.logps.sum() - 0.3 * out.entropy.sum()


def tied(rank: int, ranks: int) -> dict[str, Tensor]:
    """The weight that embeds tokens, too; once whole, once split."""
    s = sample("plain", ranks)
    whole = leaf(s.head.weight)
    loss_of_tied(whole, lambda ids: F.embedding(ids, whole), whole, s).backward()
    head = part_of_head(s, rank, ranks)

    def embedded(ids: Tensor) -> Tensor:
        local = ids - head.part.start
        inside = (local >= 0) & (local < head.weight.shape[0])
        return _SumOverRanks.apply(F.embedding(local.where(inside, 0), head.weight) * inside[:, None])

    loss_of_tied(head.weight, embedded, head, s).backward()
    return {"whole": whole.grad, "part": head.weight.grad}


def dtensors(rank: int, ranks: int) -> dict[str, Tensor]:
    """A DTensor's own, uneven parts; gradients are DTensors. One that is replicated is whole."""
    s = sample("large", ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    weight, bias = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (s.head.weight, s.head.bias))
    assert LMHead(distribute_tensor(s.head.weight, mesh)).part is None
    found = forward_and_backward(s, LMHead(weight, bias))
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in found.items()}


def fsdp(rank: int, ranks: int) -> dict[str, Tensor]:
    """FSDP2's weight outside of its module's forward pass: by parts for equal tokens, gathered for each rank's own."""
    s = sample("plain", ranks)
    module = nn.Linear(SMALL.d, SMALL.V, bias=False)
    module.weight.data.copy_(s.head.weight)
    fully_shard(module)
    found = {"by-parts": forward_and_backward(s, LMHead(module.weight))["grad_weight"].full_tensor()}
    module.weight.grad = None
    own, bias = replace(s, targets=s.targets.roll(rank)), torch.linspace(-1, 1, SMALL.V)
    out = forward_and_backward(own, LMHead(module.weight, bias, gather_weight=True))
    found |= {"features": out["features"], "gathered": out["grad_weight"].full_tensor()}
    whole = forward_and_backward(s, LMHead(leaf(s.head.weight)))
    alone = forward_and_backward(own, LMHead(leaf(s.head.weight), bias))
    return found | {
        "whole": whole["grad_weight"],
        "own": alone["grad_weight"],
        "own-features": alone["features"],
    }


def context(rank: int, ranks: int) -> dict[str, Any]:
    """Tokens dealt out to ranks: each has some, or none, of each response."""
    s = sample("bf16", ranks)
    mine = torch.arange(SMALL.N) % ranks == rank
    cu_seqlens = F.pad(mine.cumsum(0), (1, 0))[s.cu_seqlens.long()]
    inputs = s.hidden[mine], s.targets[mine], cu_seqlens
    world = dist.group.WORLD
    weighted = sequence_features(inputs[0], s.head, *inputs[1:], s.token_weights[mine], context_group=world)
    plain = sequence_features(inputs[0], s.head, *inputs[1:], context_group=world)
    return {"weighted": weighted.features, "plain": plain.features}


def compiled(rank: int, ranks: int) -> list[tuple[Tensor, ...]]:
    """One graph, collectives included, for two batches: what eager gives for each, and then what the graph does."""
    found = []
    head = part_of_head(sample("plain", ranks), rank, ranks)

    def step(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor]:
        out = sequence_features(hidden * 2, head, targets, cu_seqlens, token_weights, context_group=dist.group.WORLD)
        return out.logps.sum() - out.entropy.sum(), out.features

    fast = torch.compile(step, fullgraph=True, backend="aot_eager_decomp_partition", dynamic=True)
    for lengths in ((3, 0, 4), (9, 2)):
        s = head_sample(Shape(lengths, SMALL.d, SMALL.V, ""))
        for run in (step, fast):
            hidden, head.weight.grad = leaf(s.hidden), None
            loss, features = run(hidden, s.targets, s.cu_seqlens, s.token_weights)
            loss.backward()
            found.append((loss.detach(), features, hidden.grad, head.weight.grad))
    return found


def refused(rank: int, ranks: int) -> dict[str, str]:
    """What ranks say of bad input."""
    world, weight = dist.group.WORLD, torch.zeros(4 + rank, 3)
    mesh = init_device_mesh("cpu", (ranks,))
    columns, rows = (distribute_tensor(torch.zeros(9, 4), mesh, [Shard(dim)]) for dim in (1, 0))
    head = LMHead(weight, process_group=world)

    def call(n: int = 2, targets: tuple[int, ...] = (0, 8), **more: Any) -> Any:
        return token_logprobs(torch.zeros(n, 3, **more), head, torch.tensor(targets))

    def features(B: int, head: LMHead | Tensor = head, **more: Any) -> Any:
        cu_seqlens = torch.tensor([0, 2] if B == 1 else [0, 1, 2])
        return sequence_features(torch.zeros(2, 3), head, torch.tensor([0, 1]), cu_seqlens, **more)

    def with_backend(name: str, function: Callable[[], Any]) -> Any:
        with use_backend(name):
            return function()

    attempts: dict[str, Callable[[], Any]] = {
        "gap": lambda: LMHead(weight, process_group=world, vocab_start=5 * rank),
        "overlap": lambda: LMHead(weight, process_group=world, vocab_start=3 * rank),
        "one start": lambda: LMHead(weight, process_group=world, vocab_start=4 if rank else None),
        "d": lambda: LMHead(torch.zeros(4, 3 + rank), process_group=world),
        "bias": lambda: LMHead(weight, torch.zeros(5) if rank else None, process_group=world),
        "temperature": lambda: LMHead(weight, temperature=1.0 + rank / 10, process_group=world),
        "device": lambda: LMHead(weight, process_group=dist.new_group(backend="cuda:gloo")),
        "N": lambda: call(2 + rank, (0, 1, 2)[: 2 + rank]),
        "targets": lambda: call(2, (0, 1 + rank)),
        "beyond": lambda: call(2, (0, 9)),
        "B": lambda: features(2 if rank else 1),
        "context": lambda: features(2 if rank else 1, head=torch.zeros(4, 3), context_group=world),
        "backend": lambda: with_backend("torch" if rank else "reference", call),
        "columns": lambda: LMHead(columns),
        "start": lambda: LMHead(rows, vocab_start=5 * rank, gather_weight=True),
        "short bias": lambda: LMHead(rows, torch.zeros(5 - rank), gather_weight=True),
        "two groups": lambda: LMHead(rows, process_group=world),
        "hidden": lambda: token_logprobs(
            distribute_tensor(torch.zeros(2, 4), mesh), LMHead(rows), torch.zeros(2).long()
        ),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            found[name] = f"passed: {attempt()}"
        except (TypeError, ValueError, IndexError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


ON_ANY_RANKS = (split, reversed_parts, tied, dtensors, fsdp, context)
ON_TWO_RANKS = (*ON_ANY_RANKS, compiled, refused)


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=2))
    found = {run.__name__: run(rank, ranks) for run in (ON_TWO_RANKS if ranks == 2 else ON_ANY_RANKS)}
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
