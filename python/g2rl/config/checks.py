"""Which values are in range, and can work together."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

from g2rl.config.keys import Config, ConfigError, ModelConfig


def _is_temperature(value: float, least: float = 1e-18) -> bool:
    """Whether logits are divided by it; the kernels take 1e-18 or more."""
    return least <= value <= 1e18


EVAL_TEMPERATURE: tuple[str, Callable[[Any], bool]] = (
    "from 1e-18 to 1e18, or 0 for the likeliest tokens",
    lambda v: v == 0 or _is_temperature(v),
)
"""What an evaluation's temperature must be, and a test for it."""

# Ranges by key: (key, what a value must be, test).
_POSITIVE = ("greater than 0", lambda v: v > 0)
_NOT_NEGATIVE = ("0 or greater", lambda v: v >= 0)
_PROBABILITY = ("in (0, 1]", lambda v: 0 < v <= 1)
_RANGES = {
    "steps": _POSITIVE,
    "seed": ("from -2**63 to 2**63 - 1", lambda v: -(2**63) <= v < 2**63),
    "model.lora.rank": _NOT_NEGATIVE,
    "model.lora.alpha": _POSITIVE,
    "model.lora.dropout": ("in [0, 1)", lambda v: 0 <= v < 1),
    "task.held_out": _NOT_NEGATIVE,
    "rollout.prompts": _POSITIVE,
    "rollout.group_size": ("2 or greater: advantages compare the responses of a group", lambda v: v >= 2),
    "rollout.max_new_tokens": _POSITIVE,
    # A logit near 16 is rounded to 1e-6 in fp32: divided by less, log p would be of rounding alone.
    "rollout.temperature": ("from 1e-6 to 1e18", lambda v: _is_temperature(v, 1e-6)),
    "rollout.top_p": _PROBABILITY,
    "rollout.batch_size": _POSITIVE,
    "rollout.max_extra_groups": _NOT_NEGATIVE,
    "rollout.ahead": ("0 or 1", lambda v: v in (0, 1)),
    "rollout.max_logp_gap": _POSITIVE,
    "objective.clip_low": ("in [0, 1)", lambda v: 0 <= v < 1),
    "objective.clip_high": _NOT_NEGATIVE,
    "objective.length": _NOT_NEGATIVE,
    "objective.dual_clip": ("greater than 1, or 0 for no bound", lambda v: v == 0 or v > 1),
    "objective.kl_coef": _NOT_NEGATIVE,
    "objective.reference_every": _NOT_NEGATIVE,
    "objective.entropy_coef": _NOT_NEGATIVE,
    "objective.importance_cap": _NOT_NEGATIVE,
    "objective.overlong_buffer": _NOT_NEGATIVE,
    "objective.updates": _POSITIVE,
    "objective.mini_batches": _POSITIVE,
    "objective.micro_batch_groups": _POSITIVE,
    "objective.tokens_per_micro_batch": _NOT_NEGATIVE,
    "optim.lr": _POSITIVE,
    "optim.beta1": ("in [0, 1)", lambda v: 0 <= v < 1),
    "optim.beta2": ("in [0, 1)", lambda v: 0 <= v < 1),
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.warmup_steps": _NOT_NEGATIVE,
    "optim.max_grad_norm": _POSITIVE,
    "eval.every": _NOT_NEGATIVE,
    "eval.samples": _POSITIVE,
    "eval.temperature": EVAL_TEMPERATURE,
    "eval.top_p": _PROBABILITY,
    "checkpoint.every": _NOT_NEGATIVE,
    "checkpoint.keep": _POSITIVE,
}
_UNBOUNDED = ("rollout.max_logp_gap", "objective.clip_high", "objective.importance_cap", "optim.max_grad_norm")
"""Bounds that may be infinite, which is none."""


def validate(config: Config) -> Config:
    """Return `config`, or raise `ConfigError` naming the first key whose value is out of range."""
    for key, (expected, holds) in _RANGES.items():
        value = attrgetter(key)(config)
        if not holds(value):
            raise ConfigError(f"{key}: expected a value {expected}, found {value!r}")
        if value == math.inf and key not in _UNBOUNDED:
            raise ConfigError(f"{key}: expected a finite value, found inf")
    if not config.name or Path(config.name).name != config.name or config.name in (".", ".."):
        raise ConfigError(f"name: expected a plain folder name, found {config.name!r}")
    _check_model(config.model)
    _check_objective(config)
    _check_rollout(config)
    _check_parallel(config)
    if not config.rewards:
        raise ConfigError("rewards: expected at least one reward function, found none")
    wrong = [k for k in config.eval.ks if not 1 <= k <= config.eval.samples]
    if wrong:
        raise ConfigError(f"eval.ks: expected values from 1 to eval.samples = {config.eval.samples}, found {wrong[0]}")
    return config


def _check_model(model: ModelConfig) -> None:
    """As `_check_objective`."""
    if model.attention == "flash_attention_2" and (model.dtype, model.autocast) == ("float32", "none"):
        raise ConfigError(
            "model.attention: expected sdpa or eager for products in float32, found flash_attention_2, which "
            "multiplies in bfloat16; model.autocast=bfloat16 does so, too"
        )


def _check_objective(config: Config) -> None:
    """Raise `ConfigError` for keys that are in range each, and cannot work together."""
    objective, rollout = config.objective, config.rollout
    if objective.aggregation == "fixed_length" and objective.length == 0:
        raise ConfigError(
            "objective.length: expected a number of tokens with aggregation fixed_length, found 0; "
            "objective.length='${rollout.max_new_tokens}' takes the token limit"
        )
    if objective.reference_every and objective.kl_coef == 0:
        raise ConfigError(
            "objective.reference_every: expected 0 without a KL term, found "
            f"{objective.reference_every}; objective.kl_coef=0.001 adds one"
        )
    if objective.reference_every and config.model.lora.rank:
        raise ConfigError(
            "objective.reference_every: expected 0 with model.lora.rank > 0, since the KL term's model is then the "
            f"policy with its adapter off, found {objective.reference_every}"
        )
    if objective.overlong == "punish" and not 0 < objective.overlong_buffer <= rollout.max_new_tokens:
        raise ConfigError(
            f"objective.overlong_buffer: expected 1 to rollout.max_new_tokens = {rollout.max_new_tokens} with overlong "
            f"punish, found {objective.overlong_buffer}"
        )
    if 0 < objective.tokens_per_micro_batch <= rollout.max_new_tokens:
        raise ConfigError(
            "objective.tokens_per_micro_batch: expected room for a prompt and rollout.max_new_tokens = "
            f"{rollout.max_new_tokens} tokens, or 0, found {objective.tokens_per_micro_batch}"
        )
    if rollout.prompts % objective.mini_batches:
        raise ConfigError(
            f"objective.mini_batches: expected a divisor of rollout.prompts = {rollout.prompts}, whole groups each, "
            f"found {objective.mini_batches}"
        )


def _check_rollout(config: Config) -> None:
    """As `_check_objective`."""
    rollout = config.rollout
    if rollout.ahead and config.objective.importance_cap == 0:
        raise ConfigError(
            "objective.importance_cap: expected a value above 0 with rollout.ahead=1, whose responses are of an older "
            "policy, found 0"
        )
    if rollout.engine != "vllm" and (rollout.server or rollout.vllm):
        key = "server" if rollout.server else "vllm"
        raise ConfigError(f"rollout.{key}: expected none without rollout.engine=vllm, found {getattr(rollout, key)!r}")
    if rollout.server_folder and not rollout.server:
        raise ConfigError(
            f"rollout.server_folder: expected none without rollout.server, found {rollout.server_folder!r}"
        )


def _check_parallel(config: Config) -> None:
    """As `_check_objective`."""
    if config.parallel.strategy == "ddp":
        return
    if config.model.lora.rank:
        raise ConfigError(
            "parallel.strategy: expected ddp with model.lora.rank > 0, since an adapter is small and its model frozen, "
            "found fsdp2"
        )
    if config.model.dtype != "float32":
        raise ConfigError(
            "model.dtype: expected float32 with parallel.strategy fsdp2, which gathers weights in the type of "
            f"model.autocast, found {config.model.dtype}"
        )
    if config.optim.name != "adamw":
        raise ConfigError(
            "optim.name: expected adamw with parallel.strategy fsdp2, whose split weights the others do not take, "
            f"found {config.optim.name}"
        )
    if config.model.offload_activations:
        raise ConfigError(
            "model.offload_activations: expected false with parallel.strategy fsdp2, which would move gathered weights "
            "too: model.gradient_checkpointing=true saves more"
        )
