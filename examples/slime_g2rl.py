"""Where G2RL goes in slime: `--custom-advantage-function-path examples.slime_g2rl.advantages`.

slime normalises rewards before the trainer sees them: `--disable-rewards-normalization` leaves that to this function.
Features come from the pass for old log-probabilities: `sequence_features` on the hidden states before the head, partial
sums of tensor-parallel ranks added up, kept as `rollout_data["g2rl_features"]`. Written from the sources of slime 0.3;
not run inside it.
"""

from typing import Any

import torch
import torch.distributed as dist

from g2rl_kernels import g2rl_advantages


def advantages(args: Any, rollout_data: dict[str, Any], group: Any = None) -> None:
    """Write `advantages` and `returns`, one tensor a response, each token of which has the response's advantage.

    Args:
        args: slime's; `n_samples_per_prompt` is the size of a group.
        rollout_data: this rank's "rewards" [b], "response_lengths" [b] and "g2rl_features" [b, d]; groups lie together
            in the order of ranks and may span them.
        group: the data-parallel process group; None without torch.distributed.
    """
    features = rollout_data["g2rl_features"]
    rewards = torch.as_tensor(rollout_data["rewards"], dtype=torch.float32, device=features.device)
    rank, everyone = 0, [(features.cpu(), rewards.cpu())]
    if dist.is_initialized():
        rank, everyone = dist.get_rank(group), [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (features.cpu(), rewards.cpu()), group)
    all_features, all_rewards = (torch.cat(parts) for parts in zip(*everyone, strict=True))
    result = g2rl_advantages(all_features, all_rewards, args.n_samples_per_prompt).advantages
    mine = result.split([len(part) for _, part in everyone])[rank]
    rollout_data["advantages"] = [
        value.expand(length).to(features.device)
        for value, length in zip(mine, rollout_data["response_lengths"], strict=True)
    ]
    rollout_data["returns"] = rollout_data["advantages"]
