"""The examples run, and print what their comments promise."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from examples.openrlhf_g2rl import policy_features, shape_experiences
from examples.slime_g2rl import advantages
from g2rl_kernels import g2rl_advantages

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_drop_in() -> None:
    run = subprocess.run([sys.executable, EXAMPLES / "drop_in.py"], capture_output=True, text=True, check=True)
    lines = {line[:16].strip(): line[16:].strip() for line in run.stdout.splitlines()}
    rewards, shaped = ast.literal_eval(lines["rewards"]), ast.literal_eval(lines["shaped rewards"])
    advantages = ast.literal_eval(lines["advantages"])
    assert all(1 <= r / base <= 2 for base, r in zip(rewards, shaped, strict=True))
    assert max(r / base for base, r in zip(rewards, shaped, strict=True)) == 2
    assert abs(sum(advantages[:4])) < 5e-3  # printed with three decimals
    assert float(lines["head gradient"]) > 0


def test_openrlhf_shapes_groups_that_lie_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    features, rewards = torch.randn(8, 5, generator=generator), torch.tensor([1.0, -1, 1, -1, 1, 1, -1, -1])
    want = g2rl_advantages(features, rewards, 4).shaped_rewards
    parts = [torch.tensor(part) for part in ([6, 0, 3], [1, 7, 2, 5, 4])]
    experiences = [SimpleNamespace(index=p, rewards=rewards[p], info={"g2rl_features": features[p]}) for p in parts]
    shape_experiences(experiences, 4)
    for part, experience in zip(parts, experiences, strict=True):
        assert torch.equal(experience.rewards, want[part])


def test_openrlhf_features_are_of_the_actions(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(24).view(2, 12)
    action_mask = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 0, 0, 0]])
    found = policy_features(model, ids, torch.ones_like(ids), action_mask, 0.7)
    hidden = model.model(ids).last_hidden_state.detach().requires_grad_()
    logps = (model.lm_head(hidden)[:, 6:11] / 0.7).log_softmax(-1).gather(-1, ids[:, 7:, None])[..., 0]
    means = (logps * action_mask).sum(1) / action_mask.sum(1)
    (gradient,) = torch.autograd.grad(means.sum(), hidden)
    torch.testing.assert_close(found, 0.7 * gradient.sum(1), rtol=1e-5, atol=1e-6)


def test_slime_advantages_are_those_of_the_op() -> None:
    features, rewards = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), [1.0, -1, 1, -1, 1, 1, -1, -1]
    data = {"g2rl_features": features, "rewards": rewards, "response_lengths": [1, 2, 3, 1, 2, 3, 1, 0]}
    advantages(SimpleNamespace(n_samples_per_prompt=4), data)
    want = g2rl_advantages(features, torch.tensor(rewards), 4).advantages
    assert [len(row) for row in data["advantages"]] == data["response_lengths"]
    assert all(torch.equal(row, value.expand(len(row))) for row, value in zip(data["advantages"], want, strict=True))


def test_trl_takes_a_step(tmp_path: Path) -> None:
    options = "--max_steps 1 --per_device_train_batch_size 8 --max_completion_length 4 --eval_strategy no"
    options += f" --eval_on_start False --output_dir {tmp_path} --bf16 False"
    command = [sys.executable, EXAMPLES / "trl_g2rl.py", *options.split()]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "g2rl/mean_cosine" in run.stdout and "rewards/g2rl_bonus/mean" in run.stdout
