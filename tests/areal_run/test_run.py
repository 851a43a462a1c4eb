"""AReaL's own trainer with G2RL: its scheduler, controllers, workers with FSDP, workflow and advantages, on a CPU.

sglang.py stands in for SGLang's server; records.py has attention for packed sequences without a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from tests.g2rl.conftest import build_model
from tests.integrations import recorded

HERE = Path(__file__).parent
TEMPERATURE = 0.7
CASES: dict[str, dict[str, Any]] = {
    "two-ranks": {"backend": "fsdp:d2", "use_decoupled_loss": True},
    # Old log-probabilities are the server's, so that AReaL runs no pass for any.
    "lora-micro-batches": {"use_lora": True, "lora_rank": 2, "mb_spec": {"max_tokens_per_mb": 64}},
    "sequence-parallel": {"backend": "fsdp:d1c2", "recompute_logprob": True},
}


def settings(folder: Path, model: Path, actor: dict[str, Any]) -> dict[str, Any]:
    """Two steps with two prompts and six responses to each."""
    names = {"experiment_name": "g2rl", "trial_name": "test"}
    worker = {"scheduling_spec": [{"gpu": 0, "port_count": 2, "cmd": "python -m areal.infra.rpc.rpc_server"}]}
    kept = names | {"fileroot": str(folder)}
    return names | {
        "actor": {
            "backend": "fsdp:d1",
            "path": str(model),
            "dtype": "float32",
            "attn_impl": "sdpa",
            "weight_update_mode": "disk",
            "temperature": TEMPERATURE,
            "kl_ctl": 0.0,
            "reward_bias": -0.5,
            "reward_scaling": 10.0,
            "optimizer": {"lr": 1e-2, "warmup_steps_proportion": 0.0, "lr_scheduler_type": "constant"},
            "g2rl": {"reward_range": [0, 1]},
        }
        | names
        | worker
        | actor,
        "cluster": {
            "fileroot": str(folder),
            "n_gpus_per_node": 0,
            "name_resolve": {"type": "nfs", "nfs_record_root": str(folder / "names")},
        },
        "evaluator": kept,
        "gconfig": {"n_samples": 6, "max_new_tokens": 12, "temperature": TEMPERATURE, "lora_name": "policy"},
        "recover": kept | {"mode": "disabled"},
        "rollout": {
            "backend": "sglang:d1",
            "consumer_batch_size": 2,
            "max_head_offpolicyness": 0,
            "use_lora": "use_lora" in actor,
        }
        | names
        | worker,
        "saver": kept,
        "scheduler": {"type": "local"},
        "sglang": {"model_path": str(model), "dtype": "float32", "enable_lora": "use_lora" in actor},
        "stats_logger": kept,
        "tokenizer_path": str(model),
        "total_train_epochs": 1,
        "total_train_steps": 2,
        "train_dataset": {"batch_size": 2, "shuffle": False, "path": "none", "type": "rl"},
    }


def train(folder: Path, model: Path, actor: dict[str, Any]) -> str:
    """What the script says."""
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(folder, model, actor)))
    command = [sys.executable, HERE / "train.py", "--config", folder / "config.yaml"]
    run = recorded.run(command, folder, HERE, timeout=300)
    return recorded.output(run, "".join(path.read_text() for path in folder.glob("logs/**/actor.log")))


def build_qwen2(folder: Path, tied: bool) -> Path:
    """AReaL hands masks to models as Qwen's take them."""
    build_model(folder, tie_word_embeddings=tied)
    sizes = AutoConfig.from_pretrained(folder).to_dict()
    for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "head_dim", "rope_parameters"):
        sizes.pop(name, None)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen2Config(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_run(tmp_path: Path, case: str) -> None:
    model = build_qwen2(tmp_path / "tiny", tied="lora" in case)
    said = train(tmp_path, model, CASES[case])
    assert said.count("G2RL: shaping rewards of 0 to 1 with strength 1") == 1
    assert ("AReaL runs no pass for proximal log-probabilities" in said) == ("lora" in case)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    raw_seen: set[float] = set()
    for step in (0, 1):
        policy.load_state_dict(torch.load(tmp_path / f"weights-{step}.pt"))
        ranks = range(2 if case == "two-ranks" else 1)
        groups = [group for rank in ranks for group in torch.load(tmp_path / f"step-{step}-{rank}.pt")]
        assert [len(group["rewards"]) for group in groups] == [6, 6]
        for group in groups:
            raw, responses, advantages = group["rewards"].tolist(), [], []
            raw_seen |= set(raw)
            for ids, real, predicts, advantage in zip(
                group["input_ids"].long(),
                group["attention_mask"].bool(),
                group["loss_mask"].bool(),
                group["advantages"],
                strict=True,
            ):
                responses.append((ids[real], predicts.roll(1)[real]))
                advantages.append(recorded.of_response(advantage, predicts))
            shaped = recorded.shaped_rewards(policy, responses, raw, [0] * 6, TEMPERATURE)
            # Features are sums in fp32, of relative error 1e-6, and so are scores, which are near one here. A reward
            # has a difference of scores over their range, which is 1e-2 at least, and AReaL's scale.
            expected = [10 * (reward - 0.5) for reward in shaped]
            assert advantages == pytest.approx(expected, rel=0, abs=1e-3)
    assert raw_seen == {0.0, 1.0}
    recorded.assert_weights_moved(tmp_path)
