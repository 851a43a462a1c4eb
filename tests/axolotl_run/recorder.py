"""A plug-in of axolotl that records what its trainer makes of rewards."""

from __future__ import annotations

import os
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin

from tests.integrations.recorded import rows_of, save


class Recorder(BasePlugin):
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        generate_and_score = trainer._generate_and_score_completions

        def recorded(inputs: list[dict[str, Any]]) -> dict[str, Any]:
            output: dict[str, Any] = generate_and_score(inputs)
            record(trainer, output)
            return output

        trainer._generate_and_score_completions = recorded


def record(trainer: Any, output: dict[str, Any]) -> None:
    rows = rows_of(output)
    rank = trainer.accelerator.process_index
    rewards = torch.tensor(trainer._logs["rewards"]["vowels"])[rank * len(rows) : (rank + 1) * len(rows)]
    model = trainer.accelerator.unwrap_model(trainer.model)
    save(os.environ["RECORDS"], trainer.state.global_step, rank, model, rows, rewards, output["advantages"])
