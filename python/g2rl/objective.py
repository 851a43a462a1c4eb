"""The loss of one optimiser update, from log-probabilities and advantages. Tensors in, tensors out.

With rho the probability ratio of the policy to the one at the step's start, A a response's advantage, H the next-token
entropy and w a token's weight (`token_weights`), the loss is

    - sum_t w_t (c_t min(rho_t A, clip(rho_t, 1 - clip_low, 1 + clip_high) A) + entropy_coef H_t - kl_coef KL_t)

Each piece is a function here, with the paper that it is from. Defaults give GRPO (Shao et al., DeepSeekMath, arXiv
2402.03300), in its published form: clipped token by token (eq. 4 of the G2RL paper has one ratio a response), averaged
inside each response, then over responses. The upper clip range above the lower one is DAPO's clip-higher (Yu et al.,
arXiv 2503.14476).

N tokens, B responses of one micro-batch. Sums over an update's micro-batches, and ranks, are the update's loss: weights
are shares of `Totals`, which the caller knows before the first forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from g2rl.config import ObjectiveConfig


@dataclass(frozen=True)
class Totals:
    """What one optimiser update goes over in all its micro-batches, on all ranks; filtered responses do not count."""

    responses: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Tokens:
    """The response tokens of one micro-batch, packed.

    Attributes:
        logps: [N], of the policy, with gradient.
        entropy: [N], of the policy over the whole vocabulary, with gradient.
        old_logps: [N], of the policy at the step's start.
        advantages: [B].
        cu_seqlens: [B + 1].
        kept: [B] bool, False for filtered responses; None keeps all.
        reference_logps: [N], of the frozen reference; None without a KL term.
        rollout_logps: [N], as the sampling engine computed them; None where it does not say.
    """

    logps: torch.Tensor
    entropy: torch.Tensor
    old_logps: torch.Tensor
    advantages: torch.Tensor
    cu_seqlens: torch.Tensor
    kept: torch.Tensor | None = None
    reference_logps: torch.Tensor | None = None
    rollout_logps: torch.Tensor | None = None

    @property
    def lengths(self) -> torch.Tensor:
        """[B]."""
        return self.cu_seqlens.diff()

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of responses [B] at each of their tokens [N]."""
        return values.repeat_interleave(self.lengths, output_size=self.logps.shape[0])

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Over each response [B], of values of its tokens [N]."""
        if values.device.type in ("cpu", "cuda"):  # where it is the same on every run
            return torch.segment_reduce(values, "sum", offsets=self.cu_seqlens, initial=0)
        responses = torch.arange(len(self.lengths), device=values.device)
        return values.new_zeros(len(responses)).index_add(0, self.spread(responses), values)


def policy_loss(
    tokens: Tokens, totals: Totals, config: ObjectiveConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A micro-batch's part of the update's loss, and what the log shows of it.

    Returns:
        a scalar; and sums over kept tokens (divide by the update's) of `ratio_clip_share`, with a reference of `kl`,
        and with the rollout's log-probabilities of `rollout_ratio`, before truncation.
    """
    weights = token_weights(tokens, totals, config)
    value, clipped = surrogate(probability_ratio(tokens, config.ratio), tokens.spread(tokens.advantages), config)
    shown = {"ratio_clip_share": clipped.to(value)}
    if tokens.rollout_logps is not None:
        mismatch = (tokens.old_logps - tokens.rollout_logps).exp()
        shown["rollout_ratio"] = mismatch
        if config.importance_cap > 0:
            value = truncated(mismatch, config.importance_cap) * value
    if config.entropy_coef > 0:
        value = value + config.entropy_coef * tokens.entropy
    if tokens.reference_logps is not None:
        kl = kl_estimate(tokens.logps, tokens.reference_logps, config.kl_estimator)
        value = value - config.kl_coef * kl
        shown["kl"] = kl.detach()
    counted = weights > 0
    return -(weights * value).sum(), {key: series.where(counted, 0).sum() for key, series in shown.items()}


def token_weights(tokens: Tokens, totals: Totals, config: ObjectiveConfig) -> torch.Tensor:
    """[N] weights of the update's tokens, which sum to 1 (for fixed_length, to the mean length over `length`).

    - ``response_mean``: 1 / (responses x own length), GRPO: every response counts the same.
    - ``token_mean``: 1 / tokens, DAPO (arXiv 2503.14476, eq. 8): every token of the update counts the same.
    - ``fixed_length``: 1 / (responses x `config.length`), Dr. GRPO (Liu et al., arXiv 2503.20783): no bias to short
      right and long wrong answers.

    Responses that are not kept weigh 0 (DAPO's overlong filtering) and count in neither total.
    """
    responses, lengths = max(totals.responses, 1), tokens.lengths.to(tokens.logps.dtype)
    if config.aggregation == "response_mean":
        share = 1 / (responses * lengths.clamp(min=1))
    elif config.aggregation == "token_mean":
        share = torch.full_like(lengths, 1 / max(totals.tokens, 1))
    else:
        share = torch.full_like(lengths, 1 / (responses * config.length))
    if tokens.kept is not None:
        share = share * tokens.kept
    return tokens.spread(share)


def probability_ratio(tokens: Tokens, level: Literal["token", "sequence"]) -> torch.Tensor:
    """rho [N]: pi(y_t) / pi_old(y_t), or for ``sequence`` its geometric mean over the response, at each token.

    The latter is GSPO's (Zheng et al., arXiv 2507.18071, eq. 7); each token's gradient is then rho A / length.
    """
    gap = tokens.logps - tokens.old_logps
    if level == "sequence":
        gap = tokens.spread(tokens.sums(gap) / tokens.lengths.clamp(min=1))
    return gap.exp()


def surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, config: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """min(rho A, clip(rho) A) [N], and where it has no gradient [N] (Schulman et al., PPO, arXiv 1707.06347).

    With `dual_clip` = c > 1, no less than c A where A < 0, so that one token that has become very likely cannot
    dominate the update (Ye et al., arXiv 1912.09729).
    """
    free, held = ratio * advantages, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages
    value, clipped = torch.minimum(free, held), held < free
    if config.dual_clip > 0:
        bound = config.dual_clip * advantages
        beyond = (advantages < 0) & (value < bound)
        value, clipped = torch.where(beyond, bound, value), clipped | beyond
    return value, clipped


def kl_estimate(
    logps: torch.Tensor, reference_logps: torch.Tensor, estimator: Literal["k1", "k2", "k3"]
) -> torch.Tensor:
    """KL(policy, reference) [N] from the sampled tokens alone, with g = log p - log p_ref.

    k1 = g, k2 = g^2 / 2, k3 = exp(-g) + g - 1 (Schulman, http://joschu.net/blog/kl-approx.html; k3 is GRPO's). As terms
    of a loss they pull by their gradients, 1, g and 1 - exp(-g) times that of log p: on-policy, k1's is 0 on average,
    and it pulls nowhere; k2's is that of the KL; k3's is that of KL(reference, policy).
    """
    gap = logps - reference_logps
    if estimator == "k1":
        return gap
    return gap.square() / 2 if estimator == "k2" else (-gap).exp() + gap - 1


def truncated(mismatch: torch.Tensor, cap: float) -> torch.Tensor:
    """min(p_old / p_rollout, cap) [N], a weight without gradient.

    Truncated importance sampling: sampling engines compute with other kernels and dtypes than the trainer, so that
    even fresh rollouts are from another policy (Yao et al., 2025, https://fengyao.notion.site/off-policy-rl).
    """
    return mismatch.detach().clamp(max=cap)


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """What DAPO adds to the reward of a response of `length` tokens (arXiv 2503.14476, eq. 13).

    0 up to `limit` - `buffer` tokens, then linearly down to -1 at `limit`.
    """
    return min(0.0, (limit - buffer - length) / buffer)
