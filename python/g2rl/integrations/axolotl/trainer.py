"""The trainer. It is apart from the plugin since importing it fixes axolotl's training arguments, plugins included."""

from __future__ import annotations

from axolotl.core.trainers.grpo.trainer import AxolotlGRPOTrainer

from g2rl.integrations.trl import G2RLMixin


class G2RLTrainer(G2RLMixin, AxolotlGRPOTrainer):  # type: ignore[misc]
    """axolotl's GRPO trainer with rewards shaped by G2RL."""
