"""One right call of every op, for campaigns that make the same calls again and again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from g2rl_kernels import (
    LMHead,
    exploration_scores,
    g2rl_advantages,
    group_advantages,
    group_similarity,
    pad,
    sequence_features,
    shape_rewards,
    testing,
    token_logprobs,
    unpad,
)
from g2rl_kernels.testing import OPTIONS, Shape

Example = Callable[[], tuple[Tensor, ...]]
SHAPE = Shape((5, 0, 7, 4), 24, 130, "")


def examples(seed: int = 0) -> dict[str, Example]:
    """Functions that call an op, by its name; `seed` draws its arguments."""
    s = testing.head_sample(SHAPE, torch.bfloat16, options=OPTIONS["together"], seed=seed)
    random = torch.Generator().manual_seed(seed)
    upstream = torch.randn(2, SHAPE.N, generator=random)
    features, rewards = torch.randn(12, 24, generator=random), torch.randn(12, generator=random)
    similarity, scores = group_similarity(features, 4), torch.rand(12, generator=random)
    mask, padded = torch.rand(3, 9, generator=random) > 0.4, torch.randn(3, 9, 5, generator=random)
    packed = padded[mask]

    def head_gradients() -> tuple[Tensor, ...]:
        found = testing.gradients(s, upstream[0], upstream[1])
        return tuple(x for x in found if x is not None)

    return {
        "LMHead": lambda: LMHead(s.head.weight, s.head.bias, 0.9).tensors[:1],
        "token_logprobs": lambda: token_logprobs(s.hidden, s.head, s.targets),
        "sequence_features": lambda: sequence_features(s.hidden, s.head, s.targets, s.cu_seqlens, s.token_weights),
        "head_gradients": head_gradients,
        "group_similarity": lambda: (group_similarity(features, 4),),
        "exploration_scores": lambda: (exploration_scores(similarity, rewards, 4),),
        "shape_rewards": lambda: (shape_rewards(rewards, scores, 4),),
        "group_advantages": lambda: (group_advantages(rewards, 4),),
        "g2rl_advantages": lambda: g2rl_advantages(features, rewards, 4),
        "unpad": lambda: unpad(padded, mask),
        "pad": lambda: (pad(packed, mask),),
    }
