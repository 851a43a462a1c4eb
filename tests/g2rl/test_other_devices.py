"""The trainer on an accelerator that is none of NVIDIA's, without float64, against the same on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from g2rl import devices
from g2rl.cli import main
from g2rl.config import Config, ConfigError, load_config
from g2rl.devices import device_name, resolve_device
from g2rl.heads import head_difference
from g2rl.integrations.exploration import Options, shape_by_uid
from g2rl.integrations.head_pass import HeadPass
from g2rl.model import load_model
from g2rl.parallel import launch
from g2rl.precision import settled
from g2rl.trainer import Trainer
from tests.accelerator import KIND, accelerator, asked_without_kernel, no_other
from tests.g2rl.json_lines import read

pytestmark = no_other
SMALL = (
    "steps=2", "task.held_out=2", "rollout.prompts=2", "rollout.group_size=4", "rollout.max_new_tokens=4",
    "eval.every=1", "model.autocast=none", "rollout.dtype=float32", "checkpoint.every=1", "optim.lr=1e-3",
)  # fmt: skip


def settings(model: Path, runs: Path, device: str, *more: str) -> list[str]:
    return [*SMALL, f"model.path={model}", f"runs_dir={runs}", f"model.device={device}", f"name={device}", *more]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if not key.startswith("time/")}
        for record in read(run_dir / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("objective.updates=2", "objective.kl_coef=0.1", "model.prefix_sharing=never", "model.packing=never"),
        ("model.lora.rank=2", "objective.tokens_per_micro_batch=64", "objective.importance_cap=2"),
        ("rollout.ahead=1", "profile=true"),
        ("model.attention=eager", "model.gradient_checkpointing=true"),
        ("method=evol_rl",),
        ("objective.ratio=sequence", "objective.updates=2", "objective.overlong=filter"),
    ],
    ids=["plain", "reference, padded", "adapter, micro-batches", "ahead", "eager attention", "texts", "sequences"],
)
def test_runs_are_those_of_a_cpu(untied_model: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    Trainer(load_config([], settings(untied_model, tmp_path, "cpu", *more))).run()
    with accelerator():
        Trainer(load_config([], settings(untied_model, tmp_path, KIND, *more))).run()
    assert asked_without_kernel("MPS") == []
    found, expected = metrics(tmp_path / KIND), metrics(tmp_path / "cpu")
    assert [record.keys() for record in found] == [record.keys() for record in expected]
    for here, there in zip(found, expected, strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-5, nan_ok=True)
    facts = json.loads((tmp_path / KIND / "environment.json").read_text())
    assert facts["device"] == f"{KIND} (a CPU that plays an accelerator)"


def test_a_run_goes_on(untied_model: Path, tmp_path: Path) -> None:
    with accelerator():
        config = load_config([], settings(untied_model, tmp_path, KIND))
        Trainer(config).run()
        whole = metrics(tmp_path / KIND)
        (tmp_path / KIND / "checkpoints" / "step-000002").rename(tmp_path / "later")
        Trainer(replace(config, resume=str(tmp_path / KIND))).run()
    assert metrics(tmp_path / KIND) == whole


def test_other_commands(untied_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollouts = ["rollout.max_new_tokens=4", "model.device=" + KIND, "task.held_out=4"]
    with accelerator():
        assert main(["eval", str(untied_model), *rollouts]) == 0
        out = str(tmp_path / "geometry")
        command = ["geometry", str(untied_model), "--problems", "2", "--samples", "4", "--encoder", "none"]
        assert main([*command, "--gradients", "--max-tokens", "4", "--out", out, f"model.device={KIND}"]) == 0
    assert "nan" not in (tmp_path / "geometry" / "report.md").read_text()


def test_what_other_trainers_call(untied_model: Path) -> None:
    """TRL's, for one: a pass over rows, and rewards shaped by its features."""
    ids = torch.randint(60, (4, 9), generator=torch.Generator().manual_seed(0))
    scored, rewards = torch.arange(9).expand(4, 9) > 3, torch.tensor([1.0, -1.0, 1.0, 1.0])

    def shaped(kind: str) -> torch.Tensor:
        model, _ = load_model(replace(settled(Config()).model, path=str(untied_model), device=kind))
        assert head_difference(model) == ""
        there, mask = ids.to(kind), scored.to(kind)
        outputs = HeadPass(there, mask, mask.float(), 1.0)(model, model.base_model(there).last_hidden_state)
        return shape_by_uid(outputs.features, rewards.to(kind), ["a", "a", "a", "b"], Options())[0].cpu()

    expected = shaped("cpu")
    with accelerator():
        assert torch.allclose(shaped(KIND), expected, atol=1e-4)
    assert not torch.equal(expected, rewards)


def test_which_device_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("auto").type == resolve_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="model.device: expected auto or cpu, found mps, which"):
        resolve_device("mps")
    with accelerator():
        assert resolve_device("auto").type == resolve_device(KIND).type == KIND
        assert resolve_device("cpu").type == "cpu" and device_name(torch.device(KIND)).startswith("a CPU")
        with pytest.raises(ConfigError, match=f"expected auto, cpu or {KIND}, found cuda"):
            resolve_device("cuda")
    monkeypatch.setattr(devices, "_accelerator", lambda: torch.device("mps"))
    assert resolve_device("auto").type == "cpu" and resolve_device("mps").type == "mps"


def test_ranks_are_brought_together_on_their_devices() -> None:
    of = launch._device_type
    wrong = Config(model=replace(Config().model, device="cuda"))
    assert of(Config(model=replace(Config().model, device="cpu"))) == "cpu"
    assert of(wrong) == of(ConfigError("told once ranks agree")) == "cpu"
    with accelerator():
        assert of(Config()) == KIND
