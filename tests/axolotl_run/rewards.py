"""The reward function that axolotl imports, and a record of what its trainer makes of it."""

from __future__ import annotations

import os
from typing import Any

import torch

from g2rl.integrations.axolotl.trainer import G2RLTrainer
from tests.recorded import save

last: list[float] = []


def vowels(completions: list[Any], **_: Any) -> list[float]:
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    last[:] = [float(sum(c in "aeiou02468" for c in text) > 0.14 * len(text)) for text in texts]
    return list(last)


def recorded(self: Any, inputs: Any) -> Any:
    out = make_batch(self, inputs)
    rows = []
    for prompt, prompt_mask, response, mask in zip(
        out["prompt_ids"], out["prompt_mask"].bool(), out["completion_ids"], out["completion_mask"].bool(), strict=True
    ):
        ids = torch.cat([prompt[prompt_mask], response[mask]])
        rows.append((ids, torch.arange(len(ids)) >= int(prompt_mask.sum())))
    model = self.accelerator.unwrap_model(self.model)
    save(os.environ["RECORDS"], self.state.global_step, 0, model, rows, torch.tensor(last), out["advantages"])
    return out


make_batch, G2RLTrainer._generate_and_score_completions = G2RLTrainer._generate_and_score_completions, recorded
