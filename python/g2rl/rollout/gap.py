"""How far log-probabilities by the sampling engine are from the policy's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from g2rl.config import LoraConfig, RolloutConfig


def gap_metrics(gaps: list[torch.Tensor]) -> dict[str, float]:
    """Mean and largest of a step's gaps.

    Args:
        gaps: [N] of each micro-batch, between log-probabilities by the policy at the step's start and by the engine,
            where it says them.
    """
    if not gaps:
        return {}
    gap = torch.cat(gaps)
    return {"train/rollout_gap": float(gap.mean()), "train/rollout_gap_max": float(gap.max())}


def gap_warning(metrics: Mapping[str, float], config: RolloutConfig, lora: LoraConfig, cap: float) -> str | None:
    """What to tell of a gap beyond `rollout.max_logp_gap`; None within it.

    Args:
        metrics: `gap_metrics`.
        config: of the engine.
        lora: the policy's adapter.
        cap: `objective.importance_cap`.
    """
    gap = metrics.get("train/rollout_gap", 0.0)
    if gap <= config.max_logp_gap:
        return None
    reasons = [
        f"top-p: the engine draws from the {config.top_p} that are kept, the policy is taken whole",
        f"temperature: both sides should divide by {config.temperature:g}",
        "weights: the engine may have others than the policy, or a quantised head",
        f"types: the engine computes in {config.dtype}",
    ]
    usual = "; ".join(reasons if config.top_p < 1 else reasons[1:])
    way_out = "objective.importance_cap=2 weighs tokens by the ratio."
    if cap:
        way_out = f"Tokens are weighed by the ratio, at most objective.importance_cap = {cap:g}."
    if lora.rank and lora.dropout:  # a ratio of such noise corrects nothing
        usual = f"model.lora.dropout = {lora.dropout:g}: the policy has it, the engine does not; {usual}"
        way_out = "model.lora.dropout=0 ends the first; with it, a larger rollout.max_logp_gap is in place."
    return (
        f"log p by the {config.engine} engine and by the policy are {gap:.2g} nats apart on average, more than "
        f"rollout.max_logp_gap = {config.max_logp_gap:g}. The usual reasons: {usual}. {way_out}"
    )
