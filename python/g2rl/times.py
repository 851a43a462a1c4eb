"""Where a step's seconds go."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimes:
    """Seconds by stage of one step."""

    def __init__(self, device: torch.device, fine: bool) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device
        self.fine = fine

    @contextmanager
    def stage(self, name: str, fine: bool = False) -> Iterator[None]:
        """Time a block; `fine` stages, inside others, only when profiling, since a GPU must be waited for."""
        if fine and not self.fine:
            yield
            return
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[f"time/{name}"] += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
