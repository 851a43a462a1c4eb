"""The trainer and the actor for AReaL, around stand-ins that hand batches on as its own do."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from g2rl.config import ConfigError
from g2rl_kernels import Shaping, g2rl_advantages
from tests.integrations import written_out

NAME = "g2rl.integrations.areal"
TEMPERATURE = 0.7
PARTS = [[5, 1], [0, 2, 3], [7, 4, 6]]  # micro-batches of AReaL hold sequences in any order
PADDING = 3


@dataclass
class ActorConfig:
    """AReaL's `PPOActorConfig`."""

    backend: str = "fsdp:d2"
    enable_tree_training: bool = False
    temperature: float = TEMPERATURE
    reward_bias: float = -0.5


@dataclass
class RunConfig:
    """AReaL's `GRPOConfig`."""

    actor: ActorConfig = field(default_factory=ActorConfig)
    gconfig: Any = field(default_factory=lambda: SimpleNamespace(n_samples=4))


class Trainer:
    """AReaL's `PPOTrainer`."""

    scheduler = "a scheduler"

    def __init__(self, config: Any) -> None:
        self.config = config
        backend, _, sizes = config.actor.backend.partition(":")
        alloc = SimpleNamespace(backend=backend, parallel=SimpleNamespace(tp_size=2 if "t2" in sizes else 1))
        self.actor = self._create_train_engine(config.actor, alloc)
        self.reference = self._create_train_engine(ActorConfig(), alloc)

    def _create_train_engine(self, actor_config: Any, alloc: Any) -> Any:
        return "AReaL's"


class Actor:
    """AReaL's `FSDPPPOActor` and what it has as `actor`; sequences are in a row, with padding at its end."""

    parallel_helper = SimpleNamespace(sp_size=1)

    def __init__(self, config: Any) -> None:
        self.config = config
        self.actor = self
        self.reward_bias = config.reward_bias

    @classmethod
    def as_controller(cls, config: Any, scheduler: Any) -> Any:
        return SimpleNamespace(engine=cls, config=config, create_process_group=lambda parallel_strategy: None)

    def initialize(self, model: Any) -> None:
        self.model = model

    def _compute_logp(self, data: dict[str, Tensor]) -> Tensor:
        return self.forward_batch(data, aggregate_fn=torch.cat)

    def forward_batch(self, data: Any, output_seqlens: Any = None, aggregate_fn: Any = None) -> Tensor:
        lengths = data["attention_mask"].sum(1).tolist()
        output_seqlens = output_seqlens or lengths
        found: list[Tensor] = []
        for part in PARTS:
            rows = {key: torch.cat([data[key][i, : lengths[i]] for i in part]) for key in ("input_ids", "loss_mask")}
            cu_seqlens = torch.tensor([0, *(lengths[i] for i in part)], dtype=torch.int32).cumsum(0)
            padded = {key: torch.nn.functional.pad(value, (0, PADDING))[None] for key, value in rows.items()}
            padded["cu_seqlens"] = torch.cat([cu_seqlens, cu_seqlens[-1:] + PADDING])
            item = SimpleNamespace(orig_mb={"cu_seqlens": cu_seqlens}, padded_mb=padded)
            inputs, ctx = self._prepare_mb_inputs(item)
            parts = inputs["cu_seqlens"].diff().tolist()
            hidden = [
                self.model.base_model(ids, use_cache=False).last_hidden_state
                for ids in inputs["input_ids"].split(parts, dim=1)
            ]
            result = self._compute_forward_result(self.model.lm_head(torch.cat(hidden, dim=1))[0], ctx)
            found += result.split([output_seqlens[i] for i in part])
        order = torch.tensor(sum(PARTS, [])).argsort().tolist()
        return torch.nn.utils.rnn.pad_sequence([found[i] for i in order], batch_first=True)

    def _prepare_mb_inputs(self, item: Any) -> Any:
        return item.padded_mb, SimpleNamespace(inputs=item.padded_mb, mb_input=item.orig_mb, pad_length=PADDING)

    def _compute_forward_result(self, logits: Tensor, ctx: Any) -> Tensor:
        logps = (logits / TEMPERATURE).log_softmax(-1)
        return logps.gather(-1, ctx.inputs["input_ids"][0].long().roll(-1)[:, None])[:-PADDING, 0]

    def compute_advantages(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        batch, groups = concat_batch(data)
        batch["advantages"] = batch["rewards"] + self.reward_bias
        values = zip(*(value.split(groups.sizes) for value in batch.values()), strict=True)
        return [dict(zip(batch, group, strict=True)) for group in values]


def concat_batch(data: list[dict[str, Any]]) -> Any:
    """AReaL's: groups of any length as one batch."""
    sizes = [len(group["rewards"]) for group in data]
    lengths = [group["input_ids"].shape[1] for group in data]
    batch = {key: torch.cat([padded(group[key], max(lengths)) for group in data]) for key in data[0]}
    return batch, SimpleNamespace(sizes=sizes, traj_group_sizes=sizes, lengths=lengths)


def split_batch(rows: Tensor, groups: Any) -> list[Tensor]:
    return [part[:, :length] for part, length in zip(rows.split(groups.sizes), groups.lengths, strict=True)]


def padded(value: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(value, (0, length - value.shape[1])) if value.dim() == 2 else value


@pytest.fixture
def areal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    scalars: dict[str, float] = {}
    tracker = SimpleNamespace(scope=lambda name: nullcontext(), scalar=lambda **values: scalars.update(values))
    members: dict[str, dict[str, Any]] = {
        "areal": {"PPOTrainer": Trainer},
        "areal.api": {},
        "areal.api.cli_args": {"GRPOConfig": RunConfig, "PPOActorConfig": ActorConfig},
        "areal.engine": {"FSDPPPOActor": Actor},
        "areal.models": {},
        "areal.models.fsdp": {},
        "areal.models.fsdp.ulysses": {"ulysses_pad_and_slice_inputs": None},
        "areal.utils": {"logging": logging, "stats_tracker": tracker},
        "areal.utils.data": {"concat_batch": concat_batch, "split_batch": split_batch},
        "areal.utils.environ": {"is_single_controller": lambda: True},
    }
    for name, values in members.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    module = importlib.import_module(NAME)
    module.scalars = scalars
    yield module
    sys.modules.pop(NAME)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def actor_of(areal: Any, model: Any, **g2rl: Any) -> Any:
    actor = areal.G2RLPPOActor(areal.G2RLActorConfig(g2rl={"reward_range": [0, 1], "min_range": 0.0} | g2rl))
    actor.initialize(model)
    return actor


def two_groups() -> list[dict[str, Tensor]]:
    """Four responses each, to prompts of two tokens, with a token of a tool in some."""
    random = torch.Generator().manual_seed(0)
    groups = []
    for L in (9, 6):
        lengths = torch.randint(4, L + 1, (4,), generator=random)
        lengths[0] = L
        mask = torch.arange(L) < lengths[:, None]
        own = mask & (torch.arange(L) >= 2)
        own[1, 3] = False
        ids = torch.randint(3, 20, (4, L), generator=random, dtype=torch.int32) * mask
        rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
        groups.append({"input_ids": ids, "attention_mask": mask, "loss_mask": own.int(), "rewards": rewards})
    return groups


def shaped_by_hand(model: Any, groups: list[dict[str, Tensor]], strength: float = 1.0) -> list[Tensor]:
    """Rewards of 0 to 1 shaped by features of autograd through logits."""
    shaped = []
    for group in groups:
        columns = group["input_ids"].long(), group["attention_mask"], group["loss_mask"]
        rows = [(ids[mask], own[mask]) for ids, mask, own in zip(*columns, strict=True)]
        Phi = written_out.features(model, rows, TEMPERATURE).float()
        result = g2rl_advantages(Phi, 2 * group["rewards"] - 1, 4, Shaping(strength, min_range=0.0))
        shaped.append((result.shaped_rewards + 1) / 2)
    return shaped


@pytest.mark.parametrize("own_pass", [False, True])
def test_rewards_are_shaped_before_advantages(areal: Any, model: Any, own_pass: bool, caplog: Any) -> None:
    actor, groups = actor_of(areal, model, strength=0.5), two_groups()
    expected = shaped_by_hand(model, groups, strength=0.5)
    if own_pass:
        rows = actor.compute_logp(groups)
        groups = [group | {"prox_logp": row} for group, row in zip(groups, rows, strict=True)]
    with caplog.at_level(logging.INFO, "G2RL"):
        done = actor.compute_advantages(groups)
    assert ("AReaL runs no pass for proximal log-probabilities" in caplog.text) != own_pass
    for group, found, shaped in zip(groups, done, expected, strict=True):
        # Features are sums in fp32, one response at a time or together, and scores have all digits of a unit.
        torch.testing.assert_close(found["advantages"], shaped - 0.5, rtol=0, atol=1e-5)
        assert (found["advantages"] + 0.5 - group["rewards"]).abs().max() > 0.1
        assert torch.equal(found["rewards"], group["rewards"])  # AReaL's statistics are of raw ones
    assert actor.reward_bias == -0.5
    assert areal.scalars["degenerate_share"] == 0
    assert 0 < areal.scalars["score"] <= 1


def test_log_probabilities_stay_what_they_are(areal: Any, model: Any) -> None:
    actor, groups = actor_of(areal, model), two_groups()
    batch, parts = concat_batch(groups)
    plain = split_batch(Actor._compute_logp(actor, batch), parts)
    seen: list[Any] = []
    rows = actor.compute_logp(groups)
    with_rows = [group | {"prox_logp": row} for group, row in zip(groups, rows, strict=True)]
    for found, logps in zip(actor.compute_advantages(with_rows), plain, strict=True):
        assert torch.equal(found["prox_logp"][:, : logps.shape[1]], logps)
        seen.append(logps.shape)
    assert seen == [(4, 9), (4, 6)]


def test_log_probabilities_of_another_pass_are_refused(areal: Any, model: Any) -> None:
    groups = [group | {"prox_logp": torch.zeros(group["input_ids"].shape)} for group in two_groups()]
    with pytest.raises(RuntimeError, match=r"features before log-probabilities, found none: .* G2RLPPOActor"):
        actor_of(areal, model).compute_advantages(groups)


def test_another_head_is_refused(areal: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = actor_of(areal, model)
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: 3 * forward(hidden))
    with pytest.raises(RuntimeError, match="AReaL's log-probabilities differ from those of the head of Llama"):
        actor.compute_logp(two_groups())


def test_an_adapter_on_the_head_is_refused(areal: Any, model: Any) -> None:
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"actor\.target_modules: expected no adapter on the head"):
        actor_of(areal, adapted)


def test_the_trainer_makes_its_actor(areal: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "G2RL"):
        trainer = areal.G2RLTrainer(areal.G2RLConfig())
    assert trainer.actor.engine is areal.G2RLPPOActor
    assert trainer.reference == "AReaL's"
    assert "shaping rewards of -1 to 1 with strength 1" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"g2rl": {"strenght": 1.0}}, r"g2rl\.strenght: expected one of strength, "),
        ({"enable_tree_training": True}, r"actor\.enable_tree_training: expected False, found True"),
        ({"backend": "megatron:d2"}, r"actor\.backend: expected fsdp without tensor parallelism.*'megatron:d2'"),
        ({"backend": "fsdp:d2t2"}, r"actor\.backend: expected fsdp without tensor parallelism.*'fsdp:d2t2'"),
    ],
)
def test_settings_that_cannot_work(areal: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        areal.G2RLTrainer(areal.G2RLConfig(actor=areal.G2RLActorConfig(**changes)))


def test_small_groups_and_zero_rewards_are_warned_of(areal: Any, model: Any, caplog: Any) -> None:
    areal.G2RLTrainer(areal.G2RLConfig(gconfig=SimpleNamespace(n_samples=2)))
    assert "gconfig.n_samples: expected 3 or more, found 2" in caplog.text
    actor_of(areal, model, reward_range=[-1, 1]).compute_advantages(two_groups())
    assert "for rewards of 0 and 1 add actor.g2rl.reward_range=[0,1]" in caplog.text
