"""Rewards of any range, shaped as if it were -1 to 1: scaling moves no 0, and wrong answers have to lie below it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch

from g2rl_kernels import GroupAdvantages, Shaping, g2rl_advantages

Range = tuple[float, float]

PLAIN: Range = (-1.0, 1.0)


def read_range(name: str, value: Any) -> Range:
    """Lowest and highest reward, of an option of this name; raises ValueError for anything else."""
    numbers = isinstance(value, Sequence) and all(isinstance(x, Real) and not isinstance(x, bool) for x in value)
    if not (numbers and len(value) == 2 and -math.inf < value[0] < value[1] < math.inf):
        raise ValueError(f"{name}: expected two finite numbers, the lower one first, found {value!r}")
    return float(value[0]), float(value[1])


def mapped(rewards: torch.Tensor, reward_range: Range) -> torch.Tensor:
    """Rewards with their range mapped to -1 to 1."""
    low, high = reward_range
    return (rewards - (high + low) / 2) / ((high - low) / 2)


def shape_mapped(
    features: torch.Tensor,
    rewards: torch.Tensor,
    groups: int | torch.Tensor,
    shaping: Shaping,
    reward_range: Range,
    valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, GroupAdvantages]:
    """Rewards shaped as if their range were -1 to 1.

    Args:
        features, groups, shaping, valid: as in `g2rl_advantages`.
        rewards: [B], raw.
        reward_range: lowest and highest reward.

    Returns:
        shaped rewards [B] in the scale of the raw ones, which they are where nothing shapes them, bit by bit; and what
        `g2rl_advantages` says of the mapped ones.
    """
    inner = mapped(rewards, reward_range)
    with without_zeros_warning():
        result = g2rl_advantages(features, inner, groups, shaping, valid)
    if shaping.strength == 0:
        return rewards, result
    low, high = reward_range
    # In one dtype, or a reward of another, such as fp64, would move by its rounding.
    return rewards + (result.shaped_rewards - inner.to(result.shaped_rewards)) * ((high - low) / 2), result


@contextmanager
def without_zeros_warning() -> Iterator[None]:
    """`g2rl_advantages` says nothing of rewards of 0 and 1: who knows their range says it in words of other options."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rewards: found only 0 and 1")
        yield


def has_unmoved_zeros(rewards: torch.Tensor) -> bool:
    """Whether rewards [B] look like 0 for wrong and more for right, which scaling cannot tell apart as it should."""
    return bool((rewards == 0).any()) and bool((rewards >= 0).all())


def zeros_unmoved(rewards: torch.Tensor, reward_range: Range) -> str:
    """What is wrong where rewards [B] of 0 are taken for the middle of -1 to 1, up to the way out; else empty."""
    if reward_range != PLAIN or not has_unmoved_zeros(rewards):
        return ""
    return "rewards of 0 are not moved by scaling, so that wrong answers get no signal; for rewards of 0 and 1"


def range_left(rewards: torch.Tensor, reward_range: Range) -> str:
    """What is wrong where rewards [B] leave their range by more than rounding; else empty."""
    low, high = reward_range
    slack = 1e-5 * (high - low)
    if rewards.numel() == 0 or (low - slack <= float(rewards.min()) and float(rewards.max()) <= high + slack):
        return ""
    return (
        f"rewards leave reward_range ({low:g} to {high:g}; found {float(rewards.min()):g} to "
        f"{float(rewards.max()):g}), whose middle parts wrong answers from right ones, and shaped rewards stay within "
        "clip times half of it: far outside little is shaped"
    )
