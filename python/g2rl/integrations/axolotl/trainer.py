"""The trainer. It is apart from the plugin since importing it fixes axolotl's training arguments, plugins included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from axolotl.core.trainers.grpo.trainer import AxolotlGRPOTrainer

from g2rl.integrations.trl import G2RLMixin, G2RLOptions


class G2RLTrainer(G2RLMixin, AxolotlGRPOTrainer):  # type: ignore[misc]
    """axolotl's GRPO trainer with rewards shaped by G2RL."""

    def _check_arguments(self, given: Iterable[Any]) -> None:
        given = list(given)
        if not any(isinstance(value, G2RLOptions) for value in given):
            raise ValueError("plugins: expected g2rl.integrations.axolotl.G2RLPlugin beside trainer_cls, found none")
        super()._check_arguments(given)
