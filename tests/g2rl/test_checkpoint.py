"""Checkpoints are whole or absent."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from g2rl.checkpoint import (
    checkpoints,
    drop_training_state,
    find_checkpoint,
    load_checkpoint,
    load_state,
    save_checkpoint,
)
from g2rl.config import ConfigError, ModelConfig
from g2rl.model import load_model


@pytest.fixture(scope="module")
def policy(tiny_model: Path):
    return load_model(ModelConfig(path=str(tiny_model)))


def test_weights_state_and_random_states_come_back(policy, tmp_path: Path) -> None:
    model, tokenizer = policy
    torch.manual_seed(5)
    random.seed(5)
    folder = save_checkpoint(tmp_path, 7, model, tokenizer, {"position": 56}, keep=2)
    expected = torch.rand(3), random.random()
    torch.manual_seed(0)
    random.seed(0)
    state = load_state(folder)
    assert state == {"position": 56, "step": 7}
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    again, _ = load_model(ModelConfig(path=str(folder)))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_newest_are_kept(policy, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, *policy, {}, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 3]
    assert find_checkpoint(tmp_path).name == "step-000003"
    assert find_checkpoint(find_checkpoint(tmp_path)).name == "step-000003"


def test_a_save_cut_short_leaves_the_last_checkpoint(policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, *policy, {}, keep=1)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tmp_path, 2, *policy, {}, keep=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    save_checkpoint(tmp_path, 2, *policy, {}, keep=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002"]


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a checkpoint"):
        find_checkpoint(tmp_path / "run")


def test_a_model_kept_alone_loads_and_is_not_trained_on(policy, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 7, *policy, {"position": 56, "optimizer": {"state": torch.ones(9)}}, keep=1)
    drop_training_state(folder)
    drop_training_state(folder)
    assert sorted(torch.load(folder / "trainer.pt")) == ["final", "position", "random", "step"]
    again, _ = load_model(ModelConfig(path=str(find_checkpoint(tmp_path))))
    for a, b in zip(policy[0].parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ConfigError, match="resume: expected a checkpoint with the optimizer's state, found none"):
        load_checkpoint(folder, policy[0], {})
