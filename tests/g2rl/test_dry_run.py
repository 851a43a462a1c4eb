"""Every shipped configuration takes one step with a tiny model of its architecture; forecasts against known numbers."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BambaConfig,
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    GPTJConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from g2rl.cli import main
from g2rl.config import Config, ConfigError, TaskConfig, load_config
from g2rl.dry_run import dry_run, scaled_down
from g2rl.forecast import Rates, _saved_bytes, forecast

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True}
QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, **SPECIAL}
QWEN3_1_7B = Qwen3Config(
    hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, **QWEN3
)
QWEN3_4B = Qwen3Config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, **QWEN3)
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    **SPECIAL,
)
# Shape and number of weights by the configuration's model.
MODELS = {
    "smollm2": (SMOLLM2, 134_515_008),
    "Qwen/Qwen3-1.7B-Base": (QWEN3_1_7B, 1_720_574_976),
    "Qwen/Qwen3-4B-Base": (QWEN3_4B, 4_022_468_096),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def shape_folder(folder: Path, shape: PretrainedConfig, tiny_model: Path) -> Path:
    """A model's configuration without weights, a character tokenizer, and a chat template of Qwen's format."""
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "chat_template*"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    shape.save_pretrained(folder)
    return folder


def prepared(path: Path, folder: Path, tiny_model: Path) -> Config:
    """A shipped configuration with what it loads from the hub replaced: its model, and the problems of MATH."""
    config = load_config(path)
    model = shape_folder(folder, MODELS[config.model.path][0], tiny_model)
    config = replace(config, model=replace(config.model, path=str(model)))
    if config.task.name == "math":
        config = replace(config, task=TaskConfig(system_prompt=config.task.system_prompt, held_out=4))
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_run_dry(
    path: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One step works, the forecast has the model's number of weights, and nothing is left behind."""
    config = prepared(path, tmp_path / "model", tiny_model)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    expected = dry_run(config)
    assert list((tmp_path / "here").iterdir()) == []
    printed = capsys.readouterr().out
    assert f"One step with a tiny {MODELS[load_config(path).model.path][0].model_type} on arithmetic works" in printed
    assert "TFLOP/s" in printed
    weights = MODELS[load_config(path).model.path][1]
    # Each of 28 layers: q, o 2048 + 2048, k, v 2048 + 1024, and three of 2048 + 6144, by rank 32.
    adapter = 28 * 32 * (2 * 4096 + 2 * 3072 + 3 * 8192) if config.model.lora.rank else 0
    assert (expected.parameters, expected.trained) == (weights + adapter, adapter or weights)
    assert all(seconds > 0 for seconds in expected.seconds.values())
    if config.model.lora.rank:
        assert expected.peak < 0.8 * 24e9


def test_states_by_hand() -> None:
    """Weights and gradients in bfloat16, masters in fp32, and two states of a byte each."""
    path = next(path for path in CONFIGS if path.stem == "qwen3-1.7b-math")
    config = load_config(path, ["model.dtype=bfloat16", "optim.name=adamw_8bit", "objective.kl_coef=0"])
    expected = forecast(config, QWEN3_1_7B, 100, Rates(1e15, 1e12))
    weights = 1_720_574_976
    assert expected.lasting == {
        "weights (bfloat16)": 2 * weights,
        "master weights (float32)": 4 * weights,
        "AdamW's states": 2 * weights,
    }
    assert expected.update["gradients"] == 2 * weights


def test_paper_size_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    """Qwen3-1.7B, 16 x 16 responses of 8192 tokens after prompts of 100, at 1e15 operations and 1e12 bytes a second."""
    config = load_config(next(path for path in CONFIGS if path.stem == "qwen3-1.7b-math"))
    expected = forecast(config, QWEN3_1_7B, 100, Rates(1e15, 1e12))
    weights, embedding, length = 1_720_574_976, 151936 * 2048, 8292
    assert expected.lasting == {
        "weights (float32)": 4 * weights,
        "AdamW's states": 8 * weights,
        "rollout copy (bfloat16)": 2 * weights,
        "reference model": 4 * weights,
    }
    assert expected.update["gradients"] == 4 * weights
    assert expected.update["weights cast to bfloat16"] == 2 * weights
    cache = 2 * 28 * 8 * 128 * 2  # bytes a token
    assert expected.rollout == {"cache, 32 x 8292 tokens": 32 * length * cache}
    body = 256 * length * (2 * (weights - embedding) + 2 * 28 * 16 * 128 * length)
    forward = body + 256 * 8192 * 2 * embedding
    assert expected.seconds == pytest.approx(
        {
            "rollout": 8 * 8192 * (2 * weights + 32 * (100 + 4096) * cache) / 1e12,
            "forward and backward": (3 * forward + body) / 1e15,
            "first pass": forward / 1e15,
            "reference": forward / 1e15,
        },
        rel=1e-4,  # norms are counted as products
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forecast_activations_are_those_of_a_real_pass(tiny_model: Path, attention: str) -> None:
    """Bytes that autograd keeps of a pass over 3 x 64 tokens, really computed, against those counted on meta."""
    config = AutoModelForCausalLM.from_pretrained(tiny_model).config
    with torch.device("meta"):
        name = "eager" if attention == "eager" else "g2rl_forecast"
        meta = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=name)
    meta.config.use_cache = False
    counted = _saved_bytes(meta.train(), 3, 64)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention).train()
    model.config.use_cache = False
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        return tensor

    mask = torch.ones(3, 64, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.base_model(input_ids=torch.full((3, 64), 5), attention_mask=mask).last_hidden_state
    real = sum(s.nbytes() for key, s in kept.items() if key not in weights) + hidden.nbytes
    assert counted == pytest.approx(real, rel=0.1)


def test_what_a_run_has_beside_its_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trackers get no record, and are named where they are not installed; weights to be split are tried whole."""
    (tmp_path / "trackio.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    settings = [f"model.path={tiny_model}", "parallel.strategy=fsdp2", "rollout.prompts=2"]
    expected = dry_run(load_config(None, [*settings, "log.trackers=[trackio]", "rollout.dtype=float32"]))
    assert expected.lasting["rollout copy (float32)"] == expected.lasting["weights (float32)"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "fsdp2 splits weights, gradients, the optimiser's states and the reference model over ranks" in printed
    assert "trackio" not in sys.modules
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="log.trackers: expected trackers that are installed, found 'wandb'"):
        dry_run(load_config(None, [*settings, "log.trackers=[wandb]"]))


@pytest.mark.parametrize(
    ("override", "copied"),
    [
        ("rollout.ahead=0", False),
        ("rollout.ahead=1", True),
        ("rollout.dtype=bfloat16", True),
        ("model.lora.rank=4", True),
        ("parallel.strategy=fsdp2", True),
    ],
)
def test_copies_of_the_sampler(override: str, copied: bool, tiny_model: Path) -> None:
    config = load_config(None, ["model.autocast=none", "rollout.dtype=float32", override])
    lasting = forecast(config, AutoConfig.from_pretrained(tiny_model), 100, Rates(1e15, 1e12)).lasting
    assert any("rollout copy" in name for name in lasting) == copied


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 36, "long_factor": [2.0] * 36}


@pytest.mark.parametrize(
    "shape",
    [
        GPT2Config(n_embd=1600, n_layer=48, n_head=25),  # other names
        OPTConfig(
            hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=512
        ),
        Phi3Config(
            rope_parameters=LONG | {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 4096},
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
        ),
        Gemma3Config(),  # text in a part of it
    ],
    ids=lambda shape: shape.model_type,
)
def test_scaled_down(shape: PretrainedConfig) -> None:
    """Two layers of width 64 on the same vocabulary, which has the most weights: once, or twice, and positions."""
    text = shape.get_text_config()
    with torch.device("meta"):
        small: PretrainedConfig = scaled_down(shape)
        model = AutoModelForCausalLM.from_config(small)
    assert (small.hidden_size, small.num_hidden_layers, small.vocab_size) == (64, 2, text.vocab_size)
    embedded = 64 * (2 * text.vocab_size + text.max_position_embeddings)
    assert sum(p.numel() for p in model.parameters()) < embedded + 200_000


@pytest.mark.parametrize(
    "shape",
    [
        Qwen3NextConfig(vocab_size=50),  # one layer in four has attention
        DeepseekV3Config(vocab_size=50),  # some of a head's numbers are rotated
        GPTJConfig(vocab_size=50),
    ],
    ids=lambda shape: shape.model_type,
)
def test_scaled_down_models_can_be_run(shape: PretrainedConfig) -> None:
    small = scaled_down(shape)
    assert len(set(getattr(small, "layer_types", None) or "ab")) == 2
    model = AutoModelForCausalLM.from_config(small)
    assert model(torch.arange(8)[None]).logits.shape == (1, 8, 50)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (BambaConfig(), "dry_run: cannot scale bamba down: .*The dimensions for the Mamba head state do not match"),
        (JambaConfig(), "dry_run: cannot take one step with a tiny jamba: ValueError: "),
        (MambaConfig(num_hidden_layers=2, pad_token_id=0, eos_token_id=1), "dry_run: cannot forecast mamba: "),
    ],
)
def test_what_cannot_be_told(
    shape: PretrainedConfig, message: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shape_folder(tmp_path / "model", shape, tiny_model)
    settings = [f"model.path={model}", "rollout.prompts=2", "model.attention=eager", "rollout.max_new_tokens=4"]
    with pytest.raises(ConfigError, match=message):
        dry_run(load_config(None, settings))
    assert ("One step with a tiny mamba on arithmetic works" in capsys.readouterr().out) == (
        shape.model_type == "mamba"
    )


def test_command(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shape_folder(tmp_path / "model", SMOLLM2, tiny_model)
    quickstart = next(path for path in CONFIGS if path.stem == "quickstart")
    arguments = ["train", str(quickstart), "dry_run=true", f"model.path={model}", f"runs_dir={tmp_path / 'runs'}"]
    assert main([*arguments, "objective.tokens_per_micro_batch=400"]) == 0
    assert "134.5 M" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    (model / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    assert main(arguments) == 2
    assert "model.path: expected a causal language model" in capsys.readouterr().err
