"""Entropy bonus: GRPO whose objective also has the mean next-token entropy, over the whole vocabulary at temperature T.

The bonus itself is a term of the loss (`objective.entropy_coef`), and needs nothing but the entropy that every update
computes anyway, with gradient. It is the classic regulariser of policy gradients (Williams & Peng 1991; Mnih et al.,
A3C, arXiv 1602.01783) and a baseline of the G2RL paper (arXiv 2512.15687), which does not give its coefficient.
"""

from __future__ import annotations

from typing import Any

from g2rl.config import Config, ConfigError
from g2rl.methods.grpo import GRPO


class EntropyBonus(GRPO):
    name = "entropy"

    def __init__(self, options: Any, config: Config) -> None:
        super().__init__(options, config)
        if config.objective.entropy_coef == 0:
            raise ConfigError(
                "objective.entropy_coef: expected a value greater than 0 with method entropy, found 0; "
                "without a bonus the method is grpo"
            )
