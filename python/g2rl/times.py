"""Where a step's seconds go."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from g2rl.devices import synchronize


class StageTimes:
    """Seconds by stage of one step."""

    def __init__(self, device: torch.device, fine: bool) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device
        self.fine = fine

    @contextmanager
    def stage(self, name: str, fine: bool = False) -> Iterator[None]:
        """Time a block; `fine` stages, inside others, only when profiling, since an accelerator must be waited for."""
        if fine and not self.fine:
            yield
            return
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[f"time/{name}"] += time.perf_counter() - start
