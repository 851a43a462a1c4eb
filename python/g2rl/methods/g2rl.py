"""G2RL (Liang et al., arXiv 2512.15687): rewards shaped by how new each response's gradient direction is.

Needs features, the sensitivity Phi of each response (eq. 8), which the update's own forward pass yields.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from g2rl.config import Config
from g2rl.geometry import degenerate
from g2rl.methods.base import Method, Step
from g2rl.reward_range import (
    PLAIN,
    mapped,
    range_left,
    read_range,
    shape_mapped,
    without_zeros_warning,
    zeros_unmoved,
)
from g2rl_kernels import GroupAdvantages, Shaping, g2rl_advantages, group_advantages


@dataclass(frozen=True)
class G2RLOptions(Shaping):
    reward_range: list[float] = field(default_factory=lambda: list(PLAIN))
    """Lowest and highest sum of rewards, mapped to -1 and 1 for shaping: [0, 1] for rewards of 0 and 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        read_range("reward_range", self.reward_range)


class G2RL(Method):
    """Equations 9 to 13; what the paper leaves open is an option of `g2rl_kernels.Shaping`."""

    name = "g2rl"
    Options = G2RLOptions
    needs_features = True

    def __init__(self, options: Any, config: Config) -> None:
        super().__init__(options, config)
        self._range = read_range("reward_range", options.reward_range)
        self._warned = False

    def advantages(self, step: Step) -> GroupAdvantages:
        assert step.features is not None
        self._warn(step.rewards)
        m, normalize = step.group_size, self.config.objective.normalize
        if self._range == PLAIN:
            with without_zeros_warning():
                return g2rl_advantages(step.features, step.rewards, m, self.options, normalize=normalize)
        shaped, result = shape_mapped(step.features, step.rewards, m, self.options, self._range)
        return result._replace(advantages=group_advantages(shaped, m, normalize), shaped_rewards=shaped)

    def metrics(self, step: Step, result: GroupAdvantages) -> dict[str, float]:
        assert step.features is not None
        valid = (step.features.norm(dim=1) > 0).view(-1, step.group_size)
        unshaped = degenerate(result.scores.view_as(valid), valid, self.options.min_range)
        raw, shaped = (mapped(rewards, self._range).abs() for rewards in (step.rewards, result.shaped_rewards))
        clipped = shaped >= raw.clamp(min=self.options.clip) * (1 - 1e-6)  # mapped there and back
        return {
            "groups/degenerate_share": float(unshaped.float().mean()),
            "geometry/clip_share": float(clipped.float().mean()),
        }

    def _warn(self, rewards: torch.Tensor) -> None:
        """Say once where rewards are not of their range."""
        if self._warned or self.options.strength == 0:
            return
        if zeros := zeros_unmoved(rewards, self._range):
            said = f"{zeros} set methods.g2rl.reward_range=[0,1]"
        elif self._range == PLAIN and float(rewards.min()) < 0:
            return  # a bonus or penalty beside -1 and 1: the middle is where it was
        elif left := range_left(rewards, self._range):
            said = f"{left}. Set methods.g2rl.reward_range to the lowest and highest sum of rewards"
        else:
            return
        self._warned = True
        warnings.warn(f"g2rl: {said}", RuntimeWarning, 3)
