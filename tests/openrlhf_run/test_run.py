"""OpenRLHF's own command with G2RL: Ray, DeepSpeed, its loop, rewards and advantages, on a CPU.

vllm.py and flash_attn.py stand in for what needs a GPU; openrlhf_cpu.py records what each step trains on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.g2rl.conftest import build_model
from tests.integrations import recorded, written_out

HERE = Path(__file__).parent
TEMPERATURE = 0.7
PACKED = {"ds.packing_samples": None, "ds.attn_implementation": "cpu_flash_attention"}
CASES = {
    "padded-two-ranks": {
        "ds.attn_implementation": "eager",
        "actor.num_gpus_per_node": 2,
        # The ranks train on equally many batches so; OpenRLHF would hang.
        "rollout.micro_batch_size": 2,
    },
    # Adapters of scale 1, as the stand-in for vLLM adds them.
    "packed-lora-zero3": PACKED | {"ds.lora.rank": 2, "ds.lora.alpha": 2, "ds.zero_stage": 3},
    "asynchronous": {"ds.attn_implementation": "eager", "train.async_enable": None},
    "partial-rollouts": {
        "ds.attn_implementation": "eager",
        "train.async_enable": None,
        "train.partial_rollout_enable": None,
    },
    "ring": PACKED | {"ds.ring_attn_size": 2, "actor.num_gpus_per_node": 2},
}


def train(folder: Path, model: Path, changed: dict[str, object]) -> None:
    """Two steps with three prompts and four responses to each."""
    rows = [json.dumps({"input": f"{i}+{i + 1}="}) for i in range(6)]
    (folder / "data.jsonl").write_text("\n".join(rows))
    options = {
        "actor.model_name_or_path": model,
        "actor.num_gpus_per_node": 1,
        "actor.adam.lr": 1e-2,
        "actor.lr_warmup_ratio": 0,
        "algo.advantage.estimator": "group_norm",
        "algo.kl.init_coef": 0,
        "ckpt.output_dir": folder / "model",
        "ckpt.path": folder / "checkpoints",
        "data.max_len": 32,
        "data.prompt_dataset": folder / "data.jsonl",
        "reward.remote_url": HERE / "reward.py",
        "rollout.batch_size": 3,
        "rollout.max_new_tokens": 12,
        "rollout.micro_batch_size": 4,
        "rollout.n_samples_per_prompt": 4,
        "rollout.temperature": TEMPERATURE,
        "train.batch_size": 12,
        "train.micro_batch_size": 2,
        "vllm.num_engines": 1,
    } | changed
    words = [word for name, value in options.items() for word in (f"--{name}", value) if word is not None]
    command = [sys.executable, "-m", "g2rl.integrations.openrlhf", "--g2rl.reward_range", "0", "1", *map(str, words)]
    # A GPU for each process of OpenRLHF's, as far as Ray knows.
    ray = {"RAY_AUTH_MODE": "disabled", "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 8, "GPU": 4})}
    recorded.output(recorded.run(command, folder, HERE, timeout=300, DS_ACCELERATOR="cpu", **ray))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_run(tmp_path: Path, case: str) -> None:
    model = build_model(tmp_path / "tiny", tie_word_embeddings=False)
    train(tmp_path, model, CASES[case])
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    raw_seen: set[float] = set()
    for step in (1, 2):
        policy.load_state_dict(torch.load(tmp_path / f"weights-{step - 1}.pt"))
        batches = torch.load(tmp_path / f"experiences-{step}.pt")
        responses, prompts, raw, rewards, advantages = [], [], [], [], []
        for batch in batches:
            prompts += batch["prompts"]
            raw += [float(reward) for reward in batch["info"]["reward"]]
            rewards += batch["rewards"].tolist()
            for ids, real, acts, advantage in zip(
                *(batch[name] for name in ("sequences", "attention_mask", "action_mask", "advantages")), strict=True
            ):
                scored = torch.nn.functional.pad(acts, (1, 0))
                responses.append((ids[real.bool()], scored[real.bool()]))
                advantages.append(recorded.of_response(advantage, acts.bool()))
        assert len(raw) == 12 and sorted(map(prompts.count, prompts)) == [4] * 12
        raw_seen |= set(raw)
        shaped = recorded.shaped_rewards(policy, responses, raw, prompts, TEMPERATURE)
        # Features are sums in fp32, of relative error 1e-6, and so are scores, which are near one here. A reward has a
        # difference of scores over their range, which is 1e-2 at least.
        assert rewards == pytest.approx(shaped, abs=1e-4)
        # A reward's error and that of the mean, over a deviation of 0.2 at least: shaped rewards span half a unit.
        assert advantages == pytest.approx(written_out.advantages(shaped, prompts, epsilon=1e-9), abs=1e-3)
    assert raw_seen == {0.0, 1.0}
    recorded.assert_weights_moved(tmp_path)
