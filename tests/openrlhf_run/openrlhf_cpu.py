"""OpenRLHF on a CPU: float32, attention of packed sequences, and a record of what each step trains on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import deepspeed
import flash_attn
import openrlhf.utils.utils
import torch
import transformers.modeling_utils
from openrlhf.trainer.ray.launcher import RayActorGroup
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from vllm import RECORDS


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of DeepSpeed's configuration, where OpenRLHF asks for half precision and an Adam that is compiled."""

    def called(*args: Any, **kwargs: Any) -> Any:
        for config in (*args, *kwargs.values()):
            if isinstance(config, dict) and "bf16" in config:
                config["bf16"]["enabled"] = False
                config.get("optimizer", {}).get("params", {})["torch_adam"] = True
        return function(*args, **kwargs)

    return called


openrlhf.utils.utils.convert_to_torch_dtype = lambda _: torch.float32
deepspeed.initialize = in_float32(deepspeed.initialize)
HfDeepSpeedConfig.__init__ = in_float32(HfDeepSpeedConfig.__init__)
# Compiled too, for more ranks than one. A compilation that is stopped leaves a lock that the next run would wait for.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **kwargs: Any) -> Any:
    """Of packed sequences, whose parts may be on the ranks of a ring."""
    positions = mine = kwargs["position_ids"][0]
    start = 0
    ring = flash_attn.ring
    if ring is not None:
        k, v = (flash_attn.all_gather(x.transpose(0, 2), ring).transpose(0, 2) for x in (k, v))
        positions, start = flash_attn.all_gather(mine, ring), ring.rank() * len(mine)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    sequence, row = (positions == 0).cumsum(0), torch.arange(len(positions))
    own = slice(start, start + len(mine))
    sees = (sequence[own, None] == sequence) & (row[own, None] >= row)
    weights = (q @ k.mT * scaling).masked_fill(~sees, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2), None


# With packing OpenRLHF takes no attention but one with this in its name, which transformers then looks for elsewhere.
transformers.modeling_utils.lazy_import_flash_attention = lambda *_, **__: None
AttentionInterface.register("cpu_flash_attention", attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("cpu_flash_attention", lambda *_, **__: None)

run_method_batch, trained = RayActorGroup.async_run_method_batch, count(1)


def recorded(group: Any, method_name: str, **batch: Any) -> Any:
    """The trainer's call of the policy's workers; with `append` it hands them what they train on."""
    if method_name == "append":
        names = ("sequences", "attention_mask", "action_mask", "rewards", "advantages", "prompts", "info")
        rows = [{name: getattr(experience, name) for name in names} for experience in batch["experience"]]
        torch.save(rows, RECORDS / f"experiences-{next(trained)}.pt")
    return run_method_batch(group, method_name, **batch)


RayActorGroup.async_run_method_batch = recorded
