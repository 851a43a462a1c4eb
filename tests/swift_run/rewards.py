"""A reward function, and a record of what ms-swift's trainer makes of it; loaded after examples/swift_g2rl.py."""

from __future__ import annotations

import atexit
import importlib
import os
from typing import Any

import torch
import torch.distributed as dist
from swift.rewards import ORM, orms
from swift.trainers import TrainerFactory

from tests.integrations.recorded import save, vowels

module, name = TrainerFactory.TRAINER_MAPPING["grpo"].rsplit(".", 1)  # as examples/swift_g2rl.py registered it
G2RLTrainer = getattr(importlib.import_module(module), name)


class Vowels(ORM):
    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return vowels(completions)


def recorded(self: Any, samples: list[Any], batches: list[dict[str, Any]]) -> None:
    postprocess(self, samples, batches)
    rows = []
    for batch in batches:
        inputs, mask = batch["model_inputs"], batch["grpo_batch"].completion_mask
        ids, present = inputs["input_ids"], inputs["attention_mask"].bool()
        scored = torch.zeros_like(present)
        scored[:, -mask.shape[1] :] = mask.bool()
        rows += [(i[p], s[p]) for i, p, s in zip(ids, present, scored, strict=True)]
    rank = self.accelerator.process_index
    rewards = self._rewards_per_func[rank * len(samples) : (rank + 1) * len(samples), 0]
    advantages = torch.stack([sample.advantages for sample in samples])
    model = self.accelerator.unwrap_model(self.model)
    save(os.environ["RECORDS"], self.state.global_step, rank, model, rows, rewards, advantages)


postprocess, G2RLTrainer._postprocess_batch = G2RLTrainer._postprocess_batch, recorded
orms["vowels"] = Vowels
# A process that ends before gloo's threads may abort.
atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
