"""axolotl's own command for two steps with G2RL: its configuration, data, model, adapters and trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.g2rl.conftest import build_model
from tests.integrations import recorded

HERE = Path(__file__).parent
GROUP, TEMPERATURE = 8, 0.9
# What a configuration has besides, and ranks.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "all-weights": ({}, 1),
    "lora": ({"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}, 1),
    # On each rank axolotl wants as many groups as there are ranks, and it gives each a GPU unless told of other memory.
    "two-ranks": ({"micro_batch_size": 8, "gradient_accumulation_steps": 2, "max_memory": {"cpu": "1GiB"}}, 2),
}


def train(folder: Path, changed: dict[str, Any], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    rows = [json.dumps({"prompt": f"{i}+3="}) for i in range(8)]
    (folder / "data.jsonl").write_text("\n".join(rows))
    config = {
        "base_model": str(build_model(folder / "model")),
        "rl": "grpo",
        "plugins": ["g2rl.integrations.axolotl.G2RLPlugin", "recorder.Recorder"],
        "trainer_cls": "g2rl.integrations.axolotl.trainer.G2RLTrainer",
        "g2rl": {"reward_range": [0, 1]},
        "trl": {
            "beta": 0.0,
            "num_generations": GROUP,
            "max_completion_length": 12,
            "temperature": TEMPERATURE,
            "reward_funcs": ["tests.integrations.recorded.vowels"],
        },
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "split": "train"}],
        "dataset_num_proc": 1,
        "sequence_len": 64,
        "attn_implementation": "eager",
        "bf16": False,
        "micro_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "seed": 42,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "save_strategy": "no",
        "output_dir": str(folder / "out"),
    } | changed
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "axolotl.cli.main", "train", "config.yml"]
    if ranks > 1:
        command += ["--launcher", "torchrun", "--", "--nproc_per_node", str(ranks)]
    variables = {"ACCELERATE_USE_CPU": "1", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    return recorded.run(command, folder, HERE, timeout=240, HF_HOME=str(folder / "cache"), **variables)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_training_run(name: str, tmp_path: Path) -> None:
    changed, ranks = CASES[name]
    recorded.output(train(tmp_path, changed, ranks))
    steps = recorded.read(tmp_path)
    assert [len(step) for step in steps] == [ranks, ranks]
    for step in steps:
        assert recorded.check(step, tmp_path / "model", GROUP, TEMPERATURE) < recorded.TOLERANCE


@pytest.mark.slow
def test_a_misspelt_option_stops_the_command(tmp_path: Path) -> None:
    run = train(tmp_path, {"g2rl": {"reward_rnage": [0, 1]}})
    assert run.returncode != 0
    assert "g2rl.reward_rnage\n  Extra inputs are not permitted" in run.stderr
