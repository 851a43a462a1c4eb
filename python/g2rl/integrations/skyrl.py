"""G2RL in SkyRL, by one option of its own command.

    python -m skyrl.train.entrypoints.main_base ... trainer.override_entrypoint=g2rl.integrations.skyrl g2rl.strength=1

The policy's worker adds each response's feature to the pass for old log-probabilities, and the trainer shapes rewards
with them before SkyRL makes advantages. B responses, T tokens of the longest response, L of the longest sequence.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
import torch.nn.functional as F
from skyrl.backends.skyrl_train.distributed.ulysses.utils import ulysses_pad_and_slice_inputs
from skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker import FSDPPolicyWorkerBase
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.fully_async_trainer import FullyAsyncRayPPOTrainer
from skyrl.train.trainer import RayPPOTrainer
from skyrl.train.utils import validate_cfg
from skyrl.train.utils.utils import initialize_ray

from g2rl.config import ConfigError
from g2rl.integrations.exploration import Once, Options, few_responses, reward_warnings, shape_by_uid
from g2rl.integrations.head_pass import FeaturePass, HeadHook, at_predictors
from g2rl.integrations.section import read_options

logger = logging.getLogger(__name__)

ENTRYPOINT = "trainer.override_entrypoint="


def main() -> None:
    """What SkyRL's command runs in place of its own `main`."""
    cfg = G2RLTrainConfig.from_cli_overrides([x for x in sys.argv[1:] if not x.startswith(ENTRYPOINT)])
    validate_cfg(cfg)
    check_config(cfg)
    initialize_ray(cfg)
    ray.get(_train.remote(cfg))


@ray.remote(num_cpus=1)
def _train(cfg: G2RLTrainConfig) -> None:
    G2RLExp(cfg).run()


@dataclass
class G2RLTrainConfig(SkyRLTrainConfig):
    """SkyRL's configuration with a section `g2rl`, as `read_options` takes it."""

    g2rl: dict[str, Any] = field(default_factory=dict)


class G2RLExp(BasePPOExp):
    """`BasePPOExp` with G2RL's trainer, or its asynchronous one; takes `G2RLTrainConfig`."""

    def get_trainer(self, *args: Any, **kwargs: Any) -> G2RLTrainer:
        trainer = G2RLAsyncTrainer if self.cfg.trainer.fully_async.enabled else G2RLTrainer
        return trainer(*args, **kwargs)


class G2RLTrainer(RayPPOTrainer):
    """`RayPPOTrainer` that shapes rewards between old log-probabilities and advantages; takes ``cfg.g2rl``.

    Whatever comes before, as filters and metrics of rewards, sees raw ones; SkyRL's penalty for KL in rewards and its
    advantage estimators see shaped ones.

    Raises:
        ConfigError: an option or a setting of SkyRL that G2RL cannot work with.
    """

    def __init__(self, cfg: G2RLTrainConfig, *args: Any, **kwargs: Any) -> None:
        self.options = check_config(cfg)
        super().__init__(cfg, *args, **kwargs)
        self._say = Once(logger)
        logger.info("G2RL: %s", self.options)

    def build_models(self, PolicyWorker: Any, CriticWorker: Any, RefWorker: Any) -> None:
        super().build_models(ray.remote(num_gpus=1)(G2RLPolicyWorker), CriticWorker, RefWorker)

    def fwd_logprobs_values_reward(self, training_input: Any) -> Any:
        self._loss_mask: torch.Tensor = training_input["loss_mask"]
        self._features: torch.Tensor | None = None
        training_input = super().fwd_logprobs_values_reward(training_input)
        if self._features is None:
            raise RuntimeError("g2rl: expected the policy's pass for old log-probabilities, but SkyRL ran none")
        training_input["rewards"] = self._shape(training_input, self._features)
        return training_input

    def _skip_policy_forward(self, training_input: Any) -> bool:
        if super()._skip_policy_forward(training_input):
            self._say(
                "G2RL: with this policy_loss_type SkyRL runs no pass for old log-probabilities, from which features "
                "come; one is added, in timing/fwd_logprobs_values_reward",
                logging.INFO,
            )
        return False

    def _execute_forward_pass(self, model: str, data_fwd_pass: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if model != "policy":
            return super()._execute_forward_pass(model, data_fwd_pass, *args, **kwargs)
        B, T = self._loss_mask.shape
        data_fwd_pass["loss_mask"] = self._loss_mask  # tells the worker to add features, and of which tokens
        rows = super()._execute_forward_pass(model, data_fwd_pass, *args, **kwargs)
        if len(rows) != B:
            raise RuntimeError(
                f"g2rl: expected rows of {B} responses, found {len(rows)}: trainer.policy_mini_batch_size * "
                "generator.n_samples_per_prompt has to be a multiple of the policy's data-parallel ranks"
            )
        if rows.shape[1] <= T:
            raise RuntimeError(
                "g2rl: expected features behind log-probabilities, found none: the policy's worker is not "
                f"{G2RLPolicyWorker.__name__}"
            )
        logps, self._features = rows[:, :T], rows[:, T:]
        return logps

    def _shape(self, batch: Any, features: torch.Tensor) -> torch.Tensor:
        """Rewards of tokens [B, T], with what each trajectory gains or loses added to its last token's."""
        uids, token_rewards = batch.metadata["uids"], batch["rewards"].clone()
        ends = torch.tensor(batch.metadata.get("is_last_step") or [True] * len(uids))
        features = of_trajectories(features, self._loss_mask.sum(1), ends)
        last = ends.nonzero()[: int(ends.sum()) - batch.metadata.get("pad_size", 0), 0]
        raw = token_rewards[last].sum(dim=1)
        for warning in reward_warnings(
            raw, self.options, "g2rl.reward_range=[0,1]", "the lowest and highest reward of your environments"
        ):
            self._say(warning)
        shaped, metrics = shape_by_uid(features[: len(last)], raw, [uids[row] for row in last.tolist()], self.options)
        self.all_metrics.update({f"g2rl/{name}": value for name, value in metrics.items()})
        token_rewards[last, -1] += shaped - raw  # responses end in the last column
        return token_rewards


def of_trajectories(features: torch.Tensor, tokens: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Features of trajectories, means over all of their tokens.

    Args:
        features: [B, d] fp32, of the steps of one trajectory after the other, means over their tokens.
        tokens: [B], how many each has of the policy.
        ends: [B] bool, a trajectory's last step.
    """
    if bool(ends.all()):
        return features
    trajectory = F.pad(ends[:-1].long().cumsum(0), (1, 0))
    count = torch.zeros(int(ends.sum())).index_add(0, trajectory, tokens.float())
    sums = torch.zeros(len(count), features.shape[1]).index_add(0, trajectory, features * tokens.float()[:, None])
    return sums / count.clamp(min=1)[:, None]


class G2RLAsyncTrainer(G2RLTrainer, FullyAsyncRayPPOTrainer):
    """`FullyAsyncRayPPOTrainer` likewise. Features are of the policy that is about to be updated, whatever policies
    responses are of."""


def check_config(cfg: G2RLTrainConfig) -> Options:
    """The options of ``cfg.g2rl``; raises ConfigError for what cannot work, and warns of what does nothing."""
    options = read_options(getattr(cfg, "g2rl", None))  # which a configuration of one's own may lack
    if cfg.trainer.strategy != "fsdp":
        raise ConfigError(
            f"trainer.strategy: expected 'fsdp', found {cfg.trainer.strategy!r}, of whose workers G2RL gets no features"
        )
    if cfg.trainer.fully_async.enabled and cfg.trainer.fully_async.simulate_training:
        raise ConfigError("trainer.fully_async.simulate_training: expected False, found True: no policy gives features")
    if cfg.trainer.algorithm.advantage_estimator == "maxrl":
        raise ConfigError(
            "trainer.algorithm.advantage_estimator: expected one such as 'grpo' or 'rloo', found 'maxrl', which "
            "divides by a group's mean reward, and shaped ones may be of any sign"
        )
    if few := few_responses("generator.n_samples_per_prompt", cfg.generator.n_samples_per_prompt):
        logger.warning(few)
    return options


class G2RLPolicyWorker(FSDPPolicyWorkerBase):
    """`FSDPPolicyWorkerBase` that puts features [B, d] behind log-probabilities [B, T], where a batch has a loss mask.

    SkyRL's own passes for old log-probabilities have none. As further columns features go wherever rows go, over
    micro-batches by number or by tokens, mini-batches and ranks, and come back in order.

    Raises:
        ValueError: an adapter on the head.
        RuntimeError: SkyRL's log-probabilities are not those of the model's head.
    """

    def init_model(self, *args: Any, **kwargs: Any) -> None:
        super().init_model(*args, **kwargs)
        self._head = HeadHook(self.model, "SkyRL", "trainer.policy.model.lora.target_modules")

    def _forward_micro_batch(self, micro_batch: Any) -> Any:
        if micro_batch.get("loss_mask") is None:
            return super()._forward_micro_batch(micro_batch)
        mask = micro_batch["attention_mask"]  # which SkyRL moves to the GPU, and log-probabilities back
        done = self._feature_pass(micro_batch["sequences"], mask, micro_batch["loss_mask"] > 0)
        with self._head.awaiting(done):
            output = super()._forward_micro_batch(micro_batch)
        logps = output["output"]
        rows = at_predictors(logps, mask.shape[1])
        features = self._head.features(done, lambda: self._local(rows, mask)[done.response >= 0])
        output["output"] = torch.cat([logps.float(), features.cpu()], dim=1)
        return output

    def _feature_pass(self, ids: torch.Tensor, mask: torch.Tensor, own: torch.Tensor) -> FeaturePass:
        """Of sequences [B, L], their attention mask, and the policy's own tokens [B, T] at their ends."""
        B = len(own)
        numbers = torch.arange(1, B + 1)[:, None] * own
        response = self._local(at_predictors(numbers, ids.shape[1]), mask) - 1
        targets = self._local(ids.roll(-1, dims=1), mask)
        group = self.device_mesh["sp"].get_group() if self.sequence_parallel_size > 1 else None
        return FeaturePass(response, targets, B, self.cfg.algorithm.temperature, group)

    def _local(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Of values [B, L] those at this rank's positions, in the order of the model's input; 0 is for padding."""
        if self.model.remove_microbatch_padding:
            values = values[mask.bool()][None]
        return ulysses_pad_and_slice_inputs(values, sp_size=self.sequence_parallel_size)[0].flatten()
