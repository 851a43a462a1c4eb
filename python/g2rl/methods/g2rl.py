"""G2RL (Liang et al., arXiv 2512.15687): rewards shaped by how new each response's gradient direction is.

Needs features, the sensitivity Phi of each response (eq. 8), which the update's own forward pass yields.
"""

from __future__ import annotations

from g2rl.geometry import degenerate
from g2rl.methods.base import Method, Step
from g2rl_kernels import GroupAdvantages, Shaping, g2rl_advantages


class G2RL(Method):
    """Equations 9 to 13; what the paper leaves open is an option of `g2rl_kernels.Shaping`."""

    name = "g2rl"
    Options = Shaping
    needs_features = True

    def advantages(self, step: Step) -> GroupAdvantages:
        assert step.features is not None
        normalize = self.config.objective.normalize
        return g2rl_advantages(step.features, step.rewards, step.group_size, self.options, normalize=normalize)

    def metrics(self, step: Step, result: GroupAdvantages) -> dict[str, float]:
        assert step.features is not None
        valid = (step.features.norm(dim=1) > 0).view(-1, step.group_size)
        unshaped = degenerate(result.scores.view_as(valid), valid, self.options.min_range)
        clipped = result.shaped_rewards.abs() >= step.rewards.abs().clamp(min=self.options.clip)
        return {
            "groups/degenerate_share": float(unshaped.float().mean()),
            "geometry/clip_share": float(clipped.float().mean()),
        }
