"""TorchRL's environment, wrappers, buffer and loss on a CPU with examples/torchrl_g2rl.py between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, MCAdvantage
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import torchrl_g2rl
from g2rl.integrations.exploration import Options
from g2rl_kernels import Shaping
from tests.g2rl.conftest import build_model
from tests.integrations import written_out
from tests.integrations.recorded import TOLERANCE, shaped_rewards

GROUP = 4
# Prompts of different lengths; groups in no order, one of them without a right answer.
PROMPTS = ["1+1=?", "20+3=? now", "say a", "a much longer question 5*5"]
ORDER = [3, 0, 2, 1, 1, 2, 0, 3, 2, 2, 1, 0, 3, 3, 0, 1]
RIGHT = [0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]


@pytest.fixture
def rollouts(tmp_path: Path) -> tuple[TransformersWrapper, TensorDictBase]:
    """The wrapper whose distribution the loss takes, and a batch of responses with rewards of 0 and 1."""
    folder = build_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    sampling = {"max_new_tokens": 40, "do_sample": True, "temperature": 1.0, "top_k": len(tokenizer)}
    policy = TransformersWrapper(model, tokenizer=tokenizer, input_mode="text", generate_kwargs=sampling)
    actor = TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False)
    env = ChatEnv(batch_size=(len(ORDER),), input_mode="text", tokenizer=tokenizer)
    torch.manual_seed(1)
    batch = policy(env.reset(TensorDict(query=[PROMPTS[i] for i in ORDER], batch_size=env.batch_size)))
    rewards = torch.tensor(RIGHT).float()[:, None, None]
    done = torch.ones(len(ORDER), 1, dtype=torch.bool)
    batch["next"] = TensorDict({"reward": rewards, "done": done}, env.batch_size)
    batch["at"] = torch.arange(len(ORDER))  # MCAdvantage puts groups together
    return actor, batch


def advantages(batch: TensorDictBase) -> list[float]:
    rows = {int(row["at"]): row["advantage"] for row in MCAdvantage(GROUP).inv(batch.copy()).unbind(0)}
    assert all(bool((rows[i] == rows[i].flatten()[0]).all()) for i in rows)  # one for all of a response's tokens
    return [float(rows[i].flatten()[0]) for i in range(len(rows))]


def shaped(actor: Any, batch: TensorDictBase, strength: float) -> tuple[TensorDictBase, dict[str, float]]:
    """By a copy of the rows, as `G2RL` changes them."""
    g2rl = torchrl_g2rl.G2RL(actor, Options(Shaping(strength=strength), reward_range=(0.0, 1.0)))
    return g2rl(lazy_stack([row.copy() for row in batch.unbind(0)]))


def test_advantages_are_those_of_the_formulas(rollouts: tuple[TransformersWrapper, TensorDictBase]) -> None:
    """And the rewards that the batch came with are left as they were."""
    actor, batch = rollouts
    found, metrics = shaped(actor, batch, strength=1.0)
    assert metrics["feature_norm"] > 0
    rows = []
    for row in batch.unbind(0):
        ids = row["tokens", "full"]
        rows.append((ids, torch.arange(len(ids)) >= len(ids) - len(row["tokens", "response"])))
    assert len({int(scored.sum()) for _, scored in rows}) > 3
    exact = AutoModelForCausalLM.from_config(actor.model.config, attn_implementation="eager").double()
    exact.load_state_dict(actor.model.state_dict())
    expected = written_out.advantages(shaped_rewards(exact, rows, RIGHT, ORDER, 1.0), ORDER, epsilon=1e-6)
    assert max(abs(one - other) for one, other in zip(advantages(found), expected, strict=True)) < TOLERANCE
    assert [float(row["next", "reward"]) for row in batch.unbind(0)] == RIGHT


def test_without_strength_they_are_torchrls(rollouts: tuple[TransformersWrapper, TensorDictBase]) -> None:
    actor, batch = rollouts
    assert advantages(shaped(actor, batch, strength=0.0)[0]) == advantages(batch)


def test_log_probabilities_are_those_of_the_loss(rollouts: tuple[TransformersWrapper, TensorDictBase]) -> None:
    """On-policy its ratios are 1, and its gradient reaches every weight."""
    actor, batch = rollouts
    whole = MCAdvantage(GROUP).inv(shaped(actor, batch, strength=1.0)[0])
    loss = GRPOLoss(actor, entropy_bonus=False)(whole)
    assert abs(float(loss.kl_approx)) < 1e-5 and float(loss.clip_fraction) == 0
    loss.loss_objective.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in actor.model.parameters())


def test_the_example_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps, mini-batches that cut groups."""
    sizes = {"STEPS": 2, "PROMPTS": 3, "SAMPLES": 4, "TOKENS": 8, "MINI_BATCH": 5}
    for name, value in sizes.items():
        monkeypatch.setattr(torchrl_g2rl, name, value)
    monkeypatch.setattr("sys.argv", ["torchrl_g2rl.py", str(build_model(tmp_path / "model"))])
    torchrl_g2rl.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/2", "step 2/2"]
    assert all("  mean_cosine " in line for line in lines)
