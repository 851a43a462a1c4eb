"""Ranks that share a head or a response: every collective of the package, and what ranks have to agree on.

Groups go by name, so that `torch.compile` traces these collectives (PyTorch's functional ones) like any other op.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from g2rl_kernels.checks import is_dtensor

if dist.is_available():  # not in every build of PyTorch
    import torch.distributed._functional_collectives  # registers what the compiler needs to know of them

_COLLECTIVES = torch.ops._c10d_functional
Values = Mapping[str, float | Tensor]


@dataclass(frozen=True)
class VocabularyPart:
    """The words that a rank holds.

    Attributes:
        group: its name.
        ranks: that hold a part each.
        start: the part's first word.
        vocab_size: words of all parts.
    """

    group: str
    ranks: int
    start: int
    vocab_size: int


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over ranks."""
    return _COLLECTIVES.wait_tensor(_COLLECTIVES.all_reduce(x.contiguous(), "sum", group))


def all_gather(x: Tensor, ranks: int, group: str) -> Tensor:
    """[ranks, *x.shape]"""
    gathered = _COLLECTIVES.all_gather_into_tensor(x.contiguous()[None], ranks, group)
    return _COLLECTIVES.wait_tensor(gathered)


def gather_sums(sums: Tensor, part: VocabularyPart) -> Tensor:
    """[4, N] of each part -> [4, ranks, N] of all.

    Gathered, not reduced: a maximum and sums relative to it are no operation that collectives have, and joined in the
    order of ranks they have the same bits on each, whatever else is in the batch.
    """
    return all_gather(sums, part.ranks, part.group).transpose(0, 1).contiguous()


def local_targets(targets: Tensor, start: int, words: int) -> Tensor:
    """Targets [N] counted from a part's first word; -1 in other parts."""
    local = targets - start
    return torch.where((local >= 0) & (local < words), local, -1)


def sum_features(features: Tensor, weights: Tensor, group: str) -> Tensor:
    """Phi [B, d] of responses whose tokens are split over ranks, from each rank's Phi and its sum of a_t, [B]."""
    total = all_reduce(torch.cat((features * weights[:, None], weights[:, None]), 1), group)
    weights = total[:, -1:]
    return torch.where(weights > 0, total[:, :-1] / weights, 0)


# What ranks have to agree on.


def check_group(name: str, group: Any, device: torch.device) -> None:
    """Check that a group can send tensors of this device.

    Raises:
        TypeError: not a process group.
        ValueError: it has no backend for tensors of this device.
    """
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"{name}: expected a torch.distributed.ProcessGroup, found {type(group).__name__}")
    if torch.compiler.is_compiling():  # what follows cannot be traced with PyTorch 2.10
        return
    backends = dist.get_backend_config(group)
    if device.type not in [backend.partition(":")[0] for backend in backends.split(",")]:
        raise ValueError(f"{name}: expected a group for {device.type} tensors, found one for {backends}")


def check_alike(expected: Values, ranks: int, group: str, device: torch.device) -> None:
    """Raise ValueError unless all ranks have the same: collectives would mix their tokens up, or never end.

    `expected` has what to say where ranks differ in a value.
    """
    _compare(_exchange(expected, ranks, group, device))


def join_parts(
    words: int, start: int | None, alike: Values, group: dist.ProcessGroup, device: torch.device
) -> VocabularyPart:
    """The part of `words` words from `start` on; None: that follows those of the ranks before.

    Raises:
        RuntimeError: called in a program under compilation.
        ValueError: parts leave a gap or overlap, or ranks differ in a value of `alike`, see `check_alike`.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("head.process_group: expected construction outside of what torch.compile compiles")
    mine = {"words": words, "start": -1 if start is None else start, **alike}
    found = _exchange(mine, group.size(), group.group_name, device)
    sizes, starts = ([int(x) for x in found.pop(name)] for name in ("words", "start"))
    _compare(found)
    if start is None:
        starts = [sum(sizes[:rank]) for rank in range(group.size())]
    parts = sorted(zip(starts, sizes, strict=True))
    if any(begin != sum(size for _, size in parts[:i]) for i, (begin, _) in enumerate(parts)):
        of_ranks = ", ".join(f"{begin} to {begin + size}" for begin, size in zip(starts, sizes, strict=True))
        raise ValueError(f"head.vocab_start: expected parts that join up from word 0 on, found {of_ranks}")
    return VocabularyPart(group.group_name, group.size(), starts[group.rank()], sum(sizes))


def _compare(found: dict[str, list[float]]) -> None:
    for expected, of_ranks in found.items():
        if min(of_ranks) != max(of_ranks):
            raise ValueError(f"{expected}, found {min(of_ranks):g} and {max(of_ranks):g}")


def _exchange(values: Values, ranks: int, group: str, device: torch.device) -> dict[str, list[float]]:
    """What each rank has of each value."""
    mine = torch.stack([torch.as_tensor(x).to("cpu", torch.float64) for x in values.values()])
    # As bits: not every device has float64.
    found = all_gather(mine.view(torch.int64).to(device), ranks, group).cpu().view(torch.float64)
    return dict(zip(values, found.T.tolist(), strict=True))


# DTensors.


def local_part(x: Tensor) -> Tensor:
    """A DTensor's part on this rank, differentiable; other tensors as they are."""
    return x.to_local() if is_dtensor(x) else x  # type: ignore[attr-defined]


def gathered(x: Tensor) -> Tensor:
    """The whole of a DTensor; other tensors as they are.

    Ranks have tokens of their own: the gradient is averaged over them, as FSDP2 does.
    """
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Partial

    return x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)  # type: ignore[attr-defined]


def vocabulary_group(weight: Tensor) -> dist.ProcessGroup | None:
    """The ranks that a DTensor's rows are split over; None for a replicated one.

    Raises:
        ValueError: it is split otherwise, or over more than one dimension of its mesh.
    """
    placements, mesh = weight.placements, weight.device_mesh  # type: ignore[attr-defined]
    split = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(split) > 1 or not all(placements[i].is_shard(0) for i in split):
        raise ValueError(f"head.weight: expected a DTensor sharded once, on dimension 0, found {tuple(placements)}")
    return mesh.get_group(split[0]) if split else None
