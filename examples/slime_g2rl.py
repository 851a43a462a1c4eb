"""Where G2RL goes in slime: `--custom-advantage-function-path examples.slime_g2rl.advantages`.

slime normalises rewards before the trainer sees them: `--disable-rewards-normalization` leaves that to this function.
Features come from the pass for old log-probabilities, with `g2rl.integrations.megatron.run_alongside` around the
model's call, and are kept as `rollout_data["g2rl_features"]`, alike on tensor- and context-parallel ranks. slime deals
samples out over data-parallel ranks one by one or by length: indices put groups together again. Written from the
sources of slime 0.3; not run inside it.
"""

from typing import Any

import torch
import torch.distributed as dist

from g2rl_kernels import g2rl_advantages


def advantages(args: Any, rollout_data: dict[str, Any], group: Any = None) -> None:
    """Write `advantages` and `returns`, one tensor a response, each token of which has the response's advantage.

    Args:
        args: slime's; `n_samples_per_prompt` is the size of a group.
        rollout_data: this rank's "rewards" [b], "sample_indices" [b], "g2rl_features" [b, d], and "kl", a tensor a
            response with what this rank has of its tokens; groups are whole and lie together in the order of indices,
            whichever ranks have their samples.
        group: the data-parallel process group; None takes Megatron's, and none without torch.distributed.
    """
    features = rollout_data["g2rl_features"]
    rewards = torch.as_tensor(rollout_data["rewards"], dtype=torch.float32)
    part = (features.cpu(), rewards, torch.as_tensor(rollout_data["sample_indices"]))
    rank, everyone = 0, [part]
    if dist.is_initialized():
        group = group or _data_parallel_group()
        rank, everyone = dist.get_rank(group), [part] * dist.get_world_size(group)
        dist.all_gather_object(everyone, part, group)
    all_features, all_rewards, indices = (torch.cat(parts) for parts in zip(*everyone, strict=True))
    order = indices.argsort()
    result = torch.empty_like(all_rewards)
    result[order] = g2rl_advantages(all_features[order], all_rewards[order], args.n_samples_per_prompt).advantages
    mine = result.split([len(rewards) for _, rewards, _ in everyone])[rank]
    rollout_data["advantages"] = [
        torch.full_like(kl, value) for value, kl in zip(mine.tolist(), rollout_data["kl"], strict=True)
    ]
    rollout_data["returns"] = list(rollout_data["advantages"])


def _data_parallel_group() -> Any:
    """Of the ranks that have other samples, not other parts of the same: without those of context parallelism."""
    from megatron.core import mpu

    return mpu.get_data_parallel_group()
