"""`G2RLTrainer` on two ranks, with groups that span both, against the float64 reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from g2rl_kernels import Shaping
from tests.integrations.test_trl import Round, assert_features, reference_advantages, reference_bonus

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "shared pass": ["per_device_train_batch_size=2", "gradient_checkpointing=true"],
    "accumulated, KL": ["per_device_train_batch_size=3", "gradient_accumulation_steps=2", "beta=0.04"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_groups_span_ranks(name: str, tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.integrations.trl_ranks", str(tiny_model), str(tmp_path), *OPTIONS[name]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    settings = SimpleNamespace(
        args=SimpleNamespace(reward_range=None, shaping=Shaping(min_range=0.0), strength=1.0),
        reward_weights=torch.ones(1),
        scale_rewards="group",
    )
    for rank in ranks:
        assert rank["error"] < 1e-4 and max(*rank["sharding_errors"], rank["gathering_error"]) < 1e-5
    for parts in zip(*(rank["rounds"] for rank in ranks), strict=True):
        model.load_state_dict(parts[0]["state"])
        assert torch.equal(parts[0]["rewards"], parts[1]["rewards"])
        played = [Round(model, part["output"], part["rewards"], part["features"], None) for part in parts]
        for each in played:
            assert_features(each, 1.0)
        bonus, bound = reference_bonus(played[0], torch.cat([each.features for each in played]), settings)
        torch.testing.assert_close(parts[0]["rewards"][:, -1].double(), bonus, rtol=0, atol=bound)
        advantages = torch.cat([part["output"]["advantages"] for part in parts])
        torch.testing.assert_close(advantages.double(), reference_advantages(played[0], settings), rtol=1e-5, atol=1e-6)
