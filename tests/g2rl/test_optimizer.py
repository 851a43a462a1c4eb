"""The optimiser: master weights of a model in bfloat16, 8-bit states, and exact resumption of both."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from g2rl.cli import main
from g2rl.config import Config, ConfigError, load_config
from g2rl.model import load_model
from g2rl.optimizer import in_words, make_optimizer
from g2rl.trainer import Trainer
from tests.g2rl.json_lines import untimed

SETTINGS = ("optim.lr=1e-4", "optim.weight_decay=0.1", "model.dtype=bfloat16")


def settings(*overrides: str) -> Config:
    return load_config(None, [*SETTINGS, *overrides])


def weights() -> list[Parameter]:
    """A bf16 weight of 5000 numbers, which is enough for 8-bit states, and a fp32 one."""
    generator = torch.Generator().manual_seed(0)
    return [
        Parameter(torch.randn(50, 100, generator=generator).bfloat16()),
        Parameter(torch.randn(7, generator=generator)),
    ]


def train(parameters: list[Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in parameters)


def test_small_changes_add_up_in_bfloat16() -> None:
    """Those of AdamW on the same weights in fp32, rounded; each change alone is a hundredth of what bf16 can tell."""
    found = weights()
    expected = [Parameter(p.detach().float()) for p in found]
    train(found, make_optimizer(found, settings()), range(20))
    reference = torch.optim.AdamW(expected, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(expected, found, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(q.dtype).float()
        reference.step()
    assert torch.equal(found[0], expected[0].bfloat16())
    assert not torch.equal(found[0], weights()[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-7, rtol=1e-6)


class EightBit(torch.optim.AdamW):
    """Stands in for bitsandbytes' class, where that is not installed: what it is called with is what counts."""


@pytest.fixture(params=["adamw", "stand-in", "bitsandbytes"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    elif request.param == "stand-in":
        stand_in: Any = ModuleType("bitsandbytes")
        stand_in.optim = SimpleNamespace(AdamW8bit=EightBit)
        monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    return "adamw" if request.param == "adamw" else "adamw_8bit"


def test_state_comes_back(name: str) -> None:
    """Weights, masters and states through a file: the steps after it are those of a run without it, to the bit."""
    config = settings(f"optim.name={name}")
    whole = weights()
    optimizer = make_optimizer(whole, config)
    train(whole, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": [p.data for p in whole]}, file)
    train(whole, optimizer, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = weights()
    optimizer = make_optimizer(resumed, config)
    for p, value in zip(resumed, saved["weights"], strict=True):
        p.data.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(3, 6))
    for p, q in zip(resumed, whole, strict=True):
        assert torch.equal(p, q)


def test_training_in_bfloat16_resumes_to_the_same_numbers(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (
        f"model.path={tiny_model}", f"runs_dir={tmp_path}", *SETTINGS, "task.options={digits: [1, 1]}",
        "task.held_out=0", "rollout.prompts=2", "rollout.group_size=4", "rollout.max_new_tokens=6", "eval.every=0",
        "optim.lr=1e-3", "rewards=[{name: finished}]",
    )  # fmt: skip
    whole = Trainer(load_config(None, [*common, "name=whole", "steps=4"]))
    whole.run()
    Trainer(load_config(None, [*common, "name=parts", "steps=2"])).run()
    assert main(["train", f"resume={tmp_path / 'parts'}", "steps=4", "model.dtype=float32"]) == 2
    assert "model.dtype: expected bfloat16, as in training up to" in capsys.readouterr().err
    assert main(["train", f"resume={tmp_path / 'parts'}", "steps=4"]) == 0
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    assert {p.dtype for p in whole.model.parameters()} == {torch.bfloat16}
    said = json.loads((tmp_path / "whole" / "environment.json").read_text())["optimizer"]
    assert said == "fused AdamW, fp32 states, fp32 master weights"


def test_in_words() -> None:
    assert in_words(settings("model.dtype=float32")) == "fused AdamW, fp32 states"
    assert in_words(settings("optim.name=adamw_8bit", "model.lora.rank=4")) == "AdamW of bitsandbytes, 8-bit states"


def test_what_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="optim.name: adamw_8bit needs bitsandbytes: pip install 'bitsandbytes'"):
        make_optimizer(weights(), settings("optim.name=adamw_8bit"))
    with pytest.raises(ConfigError, match="model.offload_activations: expected false on a CPU"):
        load_model(load_config(None, ["model.offload_activations=true", "model.device=cpu"]).model)
