"""What every integration does with a step's features: shape its rewards, and tell what came of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import torch

from g2rl.geometry import degenerate, pair_cosines
from g2rl.reward_range import PLAIN, Range, range_left, read_range, shape_mapped, zeros_unmoved
from g2rl_kernels import GroupAdvantages, Shaping, pad


@dataclass(frozen=True)
class Options:
    """What another trainer's configuration has as `g2rl`.

    Attributes:
        shaping: from the fields of `g2rl_kernels.Shaping`.
        reward_range: lowest and highest reward, mapped to -1 and 1 for shaping; for rewards such as 0 and 1.

    Raises:
        ValueError: reward_range is not two finite numbers, the lower one first.
    """

    shaping: Shaping = field(default_factory=Shaping)
    reward_range: Range = PLAIN

    def __post_init__(self) -> None:
        read_range("reward_range", self.reward_range)

    def __str__(self) -> str:
        low, high = self.reward_range
        return f"shaping rewards of {low:g} to {high:g} with strength {self.shaping.strength:g}"


def require_plain(settings: Sequence[tuple[str, Any, Any]]) -> None:
    """Raise ValueError for the first of settings (name, value, what it has to be) that G2RL does not work with."""
    for name, value, plain in settings:
        if value != plain:
            raise ValueError(f"{name}: expected {plain} with G2RL, found {value}")


def few_responses(name: str, m: int) -> str:
    """What is wrong where a trainer's option of this name makes groups of m responses; else empty."""
    if m >= 3:
        return ""
    return f"{name}: expected 3 or more, found {m}: with one peer, scores of a group are equal and G2RL changes nothing"


def shape_in_range(
    features: torch.Tensor,
    rewards: torch.Tensor,
    groups: int | torch.Tensor,
    shaping: Shaping,
    reward_range: Range,
    valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Shaped rewards [B] of `shape_mapped`, which has these arguments, and `exploration_metrics`."""
    shaped, result = shape_mapped(features, rewards, groups, shaping, reward_range, valid)
    return shaped, exploration_metrics(features, result, groups, shaping.min_range, valid)


def shape_by_uid(
    features: torch.Tensor, rewards: torch.Tensor, uids: Sequence[str] | Sequence[int], options: Options
) -> tuple[torch.Tensor, dict[str, float]]:
    """Shaped rewards of responses whose groups are in any order and of any sizes.

    Args:
        features: [B, d], fp32 or fp64; rewards: [B], raw.
        uids: of the prompts, B of them, alike in a group alone.
        options: not a `Shaping` alone: the range of the rewards has to be known.

    Returns:
        shaped rewards [B] in the scale of the raw ones, fp64 for fp64 rewards, else fp32; and the step's metrics.

    Raises:
        TypeError: an argument has another type, or uids are of several that have no order.
        ValueError: features that are not finite, or another number of uids or rewards.
    """
    for name, tensor in (("features", features), ("rewards", rewards)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    if not isinstance(options, Options):
        raise TypeError(f"options: expected Options(shaping, reward_range), found {type(options).__name__}")
    if len(uids) != len(features):
        raise ValueError(f"uids: expected one for each of {len(features)} responses, found {len(uids)}")
    if list(rewards.shape) != [len(features)]:
        raise ValueError(f"rewards: expected shape [{len(features)}], found {list(rewards.shape)}")
    rewards = rewards if rewards.dtype == torch.float64 else rewards.float()
    finite = features.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(f"g2rl: expected finite features, found NaN or inf in {int((~finite).sum())} responses")
    try:
        rows = sorted(range(len(uids)), key=uids.__getitem__)
    except TypeError as error:
        kinds = " and ".join(sorted({type(uid).__name__ for uid in uids}))
        raise TypeError(f"uids: expected strings or ints, all of one type, found {kinds}") from error
    sizes = [len(list(group)) for _, group in groupby(rows, key=uids.__getitem__)]
    order = torch.tensor(rows, device=features.device)
    cu_groups = torch.tensor([0, *accumulate(sizes)], device=features.device)
    found, metrics = shape_in_range(features[order], rewards[order], cu_groups, options.shaping, options.reward_range)
    shaped = torch.empty_like(rewards)
    shaped[order] = found
    return shaped, metrics


def exploration_metrics(
    features: torch.Tensor,
    result: GroupAdvantages,
    groups: int | torch.Tensor,
    min_range: float,
    valid: torch.Tensor | None = None,
) -> dict[str, float]:
    """Means over a step's groups, and over those of its responses that take part: valid ones with a feature.

    Args:
        features, groups, valid: as in `g2rl_advantages`.
        result: of `g2rl_advantages` on them.
        min_range: of `Shaping`.

    Returns:
        score (nu) and feature_norm, if a response takes part; mean_cosine and negative_share of the pairs of a group,
        if there are any; and degenerate_share, of groups whose scores are too close to shape anything.
    """
    norms = features.norm(dim=1)
    takes_part = norms > 0 if valid is None else (norms > 0) & valid
    G, m, _ = result.similarity.shape
    sizes = groups.diff() if isinstance(groups, torch.Tensor) else torch.tensor([groups])
    inside = (torch.arange(m) < sizes.cpu()[:, None]).expand(G, m).to(norms.device)
    compared, scores = pad(takes_part, inside), pad(result.scores, inside)
    cosines = pair_cosines(result.similarity, compared)
    metrics = {"degenerate_share": degenerate(scores, compared, min_range).float().mean()}
    if takes_part.any():
        metrics |= {"score": result.scores[takes_part].mean(), "feature_norm": norms[takes_part].mean()}
    if cosines.numel():
        metrics |= {"mean_cosine": cosines.mean(), "negative_share": (cosines < 0).float().mean()}
    return {name: float(value) for name, value in metrics.items()}


def reward_warnings(rewards: torch.Tensor, options: Options, zero_to_one: str, bounds: str) -> list[str]:
    """What raw rewards [B] say against `reward_range`, each with a way out.

    Args:
        zero_to_one: how a user sets `reward_range` for rewards of 0 and 1.
        bounds: what `reward_range` is to be.
    """
    if options.shaping.strength == 0:
        return []
    found = []
    if zeros := zeros_unmoved(rewards, options.reward_range):
        found.append(f"G2RL: {zeros} add {zero_to_one}")
    if left := range_left(rewards, options.reward_range):
        found.append(f"G2RL: {left}. Set reward_range to {bounds}")
    return found


class Once:
    """Says a thing once in a run, whatever numbers stand in it after its first parenthesis."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._said: set[str] = set()

    def __call__(self, message: str, level: int = logging.WARNING) -> None:
        key = message.partition("(")[0]
        if key not in self._said:
            self._said.add(key)
            self._logger.log(level, message)
