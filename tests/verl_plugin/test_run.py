"""verl's own command, from its entry point to the last step: Ray, queue, rollouts, rewards, engine and trainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas
import pytest

from tests.g2rl.conftest import build_model
from tests.integrations import recorded

HERE = Path(__file__).parent


CASES: dict[str, dict[str, object]] = {
    "sync": {},
    "colocate_async": {},
    "separate_async": {
        "actor_rollout_ref.rollout.checkpoint_engine.backend": "file",
        "actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module": "cpu_rollout",
        "actor_rollout_ref.rollout.n_gpus_per_node": 1,
        "actor_rollout_ref.rollout.nnodes": 1,
        "data.train_batch_size": 4,
        "trainer.v1.separate_async.parameter_sync_step": 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", CASES)
def test_training_run(tmp_path: Path, mode: str) -> None:
    model = build_model(tmp_path / "model")
    row = {"data_source": "vowels", "prompt": [{"role": "user", "content": "12+3="}]}
    rows = [row | {"reward_model": {"style": "rule", "ground_truth": ""}, "extra_info": {"index": i}} for i in range(6)]
    pandas.DataFrame(rows).to_parquet(tmp_path / "data.parquet")
    options = {
        "trainer.v1.trainer_mode": f"g2rl_{mode}",
        "+g2rl.min_range": 0,
        "algorithm.adv_estimator": "grpo",
        "data.train_files": tmp_path / "data.parquet",
        "data.val_files": tmp_path / "data.parquet",
        "data.train_batch_size": 3,
        "data.max_prompt_length": 16,
        "data.max_response_length": 12,
        "data.dataloader_num_workers": 0,
        "actor_rollout_ref.model.path": model,
        "+actor_rollout_ref.model.override_config.attn_implementation": "eager",
        "actor_rollout_ref.actor.strategy": "fsdp2",
        "actor_rollout_ref.actor.ppo_mini_batch_size": 2,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.actor.use_torch_compile": False,
        "actor_rollout_ref.actor.fsdp_config.dtype": "float32",
        "actor_rollout_ref.rollout.name": "cpu",
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": HERE / "reward.py",
        "trainer.device": "cpu",
        "trainer.n_gpus_per_node": 1,
        "trainer.nnodes": 1,
        "trainer.logger": "[file]",
        "trainer.total_training_steps": 2,
        "trainer.save_freq": -1,
        "trainer.test_freq": -1,
        "trainer.val_before_train": False,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "ray_kwargs.ray_init.num_cpus": 16,
        "+ray_kwargs.ray_init.num_gpus": 2,  # which verl's platform takes for its CPU
        "hydra.run.dir": tmp_path / "hydra",
    } | CASES[mode]
    variables = {
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu",
        "VERL_FILE_LOGGER_PATH": str(tmp_path / "log.jsonl"),
        "RAY_AUTH_MODE": "disabled",
    }
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *(f"{key}={value}" for key, value in options.items())]
    said = recorded.output(recorded.run(command, tmp_path, HERE, timeout=300, **variables))
    assert "trainer.v1.trainer_mode=g2rl_sync or g2rl_colocate_async or g2rl_separate_async, with" in said
    assert said.count("G2RL: shaping rewards of -1 to 1 with strength 1") == 1
    steps = [json.loads(line)["data"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [step["training/global_step"] for step in steps] == [1, 2]
    for step in steps:
        # The task's rewards stay what they are; advantages are made of others, doubled for the newest of a group.
        assert {step["critic/score/min"], step["critic/score/max"]} <= {-1, 1}
        assert max(-step["critic/rewards/min"], step["critic/rewards/max"]) == pytest.approx(2)
        assert step["g2rl/degenerate_share"] == 0 and -1 / 3 <= step["g2rl/mean_cosine"] < 1
        assert 0 < step["g2rl/score"] <= 1 and step["g2rl/feature_norm"] > 0.1
        assert step["actor/grad_norm"] > 0
        # Weights reach the rollout engine, and it is they that features are made with.
        assert step["training/rollout_probs_diff_max"] < 0.05
