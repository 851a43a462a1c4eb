"""OpenRLHF's Ray actors with features and shaped rewards.

B responses of a micro-batch, L tokens with padding, A of them actions, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
import torch.nn.functional as F
from openrlhf.trainer import ppo_trainer_async
from openrlhf.trainer.ppo_trainer import BasePPOTrainer, PPOTrainer
from openrlhf.trainer.ppo_trainer_async import PPOTrainerAsync, TrainingActor
from openrlhf.trainer.ppo_utils import experience_maker
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
from openrlhf.utils.logging_utils import init_logger
from torch.distributed import ProcessGroup

from g2rl.integrations.exploration import Once, reward_warnings, shape_by_uid
from g2rl.integrations.head_pass import FeaturePass, HeadHook, at_predictors

logger = init_logger(__name__)


def plain(actor_class: Any) -> Any:
    """The class that `ray.remote` was given; what it returns has no subclasses."""
    return actor_class.__ray_metadata__.modified_class.__ray_actor_class__


@dataclass(frozen=True)
class ActionRows:
    """Where a forward pass of OpenRLHF predicts actions.

    Attributes:
        padding_mask: [B, L], of padded sequences.
        packed: whether the model gets them in a row, without padding.
        ring: ranks that have a part of that row each, or None.
    """

    padding_mask: torch.Tensor
    packed: bool
    ring: ProcessGroup | None

    def __call__(self, values: torch.Tensor, fill: int) -> torch.Tensor:
        """Values [B, A] of the last A tokens at the positions of this rank that predict them, and fill at others."""
        rows = at_predictors(values, self.padding_mask.shape[1], fill)
        row = rows[self.padding_mask.bool()] if self.packed else rows.flatten()
        if self.ring is None:
            return row
        size = self.ring.size()
        return F.pad(row, (0, -len(row) % size), value=fill).chunk(size)[self.ring.rank()]


class G2RLPolicyActor(plain(PolicyModelActor)):  # type: ignore[misc]
    """The policy's worker, which keeps the features of its passes for old log-probabilities until they are taken.

    Raises:
        ValueError: an adapter on the head.
        RuntimeError: log-probabilities are not those of the model's head.
    """

    def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> None:
        super().init_model_from_pretrained(*args, **kwargs)
        self._head = HeadHook(self.actor, "OpenRLHF", "--ds.lora.target_modules")
        self._features: list[torch.Tensor] = []

    def forward(
        self, sequences: torch.Tensor, action_mask: torch.Tensor, attention_mask: torch.Tensor, **others: Any
    ) -> torch.Tensor:
        """OpenRLHF's old log-probabilities [B, A]."""
        rows = ActionRows(attention_mask, self.actor.packing_samples, self.strategy.ring_attn_group)
        B, A = action_mask.shape
        response = rows(torch.arange(B)[:, None].where(action_mask.bool(), -1), -1)
        targets = rows(sequences[:, -A:], 0)
        done = FeaturePass(response, targets, B, self.actor.temperature, self.strategy.ring_attn_group)
        with self._head.awaiting(done):
            logps: torch.Tensor = super().forward(sequences, action_mask, attention_mask, **others)
        self._features.append(self._head.features(done, lambda: rows(logps, 0)[response >= 0]).cpu())
        return logps

    def take_features(self) -> list[torch.Tensor]:
        """[B, d] fp32 of each pass since the last time."""
        taken, self._features = self._features, []
        return taken


class G2RLExperienceMaker(experience_maker.RemoteExperienceMaker):  # type: ignore[misc]
    """Shapes rewards after OpenRLHF's length penalties and before its baselines; logged rewards stay raw.

    Attributes:
        metrics: of the last step, as in `exploration_metrics`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics: dict[str, float] = {}
        self._say = Once(logger)

    def make_experience(self, samples_list: list[Any]) -> list[Any]:
        experiences: list[Any] = super().make_experience(samples_list)
        ds = self.args.ds
        features = self.actor_model_group.async_run_method(method_name="take_features")
        self._features = torch.cat(self._flatten_results(features, ds.ring_attn_size * ds.tensor_parallel_size))
        return experiences

    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        penalize = experience_maker.apply_length_penalties

        def penalize_and_shape(experiences: list[Any], args: Any) -> None:
            penalize(experiences, args)
            self._shape(experiences)

        experience_maker.apply_length_penalties = penalize_and_shape
        try:
            return super().compute_advantages_and_returns(experiences)
        finally:
            experience_maker.apply_length_penalties = penalize

    def _shape(self, experiences: Sequence[Any]) -> None:
        raw = torch.cat([experience.rewards for experience in experiences])
        bounds = "the lowest and highest reward, penalties of length included"
        for warning in reward_warnings(raw, self.args.g2rl, "--g2rl.reward_range 0 1", bounds):
            self._say(warning)
        # Responses to one prompt have consecutive indices, however they are dealt out.
        samples = self.args.rollout.n_samples_per_prompt
        prompts = [i // samples for experience in experiences for i in experience.index]
        shaped, metrics = shape_by_uid(self._features, raw, prompts, self.args.g2rl)
        self.metrics = {f"g2rl/{name}": value for name, value in metrics.items()}
        sizes = [len(experience.rewards) for experience in experiences]
        for experience, rewards in zip(experiences, shaped.split(sizes), strict=True):
            experience.info["g2rl_bonus"] = rewards - experience.rewards
            experience.rewards = rewards


class _Shaping(BasePPOTrainer):  # type: ignore[misc]
    """A trainer of OpenRLHF with `G2RLExperienceMaker` in the place of its maker, and its metrics in the log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.experience_maker = G2RLExperienceMaker(
            self.actor_model_group,
            self.critic_model_group,
            self.reward_model_group,
            self.reference_model_group,
            self.kl_ctl,
            self.strategy,
            self.tokenizer,
        )

    def _compute_rollout_stats(self, experiences: list[Any]) -> dict[str, float]:
        stats: dict[str, float] = super()._compute_rollout_stats(experiences)
        return stats | self.experience_maker.metrics


class G2RLPPOTrainer(_Shaping, plain(PPOTrainer)):  # type: ignore[misc]
    """OpenRLHF's synchronous trainer."""


class G2RLTrainingActor(_Shaping, plain(TrainingActor)):  # type: ignore[misc]
    """What trains beside another actor that generates. Features are of the policy that is about to be updated."""

    def broadcast_to_vllm(self) -> None:
        # Ray copies methods into a class of its own and pickles what they refer to. OpenRLHF's class, whose name means
        # Ray's, comes out as a second one, of which this is no instance: for `super()` there.
        super().broadcast_to_vllm()


class G2RLPPOTrainerAsync(plain(PPOTrainerAsync)):  # type: ignore[misc]
    """OpenRLHF's asynchronous trainer, which makes these two actors."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        ppo_trainer_async.TrainingActor = ray.remote(G2RLTrainingActor)  # in this process, which is Ray's own
        super().__init__(*args, **kwargs)
