"""OpenRLHF's command with the options and actors of G2RL, around stand-ins for what they build on of it and of Ray."""

from __future__ import annotations

import importlib
import logging
import runpy
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from g2rl.integrations.exploration import Options
from g2rl.integrations.openrlhf.options import check_settings, read_options
from g2rl_kernels import Shaping, g2rl_advantages
from tests.integrations import written_out

PACKAGE = "g2rl.integrations.openrlhf"
TEMPERATURE = 0.7


def remote(cls: Any = None, **options: Any) -> Any:
    """Ray's decorator, whose product has the class inside."""
    if cls is None:
        return remote
    return SimpleNamespace(__ray_metadata__=SimpleNamespace(modified_class=SimpleNamespace(__ray_actor_class__=cls)))


def inside(actor_class: Any) -> Any:
    return actor_class.__ray_metadata__.modified_class.__ray_actor_class__


class PolicyModelActor:
    def init_model_from_pretrained(self, strategy: Any, actor: Any) -> None:
        self.strategy, self.actor = strategy, actor

    @torch.no_grad()
    def forward(self, sequences: torch.Tensor, action_mask: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask.bool()
        if self.actor.packing_samples:
            positions = (attention_mask.cumsum(1) - 1)[mask]
            packed = self.actor.model(sequences[mask][None], position_ids=positions[None]).logits[0]
            logits = packed.new_zeros(*sequences.shape, packed.shape[1])
            logits[mask] = packed
        else:
            logits = self.actor.model(sequences, attention_mask=attention_mask).logits
        logps = (logits / TEMPERATURE).log_softmax(-1)[:, :-1].gather(-1, sequences[:, 1:, None])[..., 0]
        return logps[:, -action_mask.shape[1] :] * action_mask


class Workers:
    """Of a policy: each has its run of the experiences."""

    def __init__(self, workers: list[Any]) -> None:
        self.workers = workers

    def async_run_method(self, method_name: str) -> list[Any]:
        return [getattr(worker, method_name)() for worker in self.workers]

    def async_run_method_batch(self, method_name: str, **batch: list[Any]) -> list[Any]:
        items = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        share = -(-len(items) // len(self.workers))
        return [
            [getattr(worker, method_name)(**item) for item in items[share * i : share * (i + 1)]]
            for i, worker in enumerate(self.workers)
        ]


class RemoteExperienceMaker:
    """Advantages are rewards."""

    def __init__(self, actor_model_group: Any, critic: Any, reward: Any, reference: Any, kl: Any, *others: Any) -> None:
        self.actor_model_group, (strategy, _) = actor_model_group, others
        self.args = strategy.args

    def _flatten_results(self, refs: list[Any], duplicate_factor: int) -> list[Any]:
        return list(chain.from_iterable(refs[::duplicate_factor]))

    def make_experience(self, samples_list: list[Any]) -> list[Any]:
        names = ("sequences", "action_mask", "attention_mask")
        batch = {name: [getattr(sample, name) for sample in samples_list] for name in names}
        self.actor_model_group.async_run_method_batch("forward", **batch)
        return samples_list

    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        sys.modules["openrlhf.trainer.ppo_utils"].experience_maker.apply_length_penalties(experiences, self.args)
        for experience in experiences:
            experience.advantages = experience.rewards
        return experiences


def apply_length_penalties(experiences: list[Any], args: Any) -> None:
    for experience in experiences:
        experience.rewards = experience.rewards - 0.25 * experience.truncated
        experience.info["reward"] = experience.rewards.clone()


class BasePPOTrainer:
    def __init__(self, strategy: Any, policy: Any) -> None:
        self.strategy, self.actor_model_group = strategy, policy
        self.critic_model_group = self.reward_model_group = self.reference_model_group = None
        self.kl_ctl = self.tokenizer = None

    def _compute_rollout_stats(self, experiences: list[Any]) -> dict[str, float]:
        return {"rollout/reward_mean": float(torch.cat([x.info["reward"] for x in experiences]).mean())}

    def broadcast_to_vllm(self) -> None:
        self.has_sent = True


class PPOTrainer(BasePPOTrainer):
    pass


class TrainingActor(BasePPOTrainer):
    pass


class PPOTrainerAsync:
    def __init__(self, strategy: Any, policy: Any) -> None:
        actor = sys.modules["openrlhf.trainer.ppo_trainer_async"].TrainingActor  # type: ignore[attr-defined]
        self.trainer_actor = inside(actor)(strategy, policy)


@pytest.fixture
def openrlhf(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """OpenRLHF's modules, with the names that its script imports."""
    names = ("", ".utils", ".utils.logging_utils", ".trainer", ".trainer.ray", ".trainer.ray.ppo_actor")
    names += (
        ".trainer.ppo_trainer",
        ".trainer.ppo_trainer_async",
        ".trainer.ppo_utils",
        ".trainer.ppo_utils.experience_maker",
    )
    modules = {name: ModuleType(f"openrlhf{name}") for name in names}
    contents: dict[str, dict[str, Any]] = {
        ".utils": {"get_strategy": lambda args: SimpleNamespace(args=args, ring_attn_group=None)},
        ".utils.logging_utils": {"init_logger": logging.getLogger},
        ".trainer.ray.ppo_actor": {"PolicyModelActor": remote(PolicyModelActor)},
        ".trainer.ppo_trainer": {"BasePPOTrainer": BasePPOTrainer, "PPOTrainer": remote(PPOTrainer)},
        ".trainer.ppo_trainer_async": {
            "PPOTrainerAsync": remote(PPOTrainerAsync),
            "TrainingActor": remote(TrainingActor),
        },
        ".trainer.ppo_utils.experience_maker": {
            "RemoteExperienceMaker": RemoteExperienceMaker,
            "apply_length_penalties": apply_length_penalties,
        },
    }
    for name, module in modules.items():
        vars(module).update(contents.get(name, {}))
        above, _, last = name.rpartition(".")
        if last:
            setattr(modules[above], last, module)
        monkeypatch.setitem(sys.modules, f"openrlhf{name}", module)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(remote=remote))  # type: ignore[arg-type]
    yield SimpleNamespace(
        utils=modules[".utils"],
        policy=modules[".trainer.ray.ppo_actor"],
        trainer=modules[".trainer.ppo_trainer"],
        asynchronous=modules[".trainer.ppo_trainer_async"],
        maker=modules[".trainer.ppo_utils.experience_maker"],
    )
    for name in (f"{PACKAGE}.actors", f"{PACKAGE}.__main__"):
        sys.modules.pop(name, None)


def settings(**ds: Any) -> SimpleNamespace:
    plain = {"tensor_parallel_size": 1, "deepcompile": False, "ring_attn_size": 1}
    return SimpleNamespace(ds=SimpleNamespace(**plain | ds), rollout=SimpleNamespace(n_samples_per_prompt=4))


def run_command(
    openrlhf: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, arguments: list[str], script: Callable[[], Any]
) -> Any:
    """What `script` returns in the place of OpenRLHF's, which our command runs."""
    monkeypatch.setattr(sys, "argv", ["openrlhf", *arguments])
    results: list[Any] = []

    def run_module(name: str, run_name: str) -> None:
        assert (name, run_name) == ("openrlhf.cli.train_ppo_ray", "__main__")
        results.append(script())

    monkeypatch.setattr(runpy, "run_module", run_module)
    importlib.import_module(f"{PACKAGE}.__main__").main()
    return results[0]


@pytest.mark.parametrize(
    "packed, lora, asynchronous",
    [(False, False, False), (True, False, False), (True, True, False), (False, False, True)],
)
def test_rewards_are_shaped_by_the_pass_for_old_log_probabilities(
    tiny_model: Path,
    openrlhf: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    packed: bool,
    lora: bool,
    asynchronous: bool,
) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    policy.config.use_cache = False  # as OpenRLHF does; transformers then tells packed sequences apart
    adapted = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(policy, adapted) if lora else policy

    def script() -> Any:
        strategy = openrlhf.utils.get_strategy(settings())
        workers = [inside(openrlhf.policy.PolicyModelActor)() for _ in range(2)]
        for worker in workers:
            actor = torch.nn.Module()
            actor.model, actor.packing_samples, actor.temperature = model, packed, TEMPERATURE
            worker.init_model_from_pretrained(strategy, actor)
        if asynchronous:
            return inside(openrlhf.asynchronous.PPOTrainerAsync)(strategy, Workers(workers)).trainer_actor
        return inside(openrlhf.trainer.PPOTrainer)(strategy, Workers(workers))

    arguments = ["--g2rl.strength", "2", "--g2rl.reward_range", "0", "1"]
    trained = run_command(openrlhf, monkeypatch, arguments, script)
    trained.broadcast_to_vllm()
    assert trained.has_sent

    generator = torch.Generator().manual_seed(0)
    ids, lengths = torch.randint(3, 70, (8, 12), generator=generator), torch.tensor([12, 11, 9, 12, 8, 12, 7, 10])
    attention_mask = (torch.arange(12) < lengths[:, None]).long()
    action_mask = attention_mask[:, 1:] * (torch.arange(1, 12) >= 6)  # of prompts with six tokens
    action_mask[0, 7] = 0  # a tool's
    raw = torch.tensor([1.0, 0, 1, 0, 0, 1, 0, 0])
    truncated = lengths == 12
    parts = [torch.tensor(part) for part in ([6, 0, 3], [1, 7], [2, 5, 4])]  # three of them for two workers
    experiences = [
        SimpleNamespace(
            index=part.tolist(),
            sequences=ids[part],
            attention_mask=attention_mask[part],
            action_mask=action_mask[part],
            rewards=raw[part],
            truncated=truncated[part],
            info={},
        )
        for part in parts
    ]
    maker = trained.experience_maker
    for _ in range(2):  # a step leaves nothing behind for the next
        for experience, part in zip(experiences, parts, strict=True):
            experience.rewards = raw[part]
        maker.compute_advantages_and_returns(maker.make_experience(experiences))

    scored, real = torch.nn.functional.pad(action_mask, (1, 0)), attention_mask.bool()
    rows = [(i[r], s[r]) for i, s, r in zip(ids, scored, real, strict=True)]
    Phi = written_out.features(policy, rows, TEMPERATURE).float()
    penalized = raw - 0.25 * truncated
    want = g2rl_advantages(Phi, 2 * penalized - 1, 4, Shaping(strength=2.0))
    shaped = (want.shaped_rewards + 1) / 2
    assert (shaped - penalized).abs().amax() > 0.1
    for experience, part in zip(experiences, parts, strict=True):
        # Features are sums of d products in fp32, and scores a quotient of their differences.
        torch.testing.assert_close(experience.advantages, shaped[part], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(experience.info["reward"], penalized[part], rtol=0, atol=0)
        bonus = experience.advantages - penalized[part]
        torch.testing.assert_close(experience.info["g2rl_bonus"], bonus, rtol=0, atol=0)
    assert openrlhf.maker.apply_length_penalties is apply_length_penalties
    stats = trained._compute_rollout_stats(experiences)
    assert stats["rollout/reward_mean"] == pytest.approx(float(penalized.mean()))
    assert stats["g2rl/score"] == pytest.approx(float(want.scores.mean()), rel=1e-4)
    assert "rewards leave reward_range (0 to 1; found -0.25 to " in caplog.text


def test_rows_of_ranks_are_parts_of_the_whole(openrlhf: SimpleNamespace) -> None:
    """Of a ring that shares seven tokens, padded to eight: each position has the action that it predicts."""
    rows = importlib.import_module(f"{PACKAGE}.actors").ActionRows
    padding_mask, values = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.tensor([[5, 6], [7, 8]])
    assert rows(padding_mask, False, None)(values, -1).tolist() == [-1, 5, 6, -1, -1, 7, 8, -1]
    assert rows(padding_mask, True, None)(values, -1).tolist() == [-1, 5, 6, -1, -1, 7, 8]
    ranks = [SimpleNamespace(size=lambda: 2, rank=lambda rank=rank: rank) for rank in range(2)]
    assert [rows(padding_mask, True, rank)(values, -1).tolist() for rank in ranks] == [[-1, 5, 6, -1], [-1, 7, 8, -1]]


@pytest.mark.parametrize("fault", ["adapter on the head", "another head", "no call of the head"])
def test_policies_that_are_refused(tiny_model: Path, openrlhf: SimpleNamespace, fault: str) -> None:
    worker = importlib.import_module(f"{PACKAGE}.actors").G2RLPolicyActor()
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    strategy = openrlhf.utils.get_strategy(settings())
    actor = torch.nn.Module()
    actor.packing_samples, actor.temperature = False, TEMPERATURE
    if fault == "adapter on the head":
        actor.model = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
        with pytest.raises(ValueError, match="--ds.lora.target_modules: expected no adapter on the head"):
            worker.init_model_from_pretrained(strategy, actor)
        return
    actor.model = model
    if fault == "another head":
        model.lm_head.register_forward_hook(lambda head, args, logits: 30 * logits)
    else:
        model.forward = lambda ids, **_: SimpleNamespace(logits=model.model(ids)[0] @ model.lm_head.weight.T)
    worker.init_model_from_pretrained(strategy, actor)
    ids = torch.arange(24).view(2, 12)
    said = "it is not one that G2RL knows" if fault == "another head" else "without a call of its head"
    with pytest.raises(RuntimeError, match=said):
        worker.forward(ids, torch.ones(2, 11, dtype=torch.long), torch.ones_like(ids))


def test_options_are_taken_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options, rest = read_options("--a.b 1 --g2rl.rule centered --g2rl.reward_range -2 3.5 --g2rl.strenght 2".split())
    assert options == Options(Shaping(rule="centered"), (-2.0, 3.5)) and rest == "--a.b 1 --g2rl.strenght 2".split()
    assert read_options([]) == (Options(), [])
    assert read_options(["--help"]) == (Options(), ["--help"]) and "--g2rl.uniform_groups" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--g2rl.strength much", "argument --g2rl.strength: invalid float value: 'much'"),
        ("--g2rl.clip 0", "--g2rl.clip: expected a number > 0, found 0"),
        ("--g2rl.rule best", "--g2rl.rule: expected one of scale, centered, literal, found 'best'"),
        ("--g2rl.reward_range 1 0", "--g2rl.reward_range: expected two finite numbers, the lower one first"),
    ],
)
def test_values_that_are_refused(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_options(arguments.split())
    assert said in capsys.readouterr().err


def test_settings_that_are_refused(openrlhf: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for changed, said in [
        ({"tensor_parallel_size": 2}, "--ds.tensor_parallel_size: expected 1 with G2RL, found 2"),
        ({"deepcompile": True}, "--ds.deepcompile: expected False with G2RL, found True"),
    ]:
        with pytest.raises(ValueError, match=said):
            run_command(openrlhf, monkeypatch, [], lambda ds=changed: openrlhf.utils.get_strategy(settings(**ds)))
    args = settings()
    assert check_settings(args) == []
    args.rollout.n_samples_per_prompt = 2
    assert "expected 3 or more, found 2" in check_settings(args)[0]
