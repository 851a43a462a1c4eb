"""The examples run, and print what their comments promise."""

from __future__ import annotations

import ast
import importlib
import logging
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from examples.slime_g2rl import advantages
from g2rl_kernels import g2rl_advantages
from tests.integrations import written_out

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


class Ranks:
    """`torch.distributed` and Megatron's `mpu` of ranks that are threads."""

    def __init__(self, size: int) -> None:
        self.given: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)
        self.rank = threading.local()

    def is_initialized(self) -> bool:
        return len(self.given) > 1

    def get_data_parallel_group(self) -> str:
        return "data parallel"

    def get_rank(self, group: str) -> int:
        return self.rank.value

    def get_world_size(self, group: str) -> int:
        return len(self.given)

    def all_gather_object(self, everyone: list[Any], mine: Any, group: str) -> None:
        assert group == "data parallel"
        self.given[self.rank.value] = mine
        self.barrier.wait()
        everyone[:] = self.given

    def run(self, function: Callable[[Any], None], parts: list[Any]) -> None:
        def one(rank: int) -> None:
            self.rank.value = rank
            function(parts[rank])

        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(one, range(len(parts))))


@pytest.mark.parametrize(
    "parts", [[[*range(8)]], [[3, 6, 0, 5, 1, 7, 2, 4]], [[0, 2, 4, 6], [1, 3, 5, 7]], [[7, 0, 5], [1, 6, 4, 3, 2]]]
)
def test_slime_advantages_are_those_of_the_op(parts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """However samples are dealt out; indices go on from step to step, and groups may have been left out."""
    features, rewards = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), [1.0, -1, 1, -1, 1, 1, -1, -1]
    indices, lengths = [40, 41, 42, 43, 52, 53, 54, 55], [1, 2, 3, 1, 2, 3, 1, 0]
    kl = [torch.zeros(length) for length in lengths]  # of this rank's tokens, where ranks share responses
    names = ("rewards", "sample_indices", "kl")
    data = [
        {"g2rl_features": features[part]}
        | {name: [each[i] for i in part] for name, each in zip(names, (rewards, indices, kl), strict=True)}
        for part in parts
    ]
    ranks = Ranks(len(parts))
    monkeypatch.setattr("examples.slime_g2rl.dist", ranks)
    monkeypatch.setitem(sys.modules, "megatron.core", SimpleNamespace(mpu=ranks))
    ranks.run(partial(advantages, SimpleNamespace(n_samples_per_prompt=4)), data)
    want = g2rl_advantages(features, torch.tensor(rewards), 4).advantages
    for part, found in zip(parts, data, strict=True):
        assert [len(row) for row in found["advantages"]] == [lengths[i] for i in part]
        assert found["returns"] is not found["advantages"]  # slime takes penalties off one of them
        assert all(torch.equal(row, want[i].expand(len(row))) for i, row in zip(part, found["advantages"], strict=True))


def test_trl_takes_a_step(tmp_path: Path) -> None:
    options = "--max_steps 1 --per_device_train_batch_size 8 --max_completion_length 4 --eval_strategy no"
    options += f" --eval_on_start False --output_dir {tmp_path} --bf16 False"
    command = [sys.executable, EXAMPLES / "trl_g2rl.py", *options.split()]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "g2rl/mean_cosine" in run.stdout and "rewards/g2rl_bonus/mean" in run.stdout


class SwiftTrainer:
    """What examples.swift_g2rl builds on of ms-swift's trainer; advantages are sums of rewards."""

    def __init__(self, model: Any, **others: Any) -> None:
        self.model = model
        self.template = SimpleNamespace(padding_free=False, sequence_parallel_size=1)
        self.enable_server_multi_turn, self.scale_rewards = False, "group"
        self.model_kwarg_keys = ["input_ids", "logits_to_keep"]
        self.temperature, self.num_generations = 0.7, 4
        self.reward_func_names, self.reward_weights = ["task", "style"], torch.tensor([1.0, 0.5])
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
        vars(self).update(others)

    def _disable_sp_context(self) -> Any:
        return nullcontext()

    def _get_per_token_logps_and_entropies(self, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        kept = grpo_batch.logits_to_keep
        logits = model(**model_inputs, logits_to_keep=kept + 1).logits[:, :-1] / self.temperature
        targets = model_inputs["input_ids"][:, -kept:, None]
        return logits.log_softmax(-1).gather(-1, targets)[..., 0], None

    def _prepare_batch_inputs(self, samples: list[Any]) -> list[Any]:
        for inputs, batch in samples:
            for kind in ("old_per_token_logps", "ref_per_token_logps"):
                setattr(batch, kind, self._get_per_token_logps_and_entropies(self.model, inputs, batch)[0])
        return samples

    def _compute_advantages(self, samples: list[Any], rewards_per_func: torch.Tensor, batches: Any) -> torch.Tensor:
        assert self.reward_func_names == ["task", "style", "g2rl_bonus"]
        return (rewards_per_func * self.reward_weights).nansum(1)


@pytest.fixture
def swift_example(monkeypatch: pytest.MonkeyPatch) -> Any:
    mapping: dict[str, str] = {}
    for name, members in {
        "swift": {},
        "swift.rlhf_trainers": {"GRPOTrainer": SwiftTrainer},
        "swift.sequence_parallel": {"sequence_parallel": SimpleNamespace(rp_world_size=2)},
        "swift.trainers": {"TrainerFactory": SimpleNamespace(TRAINER_MAPPING=mapping)},
        "swift.utils": {"get_logger": lambda: logging.getLogger("swift")},
    }.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "examples.swift_g2rl", raising=False)
    module = importlib.import_module("examples.swift_g2rl")
    assert mapping == {"grpo": "examples.swift_g2rl.G2RLTrainer"}
    yield module
    del sys.modules["examples.swift_g2rl"]


@pytest.mark.parametrize("lora", [False, True])
def test_swift_shapes_by_the_pass_for_old_log_probabilities(
    tiny_model: Path, swift_example: Any, lora: bool, caplog: pytest.LogCaptureFixture
) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    trainer = swift_example.G2RLTrainer((get_peft_model(policy, config) if lora else policy).train())
    ids = torch.randint(3, 70, (8, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(5) < torch.tensor([5, 4, 3, 5, 1, 2, 5, 0])[:, None]).long()  # of the last five tokens
    batches = [
        (
            {"input_ids": ids[rows]},
            SimpleNamespace(completion_mask=mask[rows], logits_to_keep=5, old_per_token_logps=None),
        )
        for rows in (slice(3), slice(3, 8))
    ]
    rewards = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 0], [0, 0], [1, 0], [0, torch.nan], [0, 0]])
    rewards[5] = torch.nan  # no function scores it
    found = trainer._compute_advantages([], rewards, trainer._prepare_batch_inputs(batches))

    rows = zip(ids, torch.nn.functional.pad(mask, (7, 0)), strict=True)
    Phi = written_out.features(policy, list(rows), 0.7).float()
    raw, scored = rewards[:, 0].nan_to_num(), ~rewards.isnan().all(1)
    want = (g2rl_advantages(Phi, 2 * raw - 1, 4, swift_example.SHAPING, scored).shaped_rewards + 1) / 2
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert (want - raw).abs().amax() > 0.1
    assert trainer._metrics["train"]["g2rl/score"] and trainer.reward_func_names == ["task", "style"]
    assert not caplog.records

    trainer._compute_advantages([], rewards + 1, None)
    assert "rewards leave reward_range" in caplog.text
    trainer.model.eval()
    trainer._prepare_batch_inputs(batches)
    assert torch.equal(trainer._compute_advantages([], rewards, None), raw)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"enable_server_multi_turn": True, "scale_rewards": "gdpo"}, "a multi-turn .* and scale_rewards='gdpo'"),
        ({"template": SimpleNamespace(padding_free=False, sequence_parallel_size=2)}, "without padding_free, .* ring"),
    ],
)
def test_swift_refuses(tiny_model: Path, swift_example: Any, options: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=f"G2RL: expected none of the options .* found .*{found}"):
        swift_example.G2RLTrainer(AutoModelForCausalLM.from_pretrained(tiny_model), **options)
