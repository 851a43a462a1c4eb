"""ms-swift's own command for two steps with examples/swift_g2rl.py: its arguments, data, template and trainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.g2rl.conftest import build_model
from tests.integrations.recorded import TOLERANCE, check, output, read, run

HERE = Path(__file__).parent
# Arguments, and ranks; with one prompt a step, its group spans both.
CASES = {
    "all-weights": ("--tuner_type full --per_device_train_batch_size 8", 1),
    # Dropout would be in features, as it is in the pass that they ride on.
    "lora": ("--tuner_type lora --lora_rank 4 --lora_dropout 0 --per_device_train_batch_size 8", 1),
    "packed": ("--tuner_type full --per_device_train_batch_size 8 --padding_free true", 1),
    "two-ranks": ("--tuner_type full --per_device_train_batch_size 2", 2),
    # Two ranks have parts of the same rows, and two such pairs the group.
    "sequence-parallel": (
        "--tuner_type full --per_device_train_batch_size 2 --padding_free true --attn_impl sdpa "
        "--sequence_parallel_size 2",
        4,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_training_run(name: str, tmp_path: Path) -> None:
    arguments, ranks = CASES[name]
    model = build_model(tmp_path / "model")
    rows = [{"messages": [{"role": "user", "content": f"{i}+3="}]} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "rlhf_type": "grpo",
        "model": model,
        "model_type": "llama",
        "template": "dummy",
        "torch_dtype": "float32",
        "attn_impl": "eager",
        "dataset": tmp_path / "data.jsonl",
        "split_dataset_ratio": 0,
        "load_from_cache_file": "false",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "reward_funcs": "vowels",
        "num_generations": 4,
        "max_completion_length": 12,
        "temperature": 0.9,
        "beta": 0,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "gradient_accumulation_steps": 1,
        "bf16": "false",
        "fp16": "false",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": tmp_path / "out",
    }
    command = [
        "rlhf",
        *(word for key, value in options.items() for word in (f"--{key}", str(value))),
        *arguments.split(),
    ]
    command += ["--external_plugins", str(HERE.parents[1] / "examples/swift_g2rl.py"), str(HERE / "rewards.py")]
    variables = {"HF_HUB_OFFLINE": "1", "MODELSCOPE_CACHE": str(tmp_path / "cache")}
    if ranks > 1:
        variables["NPROC_PER_NODE"] = str(ranks)
    program = [sys.executable, "-c", "from swift.cli.main import cli_main; cli_main()"]
    output(run(program + command, tmp_path, HERE, timeout=240, **variables))
    steps = read(tmp_path)
    assert [len(step) for step in steps] == [ranks, ranks]
    for step in steps:
        assert check(step, model, 4, 0.9) < TOLERANCE
