"""`G2RLTrainer` with ZeRO, whose stage 3 leaves each rank a part of the head, against DDP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.g2rl.conftest import build_model
from tests.integrations import recorded

HERE = Path(__file__).parent
LORA = 'adapter={"r": 4, "target_modules": ["q_proj", "v_proj"]'
CASES = {
    "all weights": [],
    "two iterations, KL": ["num_iterations=2", "beta=0.1", "gradient_checkpointing=true"],
    "accumulated": ["gradient_accumulation_steps=2"],
    "log-probabilities of TRL": ["fused_logprobs=false"],
    "LoRA": [LORA + "}"],
    "LoRA and a head of its own": [LORA + ', "modules_to_save": ["lm_head"]}'],
}


def train(model: Path, output: Path, stage: int, options: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "train.py"), str(model), str(output), str(stage), *options]
    return recorded.run(command, output, HERE, timeout=300, DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1")


def trained(model: Path, output: Path, stage: int, options: list[str]) -> list[dict[str, Any]]:
    recorded.output(train(model, output, stage, options))
    ranks = [torch.load(output / f"stage{stage}-rank{rank}.pt") for rank in range(2)]
    assert all(rank["head in parts"] == (stage == 3) for rank in ranks)
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_zero_3_trains_as_ddp_does(name: str, tmp_path: Path) -> None:
    """Features, rewards with their bonus, and weights; an untied head is not whole for its embedding's sake."""
    model = build_model(tmp_path / "model", tie_word_embeddings=False)
    of_stages = [trained(model, tmp_path, stage, CASES[name]) for stage in (0, 3)]
    for ddp, zero in zip(*of_stages, strict=True):
        assert len(ddp["rounds"]) == len(zero["rounds"]) > 1
        for one, other in zip(ddp["rounds"], zero["rounds"], strict=True):
            torch.testing.assert_close(other["features"], one["features"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(other["rewards"], one["rewards"], rtol=0, atol=1e-3)
            assert one["rewards"][:, -1].abs().max() > 0.1
        assert ddp["weights"].keys() == zero["weights"].keys()
        for name, weight in ddp["weights"].items():
            torch.testing.assert_close(zero["weights"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_zero_2(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    (ddp, _), (zero, _) = (trained(model, tmp_path, stage, []) for stage in (0, 2))
    for name, weight in ddp["weights"].items():
        torch.testing.assert_close(zero["weights"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_head_that_is_not_all_is_refused_with_zero_3(tmp_path: Path) -> None:
    """In the first round: before, no rank has a model that runs."""
    run = train(build_model(tmp_path / "model"), tmp_path, 3, ["doubled=true"])
    assert run.returncode != 0
    assert "model: expected one with a head that G2RL serves, but log-probabilities of LlamaForCausalLM" in run.stderr
