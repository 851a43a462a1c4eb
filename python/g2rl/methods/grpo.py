"""GRPO (Shao et al., DeepSeekMath, arXiv 2402.03300): rewards relative to their group. Needs rewards alone."""

from __future__ import annotations

from g2rl.methods.base import Method, Step, describe
from g2rl_kernels import GroupAdvantages, group_advantages


class GRPO(Method):
    name = "grpo"
    shapes = False

    def advantages(self, step: Step) -> GroupAdvantages:
        advantages = group_advantages(step.rewards, step.group_size, self.config.objective.normalize)
        return describe(step, advantages, step.rewards)
