"""The processes of a run as the trainer sees them: shares of the work, and what is put together again.

A rank is one process. Groups are whole on a rank, so that no method knows of ranks; what crosses between them is
records of responses, a few numbers, results of groups, features [B, d], and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist

from g2rl.config import Config, ConfigError

T = TypeVar("T")
P = ParamSpec("P")

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others, whose responses may be longer. Ranks that are gone are noticed otherwise."""


class Silence:
    """Takes the place of logs and displays on all ranks but the first: does nothing, whatever is asked."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Ranks:
    """All processes of a run, seen from one of them.

    Args:
        rank, size: this process, of how many.
        sharded: whether the weights are split over ranks (`parallel.strategy=fsdp2`) or repeated on each.
        group: PyTorch's process group that objects go by; None for the default one.
    """

    def __init__(self, rank: int = 0, size: int = 1, sharded: bool = False, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self.sharded = sharded
        self._group = group

    def apart(self) -> Ranks:
        """The same ranks for another thread, which may gather objects while this one is at work."""
        group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.size > 1 else None
        return Ranks(self.rank, self.size, self.sharded, group)

    def __str__(self) -> str:
        return f"{self.size} x {'fsdp2' if self.sharded else 'ddp'}"

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def check(self, config: Config) -> None:
        """Raise `ConfigError` unless these ranks can share the run's work."""
        if config.parallel.strategy == "fsdp2" and not self.sharded:
            what = f"resume={config.resume}" if config.resume else "CONFIG"
            raise ConfigError(
                "parallel.strategy: expected ddp in a process of its own, found fsdp2, which needs a launcher: "
                f"torchrun --nproc-per-node=K -m g2rl train {what}"
            )
        parts = config.objective.mini_batches * self.size
        if config.rollout.prompts % parts:
            raise ConfigError(
                f"rollout.prompts: expected a multiple of {parts}, {self.size} ranks with whole groups in each of "
                f"{config.objective.mini_batches} mini-batches, found {config.rollout.prompts}"
            )

    # ---- work ----------------------------------------------------------------------------------------------------

    def share(self, count: int) -> range:
        """This rank's part of `count` things: the shares of ranks 0, 1, ... make them up in order."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gathered(self, own: Sequence[T]) -> list[T]:
        """Everybody's things in the order of ranks."""
        parts = [own] if self.size == 1 else gather_objects(own, self._group)
        return [item for part in parts for item in part]

    def rows(self, own: torch.Tensor) -> torch.Tensor:
        """[size * n, ...] of every rank's [n, ...], in the order of ranks."""
        if self.size == 1 or own.numel() == 0:
            return own
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    def summed(self, *own: int) -> list[int]:
        """Each number's sum over ranks."""
        return [sum(column) for column in zip(*self.gathered([own]), strict=True)]

    def any(self, own: Any) -> bool:
        """Whether it is true on some rank."""
        return any(self.gathered([bool(own)]))

    def behind(self, passes: int) -> int:
        """How many more passes another rank needs. Split weights come together by passes that all ranks make."""
        return max(self.gathered([passes])) - passes if self.sharded else 0

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over ranks; those of split weights are summed by the backward pass."""
        if self.size == 1 or self.sharded:
            return
        waiting = []
        for parameter in parameters:
            if parameter.requires_grad:
                if parameter.grad is None:  # a part of the model that only others used
                    parameter.grad = torch.zeros_like(parameter)
                waiting.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            work.wait()

    def wait(self) -> None:
        """Until all ranks are here."""
        self.gathered([None])

    def on_first(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `make` makes on the first rank, and on others something that does nothing."""
        return make(*args, **kwargs) if self.first else cast(T, Silence())


ALONE = Ranks()
"""One process, all of the run."""


def gather_objects(own: Any, group: Any = None) -> list[Any]:
    """Everybody's object, by rank; on CPUs, so that a rank that is gone is noticed at once."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own, group)
    return found
