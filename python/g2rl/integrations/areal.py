"""G2RL in AReaL: two names in a training script, for AReaL's `GRPOConfig` and `PPOTrainer`.

    from g2rl.integrations.areal import G2RLConfig, G2RLTrainer

The actor's pass for proximal log-probabilities adds each response's feature, and rewards are shaped with them before
AReaL makes advantages. AReaL's trajectory is a group: m responses to one prompt. B responses of a rank, n of a
micro-batch, T tokens of that in a row, L of the longest sequence, d hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from logging import INFO
from typing import Any

import torch
import torch.nn.functional as F
from areal import PPOTrainer
from areal.api.cli_args import GRPOConfig, PPOActorConfig
from areal.engine import FSDPPPOActor
from areal.models.fsdp.ulysses import ulysses_pad_and_slice_inputs
from areal.utils import logging, stats_tracker
from areal.utils.data import concat_batch, split_batch
from areal.utils.environ import is_single_controller

from g2rl.config import ConfigError
from g2rl.integrations.exploration import Once, few_responses, reward_warnings, shape_by_uid
from g2rl.integrations.head_pass import FeaturePass, HeadHook, predicted_response
from g2rl.integrations.section import read_options

logger = logging.getLogger("G2RL")


@dataclass
class G2RLActorConfig(PPOActorConfig):
    """AReaL's configuration of an actor with a section `g2rl`, as `read_options` takes it."""

    g2rl: dict[str, Any] = field(default_factory=dict)


@dataclass
class G2RLConfig(GRPOConfig):
    """AReaL's configuration of a run, whose actor has a section `g2rl`."""

    actor: G2RLActorConfig = field(default_factory=G2RLActorConfig)


class G2RLTrainer(PPOTrainer):
    """`PPOTrainer` whose actor is `G2RLPPOActor`.

    Raises:
        ConfigError: an option, or a setting of AReaL that G2RL cannot work with.
    """

    def __init__(self, config: G2RLConfig, *args: Any, **kwargs: Any) -> None:
        options = read_options(config.actor.g2rl)
        if config.actor.enable_tree_training:
            raise ConfigError(
                "actor.enable_tree_training: expected False, found True: responses would share the hidden states of "
                "what they have in common"
            )
        if few := few_responses("gconfig.n_samples", config.gconfig.n_samples):
            logger.warning(few)
        super().__init__(config, *args, **kwargs)
        logger.info("G2RL: %s", options)

    def _create_train_engine(self, actor_config: Any, alloc: Any) -> Any:
        if actor_config is not self.config.actor:  # the reference's
            return super()._create_train_engine(actor_config, alloc)
        if alloc.backend != "fsdp" or alloc.parallel.tp_size > 1:
            raise ConfigError(
                f"actor.backend: expected fsdp without tensor parallelism, such as fsdp:d8 or fsdp:d4c2, found "
                f"{actor_config.backend!r}, of whose workers G2RL gets no features"
            )
        if is_single_controller():
            actor = G2RLPPOActor.as_controller(actor_config, self.scheduler)
        else:
            actor = G2RLPPOActor(config=actor_config)
        actor.create_process_group(parallel_strategy=alloc.parallel)
        return actor


class G2RLPPOActor(FSDPPPOActor):
    """`FSDPPPOActor` that puts features before log-probabilities, takes them out again, and shapes rewards with them.

    As columns of AReaL's rows features go wherever rows go, over micro-batches, ranks and controllers.

    Raises:
        ConfigError: an option.
        ValueError: an adapter on the head.
        RuntimeError: log-probabilities are not those of the model's head, or come without features.
    """

    def __init__(self, config: G2RLActorConfig) -> None:
        super().__init__(config)
        self.options = read_options(config.g2rl)
        self._say = Once(logger)
        self._adds_features = False

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        super().initialize(*args, **kwargs)
        self._head = HeadHook(self.model, "AReaL", "actor.target_modules")
        self._d: int = self._head.model.get_output_embeddings().weight.shape[1]

    @torch.no_grad()
    def compute_logp(self, data: list[dict[str, Any]]) -> list[torch.Tensor]:
        """Of each group features [m, d], and AReaL's log-probabilities [m, L] behind them."""
        batch, groups = concat_batch(data)
        self._adds_features = True
        try:
            rows = self.actor._compute_logp(batch)
        finally:
            self._adds_features, self._head.awaited = False, None
        features, logps = rows[:, : self._d], rows[:, self._d :]
        each = zip(features.split(groups.traj_group_sizes), split_batch(logps, groups), strict=True)
        return [torch.cat(pair, dim=1) for pair in each]

    @torch.no_grad()
    def compute_advantages(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """AReaL's, of shaped rewards; what it logs of rewards stays raw."""
        if any(group.get("prox_logp") is None for group in data):
            self._say(
                "G2RL: with these settings AReaL runs no pass for proximal log-probabilities, from which features "
                "come; one is added, in timing of compute_advantage",
                INFO,
            )
            rows = self.compute_logp(data)
        else:
            rows = [group["prox_logp"] for group in data]
            for group, row in zip(data, rows, strict=True):
                if row.shape[1] != self._d + group["input_ids"].shape[1]:
                    raise RuntimeError(
                        "g2rl: expected features before log-probabilities, found none: they are not of "
                        f"{type(self).__name__}.compute_logp"
                    )
            data = [{**group, "prox_logp": row[:, self._d :]} for group, row in zip(data, rows, strict=True)]
        raw = torch.cat([group["rewards"] for group in data]).float()
        features = torch.cat([row[:, : self._d] for row in rows]).to(raw.device)
        uids = [f"{i}" for i, row in enumerate(rows) for _ in row]
        for warning in reward_warnings(
            raw, self.options, "actor.g2rl.reward_range=[0,1]", "the lowest and highest reward"
        ):
            self._say(warning)
        shaped, metrics = shape_by_uid(features, raw, uids, self.options)
        with stats_tracker.scope("g2rl"):
            stats_tracker.scalar(**metrics)
        # Which AReaL adds to rewards, after its penalty for length and before it scales them.
        bias = self.actor.reward_bias
        self.actor.reward_bias = bias + (shaped - raw)
        try:
            return super().compute_advantages(data)
        finally:
            self.actor.reward_bias = bias

    def forward_batch(self, input_: Any, output_seqlens: list[int] | None = None, aggregate_fn: Any = torch.cat) -> Any:
        if self._adds_features:
            output_seqlens = (input_["attention_mask"].sum(1) + self._d).tolist()
        return super().forward_batch(input_, output_seqlens, aggregate_fn)

    def _prepare_mb_inputs(self, mb_item: Any) -> Any:
        prepared = super()._prepare_mb_inputs(mb_item)
        if self._adds_features:
            n = len(mb_item.orig_mb["cu_seqlens"]) - 1
            self._head.awaited = self._feature_pass(mb_item.padded_mb, n)
        return prepared

    def _feature_pass(self, batch: dict[str, Any], n: int) -> FeaturePass:
        """Of n sequences in a row, with tokens [1, T] and which of them are the policy's own; padding is at its end."""
        ids, cu_seqlens, own = batch["input_ids"], batch["cu_seqlens"].long(), batch["loss_mask"][0] > 0
        own[cu_seqlens[:-1]] = False  # nothing predicts the first token
        # AReaL fills up with 0, which is to be none.
        response = self._local(predicted_response(cu_seqlens, own, cu_seqlens)[None] + 1) - 1
        group = self.sp_group if self.parallel_helper.sp_size > 1 else None
        return FeaturePass(response, self._local(ids.roll(-1)).long(), n, self.config.temperature, group)

    def _local(self, values: torch.Tensor) -> torch.Tensor:
        """Of values [1, T] those at this rank's positions."""
        size = self.parallel_helper.sp_size
        return (ulysses_pad_and_slice_inputs(values, sp_size=size)[0] if size > 1 else values)[0]

    def _compute_forward_result(self, logits: torch.Tensor, ctx: Any) -> Any:
        logps = super()._compute_forward_result(logits, ctx)
        done, self._head.awaited = self._head.awaited, None
        if done is None:
            return logps
        padded = F.pad(logps, (0, ctx.pad_length))[None]
        features = self._head.features(done, lambda: self._local(padded)[done.response >= 0])
        of_sequences = logps.float().split(ctx.mb_input["cu_seqlens"].diff().tolist())
        rows = zip(features, of_sequences, strict=True)
        return torch.cat([part for row in rows for part in row])
