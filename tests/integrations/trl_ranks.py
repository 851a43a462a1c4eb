"""What each rank of `test_trl_ranks.py` runs, all of it saved for the parent to check: two short trainings, TRL's own
and G2RL without strength, whose weights must agree; one with strength; heads, and head passes, of models sharded by
FSDP2. Where the options have a `beta`, the KL term's model is sharded by FSDP version 1.

    torchrun --nproc-per-node 2 -m tests.integrations.trl_ranks MODEL OUTPUT [OPTION=VALUE ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from datasets import Dataset
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from g2rl.heads import lm_head, whole
from g2rl.integrations.head_pass import HeadPass, add_head_pass, run_head_pass
from g2rl.integrations.trl import G2RLConfig, G2RLTrainer
from g2rl_kernels import token_logprobs
from tests.integrations.test_trl import RecordingGRPO, trainer

# The second policy is accelerate's for bf16.
PRECISIONS = (
    (torch.float32, MixedPrecisionPolicy()),
    (torch.bfloat16, MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)),
)


def weights(run: Any) -> torch.Tensor:
    return torch.cat([whole(p.detach()).flatten() for p in run.accelerator.unwrap_model(run.model).parameters()])


def sharding_error(folder: Path, dtype: torch.dtype, policy: MixedPrecisionPolicy) -> float:
    """How far log-probabilities, features and gradients of a sharded model are from those of a whole one, relative.

    Args:
        dtype: of the whole model's weights; policy: of the sharded one, whose own are fp32.
    """
    found = []
    for sharded in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if sharded else dtype)
        add_head_pass(model)
        if sharded:
            for layer in model.model.layers:
                fully_shard(layer, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
        ids = torch.arange(60).view(3, 20) % 77
        scored = (torch.arange(20) > 4).expand(3, 20)
        out = run_head_pass(model, HeadPass(ids, scored, scored.float(), 0.8))
        assert all(tensor.dtype == torch.float32 for tensor in out)
        (out.logps.sum() + out.entropy.sum()).backward()
        gradients = [whole(p.grad) for p in model.parameters()]
        found.append(torch.cat([t.detach().flatten() for t in (*out, *gradients)]))
    return float((found[0] - found[1]).norm() / found[0].norm())


def gathering_error(folder: Path) -> float:
    """The same of gradients with the head outside of the model's forward pass, each rank with tokens of its own."""
    ids = (torch.arange(60).view(3, 20) + dist.get_rank()) % 77
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, tie_word_embeddings=False))
        if sharded:
            fully_shard(model.model)
            fully_shard(model)
        hidden = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
        token_logprobs(hidden, lm_head(model, 0.8, hidden.dtype), ids[:, 1:].flatten()).logps.sum().backward()
        if not sharded:
            for p in model.parameters():
                dist.all_reduce(p.grad, dist.ReduceOp.SUM)
                p.grad /= dist.get_world_size()
        found.append(torch.cat([whole(p.grad).flatten() for p in model.parameters()]))
    return float((found[0] - found[1]).norm() / found[0].norm())


def shard_references() -> None:
    """Have references wrapped as `trl.models.prepare_fsdp` does it: before a subclass of the trainer sees them."""
    prepare = Accelerator.prepare_model

    def prepare_model(self: Any, model: Any, *args: Any, evaluation_mode: bool = False, **more: Any) -> Any:
        if not evaluation_mode:
            return prepare(self, model, *args, **more)
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True).eval()

    Accelerator.prepare_model = prepare_model


def main() -> None:
    shard_references()
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    options = {key: json.loads(value) for key, value in (item.split("=", 1) for item in sys.argv[3:])}
    prompts = Dataset.from_dict({"prompt": ["2 + 2 = ", "a", "what is it? ", "one two"] * 4})

    def train(cls: type, config: type, **more: Any) -> Any:
        run = trainer(cls, config, folder, str(folder), prompts, output, **{**options, **more})
        run.train()
        return run

    ours, theirs = weights(train(G2RLTrainer, G2RLConfig, strength=0.0)), weights(train(GRPOTrainer, GRPOConfig))
    run = train(RecordingGRPO, G2RLConfig)
    saved = {
        "sharding_errors": [sharding_error(folder, *precision) for precision in PRECISIONS],
        "gathering_error": gathering_error(folder),
        "error": float((ours - theirs).norm() / theirs.norm()),
        "rounds": [
            {
                "state": {key: whole(value) for key, value in played.model.state_dict().items()},
                "output": played.output,
                "rewards": played.rewards,
                "features": played.features,
            }
            for played in run.rounds
        ],
    }
    torch.save(saved, output / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
