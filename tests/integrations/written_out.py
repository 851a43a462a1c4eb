"""What a framework should make of rewards: features by autograd through logits, the paper's formulas in Python.

For checks inside frameworks, in float64. Nothing of the package is called.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


def features(model: Any, responses: Sequence[tuple[Tensor, Tensor]], temperature: float) -> Tensor:
    """Phi [B, d] of responses, each its token ids [L] with the prompt's, and which of them [L] are scored."""
    rows = []
    for ids, scored in responses:
        hidden = model.model(ids[None]).last_hidden_state.detach().requires_grad_()
        logps = (model.lm_head(hidden)[0, :-1] / temperature).log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        own = logps[scored[1:].bool()]
        (gradient,) = torch.autograd.grad(temperature * own.sum() / max(1, len(own)), hidden)
        rows.append(gradient.sum((0, 1)))
    return torch.stack(rows).double()


def shaped_rewards(
    Phi: Tensor,
    rewards: Sequence[float],
    prompts: Sequence[Hashable],
    reward_range: tuple[float, float] = (-1, 1),
    strength: float = 1.0,
    min_range: float = 1e-2,
) -> list[float]:
    """Equations 9 to 13 among responses of equal prompts; rewards of reward_range stand for -1 to 1."""
    middle, half = sum(reward_range) / 2, (reward_range[1] - reward_range[0]) / 2
    r = [(reward - middle) / half for reward in rewards]
    u = torch.nn.functional.normalize(Phi)
    S = (u @ u.mT).tolist()
    shaped = list(r)
    for prompt in dict.fromkeys(prompts):
        group = [i for i, other in enumerate(prompts) if other == prompt]
        scores = {i: score(i, [j for j in group if j != i], S, r) for i in group}
        low, high = min(scores.values()), max(scores.values())
        if high - low >= min_range:
            for i in group:
                shaped[i] = r[i] * (1 + strength * (scores[i] - low) / (high - low))
    return [middle + half * max(-3.0, min(3.0, value)) for value in shaped]


def advantages(rewards: Sequence[float], prompts: Sequence[Hashable], epsilon: float) -> list[float]:
    """GRPO's: less the mean of responses of equal prompts, over their deviation."""
    found = list(rewards)
    for prompt in dict.fromkeys(prompts):
        group = [i for i, other in enumerate(prompts) if other == prompt]
        mean = sum(rewards[i] for i in group) / len(group)
        variance = sum((rewards[i] - mean) ** 2 for i in group) / (len(group) - 1)
        for i in group:
            found[i] = (rewards[i] - mean) / (math.sqrt(variance) + epsilon)
    return found


def score(i: int, peers: list[int], S: list[list[float]], r: list[float]) -> float:
    """nu: how far response i lies from its rewarded peers."""
    total = sum(math.exp(r[j]) for j in peers)
    near = sum(math.exp(r[j]) / total * S[i][j] ** 2 for j in peers)
    return math.sqrt(max(0.0, 1 - near))
