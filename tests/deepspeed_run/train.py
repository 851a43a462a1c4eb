"""What each rank of `test_run.py` runs: TRL with G2RL, under DeepSpeed on CPUs where there is a stage.

torchrun --nproc-per-node 2 train.py MODEL OUTPUT STAGE [OPTION=VALUE ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM

from g2rl.integrations.trl import G2RLConfig, G2RLTrainer
from tests.integrations.recorded import vowels

# DeepSpeed would compile it for several ranks of a CPU; gloo serves as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# accelerate starts DeepSpeed on accelerators only.
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


class Recording(G2RLTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounds: list[dict[str, torch.Tensor]] = []

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        self.rounds.append({"rewards": rewards, "features": self._rollout.features})
        return rewards


def config_of(stage: int) -> dict[str, Any] | None:
    if stage == 0:
        return None
    return {
        # By default parameters as small as these would stay whole.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def double_logits() -> None:
    """Have logits that are not those of the head's weight."""
    forward = LlamaForCausalLM.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    LlamaForCausalLM.forward = doubled


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A copy. On CPUs DeepSpeed's own `GatheredParameters` now and then gives memory that is not filled yet."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    parts = [torch.empty_like(parameter.ds_tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, parameter.ds_tensor)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)


def main() -> None:
    model, output, stage = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    options = {key: json.loads(value) for key, value in (item.split("=", 1) for item in sys.argv[4:])}
    if options.pop("doubled", False):
        double_logits()
    adapter = options.pop("adapter", None)
    config = G2RLConfig(
        output_dir=str(output),
        reward_range=[0, 1],
        deepspeed=config_of(stage),
        bf16=False,
        per_device_train_batch_size=4,
        num_generations=8,  # a group spans both ranks
        max_completion_length=12,
        max_steps=3,
        learning_rate=1e-2,
        optim="sgd",  # Adam would make much of the rounding of gradients near zero
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        **{"gradient_checkpointing": False, **options},
    )
    prompts = Dataset.from_dict({"prompt": [f"{i}+3=" for i in range(16)]})
    peft_config = None if adapter is None else LoraConfig(**adapter)
    trainer = Recording(model, vowels, args=config, train_dataset=prompts, peft_config=peft_config)
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    head = trained.get_output_embeddings().weight
    saved = {"rounds": trainer.rounds, "head in parts": head.numel() == 0}
    trains = [(name, parameter) for name, parameter in trained.named_parameters() if parameter.requires_grad]
    saved["weights"] = {name: whole(parameter) for name, parameter in trains}
    torch.save(saved, output / f"stage{stage}-rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
