"""A reward function, and a record of what ms-swift's trainer makes of it; loaded after examples/swift_g2rl.py."""

from __future__ import annotations

import atexit
import importlib
import os
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from swift.arguments.sft_args import SftArguments
from swift.rewards import ORM, orms
from swift.sequence_parallel import sequence_parallel
from swift.trainers import TrainerFactory
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
        inputs, mask = batch["model_inputs"], batch["grpo_batch"].completion_mask.bool()
        if self.template.padding_free:
            positions = inputs["position_ids"][0]
            cuts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
            ids = [inputs["input_ids"][0, start:end] for start, end in pairwise(cuts)]
            # A mask ends where its sequence does; the first one has lost its beginning, a part of the prompt.
            rows += [
                (i, torch.nn.functional.pad(m, (max(0, len(i) - len(m)), 0))[-len(i) :])
                for i, m in zip(ids, mask, strict=True)
            ]
            continue
        ids, present = inputs["input_ids"], inputs["attention_mask"].bool()
        scored = torch.nn.functional.pad(mask, (ids.shape[1] - mask.shape[1], 0))
        rows += [(i[p], s[p]) for i, p, s in zip(ids, present, scored, strict=True)]
    if (parts := self.template.sequence_parallel_size) > 1:  # the samples of all ranks that have parts of them
        rows = rows[sequence_parallel.sp_rank * len(samples) :][: len(samples)]
        assert parts == sequence_parallel.sp_world_size
    rank = self.accelerator.process_index
    rewards = self._rewards_per_func[rank * len(samples) : (rank + 1) * len(samples), 0]
    advantages = torch.stack([sample.advantages for sample in samples])
    model = self.accelerator.unwrap_model(self.model)
    save(os.environ["RECORDS"], self.state.global_step, rank, model, rows, rewards, advantages)


postprocess, G2RLTrainer._postprocess_batch = G2RLTrainer._postprocess_batch, recorded
orms["vowels"] = Vowels
# Packed rows ask for flash attention, which no CPU has; transformers' own tells sequences apart by their positions.
SftArguments._check_padding_free = lambda self: None


def in_parts() -> bool:
    """Whether ranks have parts of packed rows, of which transformers' attention knows nothing."""
    return sequence_parallel.enabled() and sequence_parallel.padding_free


def masked(*args: Any, **options: Any) -> Any:
    return None if in_parts() else mask(*args, **options)


def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """As flash attention does it: no sequence of a row sees another."""
    if in_parts():
        positions = sequence_parallel.pad(sequence_parallel.real_position_ids, -1)
        number = (positions[0] == 0).cumsum(0)
        mask = (number[:, None] == number).tril()
    return attention(module, query, key, value, mask, **options)


attention, mask = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)
ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa", masked)


@atexit.register
def end() -> None:
    """A process that ends before gloo's threads, or while the other one still talks to it, may abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
