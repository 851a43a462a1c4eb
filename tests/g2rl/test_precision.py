"""What `auto` is with and without instructions for bfloat16, on several ranks, and in a run that goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from g2rl.config import Config, ConfigError, ModelConfig, RolloutConfig, load_config
from g2rl.dry_run import dry_run
from g2rl.evaluation.command import model_config
from g2rl.forward import ForwardPass
from g2rl.parallel.ranks import Ranks
from g2rl.precision import has_bf16, settled
from g2rl.trainer import Trainer

SMALL = (
    "steps=1", "task.held_out=2", "rollout.prompts=2", "rollout.group_size=2", "rollout.max_new_tokens=4",
    "eval.every=0", "name=run",
)  # fmt: skip


def choose(monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    monkeypatch.setattr("g2rl.precision.has_bf16", lambda device: half)
    monkeypatch.setattr("g2rl.dry_run.has_bf16", lambda device: half)


def types(config: Config) -> tuple[str, str]:
    return config.model.autocast, config.rollout.dtype


@pytest.mark.parametrize(
    ("config", "with_bf16", "without"),
    [
        (Config(), ("bfloat16", "bfloat16"), ("none", "float32")),
        (Config(model=ModelConfig(autocast="bfloat16")), ("bfloat16", "bfloat16"), ("bfloat16", "float32")),
        (Config(model=ModelConfig(autocast="none")), ("none", "bfloat16"), ("none", "float32")),
        (Config(rollout=RolloutConfig(dtype="bfloat16")), ("bfloat16", "bfloat16"), ("none", "bfloat16")),
        (Config(rollout=RolloutConfig(dtype="float32")), ("bfloat16", "float32"), ("none", "float32")),
        (Config(rollout=RolloutConfig("vllm", "http://there")), ("bfloat16", "bfloat16"), ("none", "bfloat16")),
        (Config(rollout=RolloutConfig("vllm")), ("bfloat16", "bfloat16"), ("none", "float32")),
    ],
)
def test_auto_is_bf16_where_there_are_instructions(
    config: Config, with_bf16: tuple[str, str], without: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, True)
    assert types(settled(config)) == with_bf16
    choose(monkeypatch, False)
    found = settled(config)
    assert types(found) == without
    choose(monkeypatch, True)
    assert settled(found) == found  # it is settled for good


def test_ranks_take_what_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, True)
    ranks = Ranks(0, 2)
    for other, expected in ((True, ("bfloat16", "bfloat16")), (False, ("none", "float32"))):
        monkeypatch.setattr(Ranks, "gathered", lambda self, own, other=other: [*own, other])
        assert types(settled(Config(), ranks)) == expected


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_vnni": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "bf16": False, "sve_max_length": 16}, False),
        ({}, False),
    ],
)
def test_instructions_of_processors(
    instructions: dict[str, object], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert has_bf16(torch.device("cpu")) == expected
    monkeypatch.setattr("sys.platform", "darwin")
    assert not has_bf16(torch.device("cpu"))


@pytest.mark.parametrize("known", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_instructions_before_pytorch_lists_them(known: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    earlier = SimpleNamespace(**{name: lambda name=name: name == known for name in names})
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(torch, "cpu", earlier)
    assert has_bf16(torch.device("cpu")) == (known is not None)


def test_this_processor_in_both_ways() -> None:
    """What PyTorch lists, and its older functions, say the same of it."""
    if hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities()["architecture"] == "x86_64":
        older = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        assert has_bf16(torch.device("cpu")) == older


def test_a_gpu_without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch computes bfloat16 on chips before Ampere, too, in software."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_bf16(torch.device("cuda"))


def test_a_gpu_that_is_not_there() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="model.device: expected auto or cpu, found cuda"):
            settled(Config(model=ModelConfig(device="cuda")))


def test_nothing_computes_before_it_is_settled() -> None:
    with pytest.raises(AssertionError, match="model.autocast: expected a type, found auto"):
        ForwardPass(torch.nn.Linear(1, 1), ModelConfig())


@pytest.mark.parametrize("half", [True, False])
def test_a_run_keeps_what_it_began_with(
    tiny_model: Path, tmp_path: Path, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another processor, too, and its checkpoints are evaluated so; another run there has that one's types."""
    expected = ("bfloat16", "bfloat16") if half else ("none", "float32")
    settings = [f"model.path={tiny_model}", f"runs_dir={tmp_path}", *SMALL]
    choose(monkeypatch, half)
    trainer = Trainer(load_config(None, settings))
    assert types(trainer.config) == expected
    assert (trainer.sampler.model is trainer.model) != half
    trainer.run()
    choose(monkeypatch, not half)
    kept = load_config(tmp_path / "run" / "config.yaml")
    assert types(kept) == types(settled(kept)) == expected
    resumed = Trainer(replace(kept, resume=str(tmp_path / "run"), steps=2))
    resumed.run()
    assert types(resumed.config) == types(load_config(tmp_path / "run" / "config.yaml")) == expected
    assert types(model_config(str(tmp_path / "run"), [])) == expected
    assert types(model_config(str(tiny_model), [])) != expected


def test_forecasts_say_which_types_were_left_open(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"model.path={tiny_model}", *SMALL]
    whole = ["model.autocast=bfloat16", "rollout.dtype=bfloat16"]
    said = "Types left to `auto` are float32 on this processor"
    for half, overrides, tells in ((False, [], True), (False, whole, False), (True, [], False)):
        choose(monkeypatch, half)
        expected = dry_run(load_config(None, [*settings, *overrides]))
        assert (said in " ".join(capsys.readouterr().out.split())) == tells
        assert ("weights cast to bfloat16" in expected.update) == (not tells)
        assert ("rollout copy (bfloat16)" in expected.lasting) == (not tells)
