"""G2RL in ms-swift's GRPO, by one option; SHAPING and REWARD_RANGE are to be set in a copy of this file.

    swift rlhf --rlhf_type grpo --external_plugins examples/swift_g2rl.py --reward_funcs accuracy ...

ms-swift runs a pass for old log-probabilities in any case, and features ride on it. What a response gains or loses is a
reward of its own, ``g2rl_bonus``, in metrics and tables.
"""

from functools import cached_property
from typing import Any

import torch
from accelerate.utils import gather
from swift.rlhf_trainers import GRPOTrainer
from swift.sequence_parallel import sequence_parallel
from swift.trainers import TrainerFactory
from swift.utils import get_logger
from transformers.integrations import is_deepspeed_zero3_enabled

from g2rl.heads import head_difference
from g2rl.integrations.exploration import Once, shape_in_range
from g2rl.integrations.head_pass import FeaturePass, HeadHook, at_predictors, causal_lm_inside
from g2rl.reward_range import range_left
from g2rl_kernels import Shaping

SHAPING = Shaping()
REWARD_RANGE = (0.0, 1.0)  # lowest and highest weighted sum of the reward functions
BONUS = "g2rl_bonus"


class G2RLTrainer(GRPOTrainer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_parts = self.template.sequence_parallel_size > 1
        refused = {
            "sequence_parallel_size without padding_free, where ms-swift's log-probabilities may be other tokens'": (
                self._in_parts and not self.template.padding_free
            ),
            "ring attention, of a sequence_parallel_size that does not divide the number of key-value heads": (
                self._in_parts and sequence_parallel.rp_world_size > 1
            ),
            "a multi-turn rollout server": self.enable_server_multi_turn,
            "scale_rewards='gdpo'": self.scale_rewards == "gdpo",
        }
        if found := [name for name, asked in refused.items() if asked]:
            raise ValueError(
                f"G2RL: expected none of the options that it does not go with, found {' and '.join(found)}"
            )
        if not is_deepspeed_zero3_enabled():
            with self._disable_sp_context():
                difference = head_difference(causal_lm_inside(self.model))
            if difference:
                raise ValueError(f"G2RL: expected a model with a head that it serves, but {difference}")
        self._warn = Once(get_logger())

    @cached_property
    def _head(self) -> HeadHook:
        # Asked for once training has begun: hooks of what wraps the model then come first.
        return HeadHook(self.model, "ms-swift", "--target_modules")

    def _prepare_batch_inputs(self, samples: list[Any]) -> list[dict[str, Any]]:
        self._features: list[torch.Tensor] = []
        return super()._prepare_batch_inputs(samples)

    def _get_per_token_logps_and_entropies(
        self, model: Any, model_inputs: dict[str, Any], grpo_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        call = super()._get_per_token_logps_and_entropies
        if grpo_batch.old_per_token_logps is not None or not self.model.training:
            return call(model, model_inputs, grpo_batch, *args, **kwargs)
        ids, mask = model_inputs["input_ids"], grpo_batch.completion_mask.bool()
        B = len(mask)
        numbers = torch.arange(1, B + 1, device=mask.device)[:, None] * mask
        response = self._at_predictors(numbers, ids, grpo_batch) - 1
        targets = self._at_logits(ids.roll(-1, dims=1), grpo_batch)
        group = sequence_parallel.sp_group if self._in_parts else None
        done = FeaturePass(response, targets, B, self.temperature, group)
        with self._head.awaiting(done):
            result = call(model, model_inputs, grpo_batch, *args, **kwargs)

        def logps() -> torch.Tensor:
            return self._at_predictors(result[0], ids, grpo_batch)[response >= 0]

        self._features.append(self._head.features(done, logps))
        return result

    def _at_predictors(self, values: torch.Tensor, ids: torch.Tensor, grpo_batch: Any) -> torch.Tensor:
        """Values [B, T] of the responses' tokens at the positions that predict them, of those that have logits here."""
        if self.template.padding_free:  # one row, of whose end each sequence has a part that the values are of
            lengths = grpo_batch.seq_lengths.tolist()
            values = torch.cat([row[len(row) - n :] for row, n in zip(values, lengths, strict=True)])[None]
        return self._at_logits(at_predictors(values, ids.shape[1]), grpo_batch)

    def _at_logits(self, values: torch.Tensor, grpo_batch: Any) -> torch.Tensor:
        """Of values [rows, L] at positions of the model's input those at which this rank computes logits."""
        if self._in_parts:
            return sequence_parallel.split(sequence_parallel.pad(values, 0), dim=1)
        return values[:, -(grpo_batch.logits_to_keep + 1) :] if "logits_to_keep" in self.model_kwarg_keys else values

    def _compute_advantages(self, samples: list[Any], rewards_per_func: torch.Tensor, *args: Any) -> torch.Tensor:
        names, weights = self.reward_func_names, self.reward_weights
        bonus = torch.zeros_like(rewards_per_func[:, :1])
        if self.model.training:
            scored = ~rewards_per_func.isnan().all(1)
            raw = (rewards_per_func * weights).nansum(1).where(scored, REWARD_RANGE[0])
            if left := range_left(raw[scored], REWARD_RANGE):
                self._warn(f"G2RL: {left}")
            features = torch.cat(self._features)
            if self._in_parts:  # of the samples of all ranks that have parts of them, in order
                features = sequence_parallel.split(features, dim=0)
            features = gather(features)
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
