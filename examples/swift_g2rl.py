"""G2RL in ms-swift's GRPO, by one option; SHAPING and REWARD_RANGE are to be set in a copy of this file.

    swift rlhf --rlhf_type grpo --external_plugins examples/swift_g2rl.py --reward_funcs accuracy ...

ms-swift runs a pass for old log-probabilities in any case, and features ride on it. What a response gains or loses is a
reward of its own, ``g2rl_bonus``, in metrics and tables.
"""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather
from swift.rlhf_trainers import GRPOTrainer
from swift.trainers import TrainerFactory
from swift.utils import get_logger
from transformers.integrations import is_deepspeed_zero3_enabled

from g2rl.heads import head_difference
from g2rl.integrations.exploration import Once, shape_in_range
from g2rl.integrations.head_pass import HeadPass, causal_lm_inside, join, run_alongside
from g2rl.reward_range import range_left
from g2rl_kernels import Shaping

SHAPING = Shaping()
REWARD_RANGE = (0.0, 1.0)  # lowest and highest weighted sum of the reward functions
BONUS = "g2rl_bonus"


class G2RLTrainer(GRPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        in_parts = self.template.sequence_parallel_size > 1
        if in_parts or self.enable_server_multi_turn or self.scale_rewards == "gdpo":
            raise ValueError(
                "G2RL: expected no sequence_parallel_size above 1, multi-turn rollout server, nor "
                "scale_rewards='gdpo', found one of them"
            )
        self._check_head()
        self._head_in_parts = is_deepspeed_zero3_enabled()
        self._warn = Once(get_logger())

    def _check_head(self) -> None:
        if difference := head_difference(causal_lm_inside(self.model)):
            raise ValueError(f"G2RL: expected a model with a head that it serves, but {difference}")

    def _prepare_batch_inputs(self, samples: list[Any]) -> list[dict[str, Any]]:
        if self._head_in_parts:  # of a model that runs since training began
            self._check_head()
            self._head_in_parts = False
        self._features: list[torch.Tensor] = []
        return super()._prepare_batch_inputs(samples)

    def _get_per_token_logps_and_entropies(
        self, model: Any, model_inputs: dict[str, Any], grpo_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        call = super()._get_per_token_logps_and_entropies
        if grpo_batch.old_per_token_logps is not None or not self.model.training:
            return call(model, model_inputs, grpo_batch, *args, **kwargs)
        ids, mask, cu_seqlens = model_inputs["input_ids"], grpo_batch.completion_mask.bool(), None
        if self.template.padding_free:  # one row, of whose end each sequence has a part that the mask is of
            positions = model_inputs.get("text_position_ids", model_inputs["position_ids"]).flatten()
            cu_seqlens = F.pad((positions == 0).nonzero()[:, 0], (0, 1), value=len(positions))
            lengths = grpo_batch.seq_lengths.tolist()
            mask = torch.cat([row[len(row) - n :] for row, n in zip(mask, lengths, strict=True)])[None]
        scored = F.pad(mask, (ids.shape[1] - mask.shape[1], 0))
        head_pass = HeadPass(ids, scored, scored.float(), self.temperature, cu_seqlens=cu_seqlens)
        with run_alongside(causal_lm_inside(self.model), head_pass) as outputs:
            result = call(model, model_inputs, grpo_batch, *args, **kwargs)
        self._features.append(join(outputs).features)
        return result

    def _compute_advantages(self, samples: list[Any], rewards_per_func: torch.Tensor, *args: Any) -> torch.Tensor:
        names, weights = self.reward_func_names, self.reward_weights
        bonus = torch.zeros_like(rewards_per_func[:, :1])
        if self.model.training:
            scored = ~rewards_per_func.isnan().all(1)
            raw = (rewards_per_func * weights).nansum(1).where(scored, REWARD_RANGE[0])
            if left := range_left(raw[scored], REWARD_RANGE):
                self._warn(f"G2RL: {left}")
            features = gather(torch.cat(self._features))
            shaped, metrics = shape_in_range(features, raw, self.num_generations, SHAPING, REWARD_RANGE, scored)
            bonus = (shaped - raw).where(scored, torch.nan)[:, None]
            for name, value in metrics.items():
                self._metrics["train"][f"g2rl/{name}"].append(value)
        self.reward_func_names, self.reward_weights = [*names, BONUS], torch.cat([weights, weights.new_ones(1)])
        try:
            return super()._compute_advantages(samples, torch.cat([rewards_per_func, bonus], 1), *args)
        finally:
            self.reward_func_names, self.reward_weights = names, weights


TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.{G2RLTrainer.__name__}"
