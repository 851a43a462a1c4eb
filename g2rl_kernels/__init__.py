"""Gradient features of a language model's head, and the G2RL group mathematics on them, as PyTorch ops.

Importing this package loads torch only; Triton and compiled code are loaded by the first op that uses them.
"""

import g2rl_kernels.interpreter  # noqa: F401
from g2rl_kernels.dispatch import explain, use_backend
from g2rl_kernels.ops.groups import (
    GroupAdvantages,
    Shaping,
    exploration_scores,
    g2rl_advantages,
    group_advantages,
    group_similarity,
    shape_rewards,
)
from g2rl_kernels.ops.head import LMHead, SequenceFeatures, TokenLogprobs, sequence_features, token_logprobs
from g2rl_kernels.ops.packing import pad, unpad
from g2rl_kernels.version import __version__

__all__ = [
    "__version__",
    "GroupAdvantages",
    "LMHead",
    "SequenceFeatures",
    "Shaping",
    "TokenLogprobs",
    "exploration_scores",
    "explain",
    "g2rl_advantages",
    "group_advantages",
    "group_similarity",
    "pad",
    "sequence_features",
    "shape_rewards",
    "token_logprobs",
    "unpad",
    "use_backend",
]
