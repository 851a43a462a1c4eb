"""Where G2RL goes in OpenRLHF: two functions for classes of an entry script of your own.

`RemoteExperienceMaker.make_experience` always runs the policy without gradient for old log-probabilities: the worker
that does so also returns features. `compute_advantages_and_returns` normalises rewards by group: they are shaped
before. Written from the sources of OpenRLHF 0.11; not run inside it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from g2rl.integrations.head_pass import HeadPass
from g2rl_kernels import Shaping, g2rl_advantages


@torch.no_grad()
def policy_features(
    model: Any, sequences: torch.Tensor, attention_mask: torch.Tensor, action_mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Features [B, d] for a method `forward_with_features` of the policy's worker.

    Args:
        model: the causal language model inside the actor, with LoRA or without.
        sequences, attention_mask: [B, L]. action_mask: [B, A]; 1 on the last A tokens that the policy chose itself.
    """
    if hasattr(model, "get_base_model"):  # PEFT's, with its layers inside
        model = model.get_base_model()
    hidden = model.base_model(input_ids=sequences, attention_mask=attention_mask).last_hidden_state
    own = torch.zeros_like(sequences, dtype=torch.bool)
    own[:, -action_mask.shape[1] :] = action_mask.bool()
    return HeadPass(sequences, own, own.float(), temperature)(model, hidden).features


def shape_experiences(experiences: Sequence[Any], samples: int, shaping: Shaping | None = None) -> None:
    """Rewrite `rewards` of experiences; the first line of an own `compute_advantages_and_returns`.

    Args:
        experiences: with index [b], rewards [b] and info["g2rl_features"] [b, d]; groups lie together in the order of
            index, `samples` responses each.
    """
    index = torch.cat([torch.as_tensor(experience.index) for experience in experiences])
    features = torch.cat([experience.info["g2rl_features"] for experience in experiences])
    rewards = torch.cat([experience.rewards for experience in experiences]).float()
    order = index.argsort()
    shaped = torch.empty_like(rewards)
    shaped[order] = g2rl_advantages(features[order], rewards[order], samples, shaping).shaped_rewards
    for experience, part in zip(experiences, shaped.split([len(e.rewards) for e in experiences]), strict=True):
        experience.rewards = part
