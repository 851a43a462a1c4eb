"""What ops and backends hand to each other: a backend's functions take these records, and return them.

    token_logprobs(hidden, head, targets, workspace_bytes) -> TokenLogprobs
    sequence_features(hidden, head, targets, responses, workspace_bytes) -> SequenceFeatures
    logprobs_backward(grad_logps, grad_entropy, hidden, head, targets, saved, needs, workspace_bytes) -> Gradients
    token_sums(hidden, head, targets, workspace_bytes) -> Tensor
    part_features(hidden, head, targets, responses, sums, workspace_bytes) -> SequenceFeatures
    group_similarity(features, cu_groups, m_max) -> Tensor
    exploration_scores(similarity, rewards, cu_groups, valid) -> Tensor
    shape_rewards(rewards, scores, cu_groups, valid, shaping) -> Tensor
    group_advantages(rewards, cu_groups, normalize) -> Tensor
    g2rl_advantages(features, rewards, cu_groups, m_max, valid, shaping, normalize) -> GroupAdvantages

`token_sums` and `part_features` are for a head that holds a part of the vocabulary; targets in other parts are -1. The
first gives sums over the part [4, N]: m, S_rest, X_rest and raw z_y (0 in other parts), see `sums`; a backend may
count them in units of its own. The second takes those of all parts [4, parts, N], and returns the results of the whole
vocabulary and the part's share of features. With these results `logprobs_backward` gives a share of hidden's gradient.

Ops are registered with flat arguments, which `ops` alone knows. `workspace_bytes` is 0 where the caller set no limit.
N tokens, d hidden, V vocab, B responses, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from g2rl_kernels.checks import check_number

RULES = ("scale", "centered", "literal")
UNIFORM_GROUPS = ("shape", "drop")


@dataclass(frozen=True, eq=False)
class Head:
    """The last layer as kernels use it; its values were checked by the public `LMHead`.

    Attributes:
        weight: [V, d].
        bias: [V], weight's dtype or fp32.
        temperature, logit_scale: as in `LMHead`.
        softcap: 0 for none.
    """

    weight: Tensor
    bias: Tensor | None
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float = 0.0

    @property
    def V(self) -> int:
        return self.weight.shape[0]

    # u = scale * z, or scale * tanh(inner_scale * z) under a soft cap, for z = W h + b.

    @property
    def inner_scale(self) -> float:
        return self.logit_scale / self.softcap if self.softcap > 0 else 1.0

    @property
    def scale(self) -> float:
        return (self.softcap if self.softcap > 0 else self.logit_scale) / self.temperature


@dataclass(frozen=True, eq=False)
class Responses:
    """Which tokens features are summed over, and how.

    Attributes:
        cu_seqlens: [B + 1] int32 or int64.
        token_weights: [N] float; None for ones.
        lse: [N] float, near each token's log sum_v exp u_v; None where it is not known.
    """

    cu_seqlens: Tensor
    token_weights: Tensor | None = None
    lse: Tensor | None = None


class TokenLogprobs(NamedTuple):
    """What `token_logprobs` returns; fp32, or fp64 for fp64 inputs.

    Attributes:
        logps: [N], log p(y_t) <= 0, natural logarithm; differentiable.
        entropy: [N], nats, over the whole vocabulary at the head's temperature; differentiable.
        lse: [N], log sum_v exp(z_v / T); not differentiable.
    """

    logps: Tensor
    entropy: Tensor
    lse: Tensor


class SequenceFeatures(NamedTuple):
    """What `sequence_features` returns; fp32, or fp64 for fp64 inputs.

    Attributes:
        features: [B, d], Phi of eq. 8; zero for a response without tokens or weight; not differentiable.
        logps, entropy, lse: as in `TokenLogprobs`.
    """

    features: Tensor
    logps: Tensor
    entropy: Tensor
    lse: Tensor


class Needs(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool = True
    weight: bool = True
    bias: bool = True


class Gradients(NamedTuple):
    """Of hidden [N, d], weight [V, d] and bias [V], each of its tensor's dtype; None for what was not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Shaping:
    """How scores shape rewards; the paper leaves the starred choices open.

    Attributes:
        strength: lambda* of eq. 12, 0 to 1e18.
        clip: c of section 2.5, > 0: shaping moves no reward out of [-c, c], and none that lies beyond any further.
        rule: reading of eq. 12*: "scale" r (1 + lambda nubar); "centered" r (1 + lambda (2 nubar - 1)), where a dull
            right answer loses and a wrong answer close to its peers suffers less; "literal" r (1 + lambda r nubar).
        min_range: a group whose scores span less keeps its rewards, since min-max would amplify rounding to [0, 1].
        uniform_groups: groups whose valid responses have equal raw rewards* are shaped ("shape") or keep their rewards
            ("drop").

    Raises:
        TypeError, ValueError: a value is of another type or out of range.
    """

    strength: float = 1.0
    clip: float = 3.0
    rule: Literal["scale", "centered", "literal"] = "scale"
    min_range: float = 1e-2
    uniform_groups: Literal["shape", "drop"] = "shape"

    def __post_init__(self) -> None:
        check_number("shaping.strength", self.strength, "a number from 0 to 1e18", lambda x: 0 <= x <= 1e18)
        check_number("shaping.clip", self.clip, "a number > 0", lambda x: x > 0)
        if self.rule not in RULES:
            raise ValueError(f"shaping.rule: expected one of {', '.join(RULES)}, found {self.rule!r}")
        check_number("shaping.min_range", self.min_range, "a number >= 0", lambda x: x >= 0)
        if self.uniform_groups not in UNIFORM_GROUPS:
            raise ValueError(
                f"shaping.uniform_groups: expected one of {', '.join(UNIFORM_GROUPS)}, found {self.uniform_groups!r}"
            )


def shaping_numbers(shaping: Shaping, normalize: str) -> tuple[float, float, int, float, bool, bool]:
    """As the compiled modules' `Shaping` takes it: strength, clip, rule, min_range, drop_uniform, divide_by_std."""
    return (
        shaping.strength,
        shaping.clip,
        RULES.index(shaping.rule),
        shaping.min_range,
        shaping.uniform_groups == "drop",
        normalize == "std",
    )


class GroupAdvantages(NamedTuple):
    """What `g2rl_advantages` returns; fp32 unless features are fp64.

    Attributes:
        advantages: [B].
        shaped_rewards: [B], r~.
        scores: [B], nu in [0, 1].
        similarity: [G, m_max, m_max], cosines, 0 beyond a group's size.
    """

    advantages: Tensor
    shaped_rewards: Tensor
    scores: Tensor
    similarity: Tensor
