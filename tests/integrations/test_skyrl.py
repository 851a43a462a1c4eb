"""The trainer and the policy's worker for SkyRL, around stand-ins that hand batches on as its own do."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from g2rl.config import ConfigError
from g2rl.integrations.head_pass import causal_lm_inside
from g2rl_kernels import Shaping, g2rl_advantages
from tests.integrations import written_out

NAME = "g2rl.integrations.skyrl"
TEMPERATURE = 0.7


class Batch(dict[str, Any]):
    """SkyRL's `TensorBatch`."""

    metadata: dict[str, Any]

    def take(self, rows: list[int]) -> Batch:
        return Batch({name: value[rows] for name, value in self.items()})


class Wrapper(torch.nn.Module):
    """SkyRL's `HFModelWrapper`: its log-probabilities of the last T tokens."""

    def __init__(self, model: Any, remove_microbatch_padding: bool) -> None:
        super().__init__()
        self.model, self.remove_microbatch_padding = model, remove_microbatch_padding

    def forward(self, ids: Tensor, T: int, mask: Tensor) -> Tensor:
        causal_lm = causal_lm_inside(self.model)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = causal_lm.model(ids, attention_mask=mask, position_ids=places).last_hidden_state
        if self.remove_microbatch_padding:
            logits = torch.zeros(*ids.shape, causal_lm.config.vocab_size)
            logits[mask.bool()] = causal_lm.lm_head(hidden[mask.bool()][None])[0]
        else:
            logits = causal_lm.lm_head(hidden)
        logps = (logits / TEMPERATURE).log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
        return logps[:, -T - 1 : -1]


class Worker:
    """SkyRL's `FSDPPolicyWorkerBase`, whose micro-batches by numbers of tokens hold rows in any order."""

    sequence_parallel_size = 1
    cfg = SimpleNamespace(algorithm=SimpleNamespace(temperature=TEMPERATURE))

    def init_model(self, model: Wrapper) -> None:
        self.model = model

    def forward(self, data: Batch) -> Tensor:
        parts = [[5, 1], [0, 2, 3], [7, 4, 6]]
        found = [self._forward_micro_batch(data.take(part))["output"] for part in parts]
        return torch.cat(found)[torch.tensor(sum(parts, [])).argsort()]

    def _forward_micro_batch(self, micro_batch: Batch) -> Batch:
        ids, mask = micro_batch["sequences"], micro_batch["attention_mask"]
        for name, value in micro_batch.items():
            micro_batch[name] = value.to("meta")  # as SkyRL's batch lies on a GPU from here on
        with torch.no_grad():
            return Batch(output=self.model(ids, 5, mask))


class Trainer:
    """SkyRL's `RayPPOTrainer`."""

    def __init__(self, cfg: Any, worker: Worker, skips: bool = False) -> None:
        self.cfg, self.worker, self.skips, self.all_metrics = cfg, worker, skips, dict[str, float]()

    def build_models(self, *workers: Any) -> None:
        self.workers = workers

    def fwd_logprobs_values_reward(self, batch: Batch) -> Batch:
        data = Batch({name: batch[name] for name in ("sequences", "attention_mask")})
        self._execute_forward_pass("ref", data, key="logprobs", mini_batch_boundaries=None)
        if not self._skip_policy_forward(batch):
            found = self._execute_forward_pass("policy", data, key="logprobs", mini_batch_boundaries=[(0, 8)])
            batch["action_log_probs"] = found
        return batch

    def _skip_policy_forward(self, batch: Batch) -> bool:
        return self.skips

    def _execute_forward_pass(self, model: str, data: Batch, key: str, mini_batch_boundaries: Any) -> Tensor:
        assert key == "logprobs" and ("loss_mask" in data) == (model == "policy")
        return self.worker.forward(data)


class AsyncTrainer(Trainer):
    """SkyRL's `FullyAsyncRayPPOTrainer`, which calls the same methods."""


class Exp:
    """SkyRL's `BasePPOExp`."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    def run(self) -> None:
        self.trainer = self.get_trainer(cfg=self.cfg, worker=None)


@dataclass
class Config:
    """SkyRL's `SkyRLTrainConfig`."""

    trainer: Any = None
    generator: Any = None

    @classmethod
    def from_cli_overrides(cls, arguments: list[str]) -> Any:
        assert arguments == ["trainer.strategy=fsdp", "g2rl.strength=0.5"]
        return configuration(cls, g2rl={"strength": 0.5})


def configuration(kind: Any, **changes: Any) -> Any:
    values = {
        "strategy": "fsdp",
        "step_wise": False,
        "enabled": False,
        "simulated": False,
        "estimator": "grpo",
        "n": 4,
    } | changes
    algorithm = SimpleNamespace(advantage_estimator=values["estimator"], temperature=TEMPERATURE)
    fully_async = SimpleNamespace(enabled=values["enabled"], simulate_training=values["simulated"])
    return kind(
        trainer=SimpleNamespace(strategy=values["strategy"], algorithm=algorithm, fully_async=fully_async),
        generator=SimpleNamespace(n_samples_per_prompt=values["n"]),
        g2rl=values.get("g2rl", {"reward_range": [0, 1], "min_range": 0.0}),
    )


def remote(**options: Any) -> Callable[[Any], Any]:
    """Ray's: classes and functions as they are, with what they ask for."""

    def decorate(target: Any) -> Any:
        target.options, target.remote = options, target
        return target

    return decorate


@pytest.fixture
def skyrl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    backend = "skyrl.backends.skyrl_train"
    members: dict[str, dict[str, Any]] = {
        "ray": {"remote": remote, "get": lambda result: result},
        f"{backend}.distributed.ulysses.utils": {"ulysses_pad_and_slice_inputs": lambda values, sp_size: (values,)},
        f"{backend}.workers.fsdp.fsdp_worker": {"FSDPPolicyWorkerBase": Worker},
        "skyrl.train.config": {"SkyRLTrainConfig": Config},
        "skyrl.train.entrypoints.main_base": {"BasePPOExp": Exp},
        "skyrl.train.fully_async_trainer": {"FullyAsyncRayPPOTrainer": AsyncTrainer},
        "skyrl.train.trainer": {"RayPPOTrainer": Trainer},
        "skyrl.train.utils": {"validate_cfg": lambda cfg: None},
        "skyrl.train.utils.utils": {"initialize_ray": lambda cfg: None},
    }
    for name in members:
        parts = name.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), SimpleNamespace())
    for name, values in members.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**values))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


def rollouts() -> Batch:
    """Prompts and responses at the end of eight rows, two groups that lie apart; the sixth response is not trained."""
    generator = torch.Generator().manual_seed(0)
    lengths, prompts = torch.tensor([5, 4, 3, 5, 1, 2, 5, 2]), torch.tensor([4, 2, 7, 5, 3, 3, 6, 1])
    loss_mask = (torch.arange(5) >= 5 - lengths[:, None]).float()
    loss_mask[0, 2], loss_mask[5] = 0, 0  # a token of a tool; a response that was cut
    rewards = torch.zeros(8, 5)
    rewards[[0, 3, 5], -1] = 1.0
    rewards[6, 1] = 1.0  # of an earlier turn
    batch = Batch(
        sequences=torch.randint(3, 70, (8, 12), generator=generator),
        attention_mask=(torch.arange(12) >= 12 - (lengths + prompts)[:, None]).long(),
        loss_mask=loss_mask,
        rewards=rewards,
    )
    batch.metadata = {"uids": ["b", "a", "a", "b", "b", "a", "a", "b"]}
    return batch


def expected(model: Any, batch: Batch) -> Tensor:
    """Shaped rewards [8], of autograd through logits."""
    scored, real = torch.nn.functional.pad(batch["loss_mask"], (7, 0)), batch["attention_mask"].bool()
    rows = [(ids[r], s[r]) for ids, s, r in zip(batch["sequences"], scored, real, strict=True)]
    order = torch.tensor([1, 2, 5, 6, 0, 3, 4, 7])
    raw = batch["rewards"].sum(1)
    shaped = torch.empty(8)
    Phi = written_out.features(model, rows, TEMPERATURE).float()
    result = g2rl_advantages(Phi[order], 2 * raw[order] - 1, 4, Shaping(min_range=0.0))
    shaped[order] = result.shaped_rewards
    return (shaped + 1) / 2


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_rewards_are_shaped_by_the_pass_for_old_log_probabilities(
    tiny_model: Path, skyrl: Any, packed: bool, lora: bool, caplog: pytest.LogCaptureFixture
) -> None:
    causal_lm = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    worker = skyrl.G2RLPolicyWorker()
    worker.init_model(Wrapper(get_peft_model(causal_lm, config).eval() if lora else causal_lm, packed))
    with caplog.at_level(logging.INFO):
        trainer = skyrl.G2RLTrainer(configuration(skyrl.G2RLTrainConfig), worker, skips=packed)
        plain, batch = worker.forward(rollouts()), rollouts()
        rewards = batch["rewards"].clone()
        batch = trainer.fwd_logprobs_values_reward(batch)
    assert torch.equal(batch["action_log_probs"], plain[:, :5])
    want = expected(causal_lm, batch | {"rewards": rewards})
    torch.testing.assert_close(batch["rewards"].sum(1), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(batch["rewards"][:, :-1], rewards[:, :-1])
    assert (want - rewards.sum(1)).abs().amax() > 0.1
    assert set(trainer.all_metrics) == {
        f"g2rl/{name}" for name in ("mean_cosine", "negative_share", "score", "feature_norm", "degenerate_share")
    }
    assert "G2RL: shaping rewards of 0 to 1 with strength 1" in caplog.messages
    assert any("one is added" in message for message in caplog.messages) == packed
    assert not [record for record in caplog.records if record.levelno > logging.INFO]

    batch["rewards"] = rewards + 1
    trainer.fwd_logprobs_values_reward(batch)
    assert "rewards leave reward_range" in caplog.text
    trainer.build_models(Worker, "critic", "ref")
    assert trainer.workers == (skyrl.G2RLPolicyWorker, "critic", "ref")
    assert skyrl.G2RLPolicyWorker.options == {"num_gpus": 1}


def test_steps_of_a_trajectory_share_a_feature_and_a_reward(skyrl: Any) -> None:
    """Three trajectories of two, one and two steps, and a row that fills up a rank."""
    features = torch.tensor([[1.0, 0], [0, 4], [3, 3], [1, 2], [-1, 0], [0, 0]])
    tokens, ends = torch.tensor([3, 1, 2, 1, 0, 0]), [False, True, True, False, True, True]
    whole = skyrl.of_trajectories(features, tokens, torch.tensor(ends))
    assert whole.tolist() == [[0.75, 1.0], [3.0, 3.0], [1.0, 2.0], [0.0, 0.0]]
    trainer = skyrl.G2RLTrainer(configuration(skyrl.G2RLTrainConfig), Worker())
    trainer._loss_mask = (torch.arange(3) >= 3 - tokens[:, None]).float()
    batch = Batch(rewards=torch.zeros(6, 3))
    batch["rewards"][[0, 1, 2, 5], -1] = 1.0  # of an earlier step, which SkyRL counts nothing for, too
    batch.metadata = {"uids": ["a"] * 5 + ["pad0"], "is_last_step": ends, "pad_size": 1}
    rewards = trainer._shape(batch, features)
    raw = torch.tensor([1.0, 1.0, 0.0])
    want = (g2rl_advantages(whole[:3], 2 * raw - 1, 3, Shaping(min_range=0.0)).shaped_rewards + 1) / 2
    torch.testing.assert_close(rewards[[1, 2, 4]].sum(1), want)
    assert (want - raw).abs().amax() > 0.1
    assert torch.equal(rewards[[0, 3, 5]], batch["rewards"][[0, 3, 5]])
    assert trainer.all_metrics["g2rl/degenerate_share"] == 0


def test_rows_that_come_back_wrong_are_refused(tiny_model: Path, skyrl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without features, as of another worker; with rows that fill up a rank; with other log-probabilities."""
    model = Wrapper(AutoModelForCausalLM.from_pretrained(tiny_model), False)
    other, worker = Worker(), skyrl.G2RLPolicyWorker()
    other.init_model(model)
    trainer = skyrl.G2RLTrainer(configuration(skyrl.G2RLTrainConfig), other)
    with pytest.raises(RuntimeError, match="expected features behind log-probabilities, found none"):
        trainer.fwd_logprobs_values_reward(rollouts())
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="expected rows of 8 responses, found 9"):
        patch.setattr(other, "forward", lambda data: torch.zeros(9, 21))
        trainer.fwd_logprobs_values_reward(rollouts())
    worker.init_model(model)
    monkeypatch.setattr(Wrapper, "forward", lambda self, *args, plain=Wrapper.forward: 2 * plain(self, *args))
    with pytest.raises(RuntimeError, match="log-probabilities differ from those of the head of LlamaForCausalLM"):
        skyrl.G2RLTrainer(configuration(skyrl.G2RLTrainConfig), worker).fwd_logprobs_values_reward(rollouts())


def test_an_adapter_on_the_head_is_refused(tiny_model: Path, skyrl: Any) -> None:
    config = LoraConfig(target_modules=["q_proj", "lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    with pytest.raises(ValueError, match=r"lora\.target_modules: expected no adapter on the head"):
        skyrl.G2RLPolicyWorker().init_model(Wrapper(model, False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "megatron"}, "trainer.strategy: expected 'fsdp', found 'megatron'"),
        ({"enabled": True, "simulated": True}, "trainer.fully_async.simulate_training: expected False, found True"),
        ({"estimator": "maxrl"}, "trainer.algorithm.advantage_estimator: .* found 'maxrl'"),
        ({"g2rl": {"lambda": 1}}, "g2rl.lambda: expected one of strength"),
    ],
)
def test_settings_that_cannot_work_are_refused(skyrl: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        skyrl.check_config(configuration(skyrl.G2RLTrainConfig, **changes))


@pytest.mark.parametrize("enabled", [False, True])
def test_an_asynchronous_run_has_an_asynchronous_trainer(skyrl: Any, enabled: bool) -> None:
    exp = skyrl.G2RLExp(configuration(skyrl.G2RLTrainConfig, enabled=enabled))
    exp.run()
    assert isinstance(exp.trainer, skyrl.G2RLTrainer)
    assert isinstance(exp.trainer, AsyncTrainer) == enabled


def test_the_command_trains_with_its_options(
    skyrl: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SkyRL's configuration knows no `trainer.override_entrypoint`."""
    arguments = ["main_base", f"trainer.override_entrypoint={NAME}", "trainer.strategy=fsdp", "g2rl.strength=0.5"]
    monkeypatch.setattr(sys, "argv", arguments)
    with caplog.at_level(logging.INFO):
        skyrl.main()
    assert "G2RL: shaping rewards of -1 to 1 with strength 0.5" in caplog.messages
    skyrl.check_config(configuration(skyrl.G2RLTrainConfig, n=2))
    assert "generator.n_samples_per_prompt: expected 3 or more, found 2" in caplog.text
