"""The trainer of the plug-in for verl, on batches in a queue of Ray's: advantages against a float64 reference."""

from __future__ import annotations

import os

# verl reads this when it is imported, and so do the processes that Ray starts.
os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl_cpu"
os.environ["RAY_AUTH_MODE"] = "disabled"

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
import transfer_queue as tq
import verl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from g2rl.config import ConfigError
from g2rl.integrations.exploration import Options
from g2rl.integrations.verl.engine import FEATURES, REQUEST
from g2rl.integrations.verl.trainer import G2RLTrainer
from g2rl_kernels import Shaping, g2rl_advantages, use_backend

SETTINGS = (
    "trainer.v1.trainer_mode=g2rl_sync",
    "algorithm.adv_estimator=grpo",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.calculate_log_probs=False",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "transfer_queue.backend.SimpleStorage.total_storage_size=1000",
)


def configuration(*overrides: str) -> DictConfig:
    """verl's own configuration, as its command line makes it."""
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", overrides=[*SETTINGS, *overrides])


@pytest.fixture(scope="module")
def queue() -> Iterator[None]:
    ray.init(num_cpus=16, include_dashboard=False)
    tq.init(configuration().transfer_queue)
    yield
    tq.close()
    ray.shutdown()


# Sessions in the order in which verl balances them over ranks. The second session of a is an agent's of two outputs, of
# which the last counts; b's responses are all right; c has no peer. One row is padding.
KEYS = ("b_0_0", "a_1_0", "c_0_0", "a_0_0", "b_2_0", "pad1_0_0", "a_1_1", "b_1_0", "a_2_0", "a_3_0")
RIGHT = {"a_0", "a_1", "b_0", "b_1", "b_2"}
LENGTHS = (3, 2, 4, 1, 5, 1, 3, 2, 6, 2)
WRONG, D = -1.0, 8


def ragged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def fill_queue(wrong: float) -> KVBatchMeta:
    rewards = [1.0 if key.rsplit("_", 1)[0] in RIGHT else wrong for key in KEYS]
    scores = [torch.zeros(length) for length in LENGTHS]
    for row, reward in zip(scores, rewards, strict=True):
        row[-1] = reward
    scores[2][0] += 0.5  # a reward may be spread over tokens
    scores[2][-1] -= 0.5
    scores[5][:] = 0
    masks = [torch.ones(length, dtype=torch.int64) for length in LENGTHS]
    masks[5][:] = 0
    fields = {
        "rm_scores": ragged(scores),
        "response_mask": ragged(masks),
        "rollout_log_probs": ragged([-torch.rand(length) for length in LENGTHS]),
        "ref_log_prob": ragged([-torch.rand(length) for length in LENGTHS]),
    }
    data = TensorDict(fields, batch_size=len(KEYS))
    data["uid"] = [key.rsplit("_", 2)[0] for key in KEYS]
    tags = [{"is_padding": True} if key.startswith("pad") else {"status": "success"} for key in KEYS]
    return tq.kv_batch_put(keys=list(KEYS), partition_id="train", fields=data, tags=tags)


class Actors:
    """verl's group of actor processes: log-probabilities, entropy, and features where they are asked for."""

    def __init__(self, features: Tensor | None) -> None:
        self.features = features
        self.passes = 0

    def compute_log_prob(self, batch: KVBatchMeta) -> KVBatchMeta:
        assert batch.extra_info[REQUEST] is True and batch.extra_info["compute_loss"] is False
        assert batch.extra_info["temperature"] == 1.0
        self.passes += 1
        tokens = [-torch.rand(3 + length) for length in LENGTHS]
        fields = {"log_probs": ragged(tokens), "entropy": ragged(tokens)}
        if self.features is not None:
            fields[FEATURES] = ragged(list(self.features))
        return tq.kv_batch_put(keys=batch.keys, partition_id="train", fields=TensorDict(fields, batch_size=len(batch)))


def reference(features: Tensor, rewards: Tensor, options: Shaping) -> tuple[Tensor, Tensor]:
    """Shaped rewards and verl's GRPO advantages of each row in float64, one group after the other."""
    shaped, advantages = rewards.double(), torch.zeros(len(KEYS), dtype=torch.float64)
    for uid, rows in {"a": [3, 6, 8, 9], "b": [0, 7, 4], "c": [2]}.items():
        with use_backend("reference"):
            result = g2rl_advantages(features[rows].double(), rewards[rows].double(), len(rows), options)
        shaped[rows] = r = result.shaped_rewards
        advantages[rows] = r / (1 + 1e-6) if uid == "c" else (r - r.mean()) / (r.std() + 1e-6)
    shaped[1], advantages[1] = shaped[6], advantages[6]
    return shaped, advantages


CASES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "range": ("+g2rl.reward_range=[0,1]",),
    "dr-grpo": ("algorithm.norm_adv_by_std_in_grpo=False", "+g2rl.strength=0.5"),
    "kl-in-reward": ("algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0.0"),
    "bypass": ("algorithm.rollout_correction.bypass_mode=True",),
}


@pytest.mark.parametrize("name", CASES)
def test_advantages(name: str, queue: None, caplog: pytest.LogCaptureFixture) -> None:
    config = configuration("+g2rl.min_range=0", *CASES[name])
    with caplog.at_level(logging.INFO):
        trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    low, strength = 0 if name == "range" else -1, 0.5 if name == "dr-grpo" else 1
    assert f"G2RL: shaping rewards of {low} to 1 with strength {strength}" in caplog.messages
    assert type(trainer) is G2RLTrainer and type(trainer.replay_buffer) is ReplayBuffer
    assert trainer.trainer_mode == "sync" and config.trainer.v1.trainer_mode == "sync"
    features = torch.randn(len(KEYS), D, generator=torch.Generator().manual_seed(0))
    trainer.actor_rollout_wg = Actors(features)
    wrong = 0.0 if name == "range" else WRONG
    batch, metrics = fill_queue(wrong), {}
    with caplog.at_level(logging.INFO):
        batch = trainer._compute_old_log_prob(batch, metrics)
        assert trainer.actor_rollout_wg.passes == 1 and REQUEST not in batch.extra_info
        batch = trainer._compute_advantage(batch, metrics)
    names = ["advantages", "rm_scores", "token_level_rewards", "response_mask"]
    data = tq.kv_batch_get(keys=list(KEYS), partition_id="train", select_fields=names)
    rewards = torch.tensor([1.0 if key.rsplit("_", 1)[0] in RIGHT else -1.0 for key in KEYS])
    shaped, advantages = reference(features, rewards, trainer.options.shaping)
    if name == "range":
        rewards, shaped = (rewards + 1) / 2, (shaped + 1) / 2
    if name == "range":  # half the scale, half the standard deviation
        advantages = recomputed(shaped)
    if name == "dr-grpo":
        advantages = recomputed(shaped, normalize=False)
    sums = {key: torch.stack([row.double().sum() for row in data[key].unbind()]) for key in names[1:3]}
    real = torch.tensor([not key.startswith("pad") for key in KEYS])
    assert torch.equal(sums["rm_scores"][real], rewards[real].double()) and float(sums["rm_scores"][5]) == 0
    torch.testing.assert_close(sums["token_level_rewards"][real], shaped[real], rtol=0, atol=1e-6)
    assert float((shaped - rewards)[real].abs().max()) > 0.1
    for row in range(len(KEYS)):
        expected = advantages[row] if real[row] else torch.tensor(0.0)
        got = data["advantages"][row].double()
        torch.testing.assert_close(got, expected.double().expand_as(got), rtol=0, atol=5e-6)
    keys = {"mean_cosine", "negative_share", "score", "feature_norm", "degenerate_share"}
    assert {key for key in metrics if key.startswith("g2rl/")} == {f"g2rl/{key}" for key in keys}
    assert metrics["g2rl/degenerate_share"] == pytest.approx(1 / 3)  # c, of one response
    assert metrics["g2rl/feature_norm"] == pytest.approx(float(features[[3, 6, 8, 9, 0, 7, 4, 2]].norm(dim=1).mean()))
    assert ("this one is added" in caplog.text) == (name == "bypass")
    tq.kv_clear(keys=list(KEYS), partition_id="train")


def recomputed(shaped: Tensor, normalize: bool = True) -> Tensor:
    advantages = torch.zeros_like(shaped)
    for rows in ([3, 6, 8, 9], [0, 7, 4]):
        r = shaped[rows]
        advantages[rows] = (r - r.mean()) / (r.std() + 1e-6 if normalize else 1)
    advantages[2] = shaped[2] / (1 + 1e-6) if normalize else shaped[2]
    advantages[1] = advantages[6]
    return advantages


SEPARATE = (
    "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
    "actor_rollout_ref.rollout.nnodes=1",
    "data.train_batch_size=1024",
)


@pytest.mark.parametrize(("mode", "more"), [("colocate_async", ()), ("separate_async", SEPARATE)])
def test_asynchronous_modes_are_verls_own_with_shaped_rewards(mode: str, more: tuple[str, ...]) -> None:
    config = configuration(f"trainer.v1.trainer_mode=g2rl_{mode}", "+g2rl.strength=0.5", *more)
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    assert isinstance(trainer, get_trainer_cls(mode)) and type(trainer.replay_buffer) is ReplayBufferAsync
    assert trainer.trainer_mode == config.trainer.v1.trainer_mode == mode
    assert trainer.parameter_sync_step == (4 if mode == "separate_async" else 1)
    assert trainer.options == Options(Shaping(strength=0.5))
    with pytest.raises(ConfigError, match="found 'veomni'"):
        type(trainer)(configuration("actor_rollout_ref.actor.strategy=veomni", *more))


def test_missing_features_are_an_error(queue: None) -> None:
    trainer = G2RLTrainer(configuration())
    trainer.actor_rollout_wg = Actors(None)
    batch, metrics = fill_queue(WRONG), {}
    batch = trainer._compute_old_log_prob(batch, metrics)
    with pytest.raises(RuntimeError, match="expected features beside the actor's log-probabilities, found none"):
        trainer._compute_advantage(batch, metrics)
    tq.kv_clear(keys=list(KEYS), partition_id="train")


def test_rewards_of_0_are_warned_of_once(queue: None, caplog: pytest.LogCaptureFixture) -> None:
    trainer = G2RLTrainer(configuration())
    trainer.actor_rollout_wg = Actors(torch.randn(len(KEYS), D, generator=torch.Generator().manual_seed(0)))
    for _ in range(2):
        trainer._compute_advantage(trainer._compute_old_log_prob(fill_queue(0.0), {}), {})
    assert sum("+g2rl.reward_range=[0,1]" in message for message in caplog.messages) == 1
    tq.kv_clear(keys=list(KEYS), partition_id="train")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+g2rl.strenght=1"], "g2rl.strenght: expected one of strength, clip, .* found an unknown key"),
        (["+g2rl.strength=-1"], "g2rl.strength: expected a number from 0 to 1e18, found -1"),
        (["actor_rollout_ref.actor.strategy=veomni"], "strategy: expected fsdp, fsdp2 or megatron, found 'veomni'"),
        (
            ["model_engine=megatron", "actor_rollout_ref.model.use_fused_kernels=True"],
            "model.use_fused_kernels: expected False with G2RL's engine for Megatron, found True",
        ),
        (
            ["model_engine=megatron", "actor_rollout_ref.actor.megatron.use_megatron_fsdp=True"],
            "actor.megatron.use_megatron_fsdp: expected False",
        ),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        G2RLTrainer(configuration(*overrides))


def test_small_groups_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    G2RLTrainer(configuration("actor_rollout_ref.rollout.n=2"))
    assert "rollout.n: expected 3 or more, found 2" in caplog.text


@pytest.mark.parametrize(("more", "reward_range"), [([], (0.0, 1.0)), (["g2rl.reward_range=[-1,1]"], (-1.0, 1.0))])
def test_example(more: list[str], reward_range: tuple[float, float], tmp_path: Path) -> None:
    """What the launch script asks for is in verl's configuration, and the trainer takes it."""
    (tmp_path / "python3").write_text('#!/bin/sh\nshift 2\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    script = Path(__file__).parents[2] / "examples" / "verl_g2rl.sh"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [script, "model", "train.parquet", "test.parquet", "trainer.total_epochs=2", *more]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    config = configuration(*printed.splitlines())
    assert config.trainer.use_v1 and config.trainer.total_epochs == 2 and config.data.val_files == "test.parquet"
    assert get_trainer_cls(config.trainer.v1.trainer_mode)(config).options == Options(Shaping(), reward_range)
