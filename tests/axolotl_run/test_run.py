"""axolotl's own command for two steps: its configuration, data, trainer and G2RL's plug-in, all of them real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.g2rl.conftest import build_model
from tests.recorded import TOLERANCE, check, read

ROOT = Path(__file__).parents[2]
CASES: dict[str, dict[str, Any]] = {
    "all-weights": {},
    "lora": {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_training_run(name: str, tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+3="}) + "\n" for i in range(8)))
    config = {
        "base_model": str(model),
        "rl": "grpo",
        "plugins": ["g2rl.integrations.axolotl.G2RLPlugin"],
        "trainer_cls": "g2rl.integrations.axolotl.trainer.G2RLTrainer",
        "g2rl": {"reward_range": [0, 1]},
        "trl": {
            "num_generations": 4,
            "max_completion_length": 12,
            "temperature": 0.9,
            "beta": 0.0,
            "reward_funcs": ["tests.axolotl_run.rewards.vowels"],
        },
        "datasets": [{"path": str(tmp_path / "data.jsonl"), "ds_type": "json", "split": "train", "type": None}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "out"),
        "sequence_len": 64,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "num_epochs": 1,
        "learning_rate": 1e-2,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "attn_implementation": "eager",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "save_strategy": "no",
        "special_tokens": {"pad_token": "<pad>"},
    } | CASES[name]
    (tmp_path / "config.yml").write_text(json.dumps(config))  # which is YAML
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}",
        "RECORDS": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, "-m", "axolotl.cli.main", "train", "config.yml", "--launcher", "python"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    steps = read(tmp_path)
    assert len(steps) == 2
    for step in steps:
        assert check(step, model, 4, 0.9) < TOLERANCE
