"""verl's trainers with rewards shaped by G2RL, selected by ``trainer.v1.trainer_mode=g2rl_sync`` and the like."""

from __future__ import annotations

import logging
import os
import time
from typing import Any, ClassVar

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import (
    PPOTrainer,
    PPOTrainerColocateAsync,
    PPOTrainerSeparateAsync,
    PPOTrainerSync,
    register_trainer,
)

from g2rl.config import ConfigError
from g2rl.integrations.exploration import Once, Options, few_responses, reward_warnings, shape_by_uid
from g2rl.integrations.section import read_options
from g2rl.integrations.verl.engine import FEATURES, REQUEST
from g2rl.integrations.verl.shaping import add_to_last, final_outputs

logger = logging.getLogger(__name__)
logger.setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))

ENGINES = ("fsdp", "fsdp2", "megatron")
SCORES = (
    "the lowest and highest score of your data sources: [-1,1] for verl's math_dapo, math, math_dapo_reasoning and "
    "aime*, [0,1] for its others"
)


class _Shaping(PPOTrainer):
    """A trainer of verl's that shapes `rm_scores` between old log-probabilities and advantages; takes ``config.g2rl``.

    Whatever comes before, as DAPO's filter, and after, as logs and dumps of scores, sees raw rewards: advantages alone
    are made of shaped ones, which stay in verl's field of rewards after all corrections, `token_level_rewards`.

    Raises:
        ConfigError: an option or a setting of verl that G2RL cannot work with.
    """

    MODE: ClassVar[str]
    """verl's own trainer mode."""

    def __init__(self, config: DictConfig) -> None:
        self.options: Options = read_options(config.get("g2rl"))
        check_config(config)
        config.trainer.v1.trainer_mode = self.MODE  # by which all else in verl is told what to do
        super().__init__(config)
        self._say = Once(logger)
        logger.info("G2RL: %s", self.options)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch.extra_info[REQUEST] = True
        correction = self.config.algorithm.get("rollout_correction", None)
        if correction and correction.get("bypass_mode", False):
            self._run_feature_pass(batch)
        batch = super()._compute_old_log_prob(batch, metrics)
        batch.extra_info.pop(REQUEST, None)
        return batch

    def _run_feature_pass(self, batch: KVBatchMeta) -> None:
        """The pass that verl spares when it takes the rollout's log-probabilities for the old ones."""
        start = time.perf_counter()
        temperature = self.config.actor_rollout_ref.rollout.temperature
        batch.extra_info.update(calculate_entropy=False, compute_loss=False, temperature=temperature)
        self.actor_rollout_wg.compute_log_prob(batch)
        seconds = time.perf_counter() - start
        self._say(
            "G2RL: with rollout_correction.bypass_mode verl runs no pass for old log-probabilities, from which "
            f"features come; this one is added. bypass_mode=False makes use of it ({seconds:.2g} s here)",
            logging.INFO,
        )

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        raw, shaped = self._shape(batch, metrics)
        _put(batch, rm_scores=shaped)
        batch = super()._compute_advantage(batch, metrics)
        if self.config.algorithm.use_kl_in_reward:
            _put(batch, rm_scores=raw)
        else:
            _put(batch, rm_scores=raw, token_level_rewards=shaped)
        return batch

    def _shape(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw and shaped scores of tokens, ragged [B, response length]."""
        names = [FEATURES, "rm_scores"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        if FEATURES not in data.keys():
            raise RuntimeError(
                "g2rl: expected features beside the actor's log-probabilities, found none: its processes run another "
                "engine. Install g2rl-kernels on every node, and leave VERL_USE_EXTERNAL_PLUGINS, VERL_ENGINE_DEVICE "
                "and VERL_ENGINE_VENDOR unset"
            )
        raw = data["rm_scores"]
        features, rewards = _dense(data[FEATURES]).float(), torch.stack([x.float().sum() for x in raw.unbind()])
        final = final_outputs(batch.keys)
        padding = torch.tensor([tag.get("is_padding", False) for tag in batch.tags])
        rows = ((final == torch.arange(len(final))) & ~padding).nonzero()[:, 0]
        for warning in reward_warnings(rewards[rows], self.options, "+g2rl.reward_range=[0,1]", SCORES):
            self._say(warning)
        uids = [batch.keys[row].rsplit("_", 2)[0] for row in rows.tolist()]
        bonus = torch.zeros_like(rewards)
        shaped, exploration = shape_by_uid(features[rows], rewards[rows], uids, self.options)
        bonus[rows] = shaped - rewards[rows]
        metrics.update({f"g2rl/{name}": value for name, value in exploration.items()})
        values = add_to_last(raw.values(), raw.offsets(), bonus[final])
        return raw, torch.nested.nested_tensor_from_jagged(values, raw.offsets())


@register_trainer("g2rl_sync")
class G2RLTrainer(_Shaping, PPOTrainerSync):
    """Features are of the policy that is about to be updated."""

    MODE = "sync"


@register_trainer("g2rl_colocate_async")
class G2RLColocateAsyncTrainer(_Shaping, PPOTrainerColocateAsync):
    """Likewise, also where responses are of earlier policies."""

    MODE = "colocate_async"


@register_trainer("g2rl_separate_async")
class G2RLSeparateAsyncTrainer(_Shaping, PPOTrainerSeparateAsync):
    """Features are of the policy that old log-probabilities are of: verl restores it for mini-batches behind the first
    of a `parameter_sync_step`, except in bypass mode."""

    MODE = "separate_async"


def check_config(config: DictConfig) -> None:
    """Raise ConfigError for what cannot work, and warn of what does nothing."""
    actor = config.actor_rollout_ref
    if actor.actor.strategy not in ENGINES:
        raise ConfigError(
            f"actor_rollout_ref.actor.strategy: expected {', '.join(ENGINES[:-1])} or {ENGINES[-1]}, found "
            f"{actor.actor.strategy!r}: features of G2RL come from these engines; set "
            "actor_rollout_ref.actor.strategy=fsdp2"
        )
    if actor.actor.strategy == "megatron":
        of_megatron = actor.actor.megatron
        refused = {"actor_rollout_ref.model.use_fused_kernels": actor.model.use_fused_kernels} | {
            f"actor_rollout_ref.actor.megatron.{name}": of_megatron.get(name)
            for name in ("dynamic_context_parallel", "use_megatron_fsdp")
        }
        for name, found in refused.items():
            if found:
                raise ConfigError(f"{name}: expected False with G2RL's engine for Megatron, found {found}")
    if few := few_responses("actor_rollout_ref.rollout.n", actor.rollout.n):
        logger.warning(few)


def _put(batch: KVBatchMeta, **fields: torch.Tensor) -> None:
    data = TensorDict(fields, batch_size=len(batch))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=data)


def _dense(features: torch.Tensor) -> torch.Tensor:
    """[B, d], which verl's queue may hand over as ragged rows of one length."""
    return torch.stack(features.unbind()) if features.is_nested else features
