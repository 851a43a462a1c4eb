"""The records that travel through a training step, in the order in which they come to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Problem:
    """One question and what a verifier needs to judge an answer to it.

    Attributes:
        id: unique inside its task; what logs and evaluation tables show.
        prompt: the user's message, before the chat template.
        answer: the expected final answer as text.
        data: whatever else the task's verifier or a reward of one's own may need: `entry` of reasoning-gym, the whole
            `row` of task jsonl, `options` of a choice.
    """

    id: str
    prompt: str
    answer: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Episode:
    """One sampled response.

    Attributes:
        problem: what was asked.
        prompt_ids: token ids of the rendered prompt, without padding.
        response_ids: sampled token ids, the end-of-sequence token included when it was reached.
        text: the decoded response, special tokens removed.
        finished: True when the response ended by itself, False when the token limit cut it off.
        logps: of the sampled tokens, under the distribution that the engine drew them from; None where it does not say.
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    text: str
    finished: bool
    logps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Verdict:
    """What the reward functions said of one episode.

    Attributes:
        reward: weighted sum of the reward functions.
        correct: the task's own judgement, independent of the reward functions' weights.
        parts: each reward function's value before weighting, by name.
        answer: the extracted final answer, None when there was none.
    """

    reward: float
    correct: bool
    parts: dict[str, float]
    answer: str | None

    @property
    def summands(self) -> dict[str, float]:
        """`parts` where there are several; a single one says no more than the reward does."""
        return self.parts if len(self.parts) > 1 else {}


@dataclass(frozen=True)
class Batch:
    """Whole groups of episodes as tensors, or a piece of one group: what one forward pass takes.

    B episodes, L = longest prompt + response, N = response tokens of the whole batch.

    Attributes:
        input_ids: [B, L] int64; prompts and responses left-padded together, so that every response ends at L.
        attention_mask: [B, L] int64; 0 on padding.
        response_mask: [B, L] bool; True on response tokens.
        group_size: m; episode i belongs to group i // m.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    response_mask: torch.Tensor
    group_size: int
