"""G2RL in axolotl: two lines of YAML beside ``rl: grpo``, and a third for options that are not to be the defaults.

    plugins: [g2rl.integrations.axolotl.G2RLPlugin]
    trainer_cls: g2rl.integrations.axolotl.trainer.G2RLTrainer
    g2rl: {reward_range: [0, 1]}

axolotl goes on without a plugin that it cannot import, but not without the trainer that it is told to take.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from g2rl.integrations.exploration import require_plain


class G2RLSection(BaseModel, extra="forbid"):
    """Fields of `g2rl.integrations.trl.G2RLOptions`, whose defaults hold; others, such as axolotl's, are refused."""

    strength: float | None = None
    clip: float | None = None
    rule: str | None = None
    min_range: float | None = None
    uniform_groups: str | None = None
    reward_range: list[float] | None = None
    fused_logprobs: bool | None = None


class G2RLInput(BaseModel):
    """What the plugin adds to a YAML file."""

    g2rl: G2RLSection | None = None


class G2RLPlugin(BasePlugin):  # type: ignore[misc]
    """Brings those fields into axolotl's training arguments, where its trainer here looks for them."""

    def get_input_args(self) -> str:
        return f"{__name__}.{G2RLInput.__name__}"

    def get_training_args_mixin(self) -> str:
        return "g2rl.integrations.trl.G2RLOptions"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Options; raises ValueError where no `trainer_cls` would heed them, or where it would displace another."""
        if not cfg.trainer_cls:
            raise ValueError(f"trainer_cls: expected {__name__}.trainer.G2RLTrainer beside the plugin, found none")
        trl = cfg.trl or {}
        require_plain(
            [
                ("context_parallel_size", cfg.context_parallel_size or 1, 1),
                ("trl.async_prefetch", bool(trl.get("async_prefetch")), False),
                ("trl.use_data_producer", bool(trl.get("use_data_producer")), False),
            ]
        )
        return dict(cfg.g2rl or {})
