"""Prompts computed once: the same states, features and gradients as with copies, and models that cannot."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
    RwkvConfig,
    XLNetConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from g2rl import shared_prompts
from g2rl.checkpoint import find_checkpoint
from g2rl.config import ConfigError, ModelConfig, load_config
from g2rl.forward import ForwardPass, ResponseStates, attention_width
from g2rl.heads import lm_head
from g2rl.model import checkpoint_activations, load_model
from g2rl.rollout import make_batch
from g2rl.shared_prompts import pack_groups
from g2rl.trainer import Trainer
from g2rl.types import Batch, Episode, Problem
from g2rl_kernels import sequence_features
from tests.g2rl.architectures import SIZES

LLAMA = LlamaConfig(**SIZES)
# Rotary positions alone; norms of queries and keys; a soft cap inside attention and windows longer than any sequence
# here; learned positions.
MODELS = {
    "llama": (LLAMA, "sdpa"),
    "llama, eager": (LLAMA, "eager"),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), "sdpa"),
    "gemma2": (Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8), "eager"),
    "mistral": (MistralConfig(**SIZES, sliding_window=20), "sdpa"),
    "gpt2": (
        GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
        "sdpa",
    ),
}
if hasattr(transformers, "Gemma4TextConfig"):  # heads of two widths, by layer; not in older versions
    wide = {"head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
    ple = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8}
    MODELS["gemma4"] = (transformers.Gemma4TextConfig(**SIZES, **wide, **ple), "sdpa")
# Prompt length and response lengths of each group: prompts of different lengths, responses of none, one and several
# tokens, so that the padded batch has padding on the left of everything; no response that is fed; one prompt token.
BATCHES = {
    "ragged": ((9, (5, 0, 1)), (4, (3, 7, 2))),
    "one token each": ((6, (1, 1)), (3, (1, 1))),
    "shortest prompt": ((1, (6, 4, 2, 0)),),
}


def batch(groups: tuple[tuple[int, tuple[int, ...]], ...], vocabulary: int = 61, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (n,), generator=generator).tolist())

    problem = Problem("", "", "")
    episodes = []
    for prompt, responses in groups:
        ids = tokens(prompt)
        episodes += [Episode(problem, ids, tokens(n), "", True) for n in responses]
    return make_batch(episodes, len(groups[0][1]), 0, torch.device("cpu"))


def build(config: PretrainedConfig, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def all_ways(model: Any, autocast: str = "none") -> dict[str, ForwardPass]:
    return {
        "never": ForwardPass(model, ModelConfig(autocast=autocast, prefix_sharing="never", packing="never")),
        "packed": ForwardPass(model, ModelConfig(autocast=autocast, prefix_sharing="never", packing="always")),
        "always": ForwardPass(model, ModelConfig(autocast=autocast, prefix_sharing="always")),
    }


def results(model: Any, forward_pass: ForwardPass, groups: Batch) -> dict[str, torch.Tensor]:
    """States, log-probabilities, entropy, features, and the gradient of all weights from a random one of logps."""
    model.zero_grad(set_to_none=True)
    states = forward_pass(model, groups)
    out = sequence_features(states.hidden, lm_head(model, 0.9, states.hidden.dtype), states.targets, states.cu_seqlens)
    upstream = torch.randn(out.logps.shape, generator=torch.Generator().manual_seed(1))
    (out.logps * upstream).sum().backward()
    found = {"hidden": states.hidden, "logps": out.logps, "entropy": out.entropy, "features": out.features}
    found["gradient"] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return {name: value.detach() for name, value in found.items()}


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm().clamp(min=1e-6)
        assert error <= relative, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("groups", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("name", MODELS)
def test_all_ways_agree(name: str, groups: tuple) -> None:
    """fp32: sums in another order, 1e-5 of each result's norm."""
    model = build(*MODELS[name]).train()
    ways, given = all_ways(model), batch(groups)
    expected = ways["never"](model, given)
    for way in ("packed", "always"):
        found = ways[way](model, given)
        assert torch.equal(found.targets, expected.targets)
        assert torch.equal(found.cu_seqlens, expected.cu_seqlens)
        assert found.cu_seqlens.dtype == torch.int32
        assert_alike(results(model, ways[way], given), results(model, ways["never"], given))


def test_states_equal_those_of_each_response_alone() -> None:
    """Neither way leaks padding or neighbours: one sequence at a time, without any, is the same."""
    model = build(LLAMA, "sdpa").eval()
    given = batch(BATCHES["ragged"])
    for forward_pass in all_ways(model).values():
        states: ResponseStates = forward_pass(model, given)
        for b in range(6):
            ids = given.input_ids[b][given.attention_mask[b].bool()][None]
            length = int(given.response_mask[b].sum())
            alone = model.model(ids).last_hidden_state[0, ids.shape[1] - 1 - length : -1]
            rows = slice(states.cu_seqlens[b], states.cu_seqlens[b + 1])
            torch.testing.assert_close(states.hidden[rows], alone, atol=1e-5, rtol=1e-5)
            assert torch.equal(states.targets[rows], ids[0, ids.shape[1] - length :])


def test_layout_by_hand() -> None:
    """Prompts (3 and 2 tokens) first, then responses without their last tokens."""
    problem = Problem("", "", "")
    rows = (((4, 5, 6), (7, 8)), ((4, 5, 6), ()), ((9, 10), (11,)), ((9, 10), (12, 13, 14)))
    episodes = [Episode(problem, prompt, response, "", True) for prompt, response in rows]
    packed = pack_groups(make_batch(episodes, 2, 0, torch.device("cpu")))
    assert packed.input_ids.tolist() == [[4, 5, 6, 9, 10, 7, 12, 13]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1, 3, 2, 3]]
    assert packed.targets.tolist() == [7, 8, 11, 12, 13, 14]
    assert packed.predicts.tolist() == [2, 5, 4, 4, 6, 7]
    assert packed.cu_seqlens.tolist() == [0, 2, 2, 3, 6]
    assert packed.sizes == (2, 3, 4, 2)
    assert packed.pairs == 2 * 3**2 + 4 * 2 * (3 + 2)
    assert packed.order.tolist() == [0, 1, 2, 3, 4, 6, 12, 13]
    assert packed.response_mask[3, 0].int().tolist() == [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]


@pytest.mark.parametrize("way", ["never", "packed", "always"])
def test_no_pass_keeps_keys_and_values(tiny_model: Path, way: str) -> None:
    """And the model's configuration, which is saved with it, still says that others may."""
    model, _ = load_model(ModelConfig(path=str(tiny_model), device="cpu"))
    kept = []
    model.base_model.register_forward_hook(lambda _, __, output: kept.append(output.past_key_values))
    all_ways(model)[way](model, batch(BATCHES["ragged"]))
    assert len(kept) > 3
    assert set(kept) == {None}
    assert model.config.use_cache is True


def test_different_prompts_in_a_group_are_refused() -> None:
    given = batch(((5, (2, 2)),))
    given.input_ids[1, 0] += 1
    with pytest.raises(ValueError, match="batch: expected every 2 responses in a row to answer one prompt"):
        pack_groups(given)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradient_checkpointing(attention: str) -> None:
    """Layers are computed again in the backward pass, with shared prompts as well."""
    model, given = build(LLAMA, attention).train(), batch(BATCHES["ragged"])
    ways = all_ways(model)
    expected = results(model, ways["never"], given)
    checkpoint_activations(model)
    assert_alike(results(model, ways["always"], given), expected)


def test_autocast() -> None:
    """bf16 products: relative errors of a few units in the last place (2^-8), gradients after two layers of them."""
    model, given = build(LLAMA, "sdpa").train(), batch(BATCHES["ragged"])
    ways = all_ways(model, "bfloat16")
    found, expected = (results(model, ways[name], given) for name in ("always", "never"))
    assert ways["always"](model, given).hidden.dtype == torch.bfloat16
    assert_alike(*({name: value.float() for name, value in r.items()} for r in (found, expected)), relative=0.05)


def test_embedded_default() -> None:
    """SmolLM2, eager as in the quickstart: 30 layers, fp32, gradients to 1e-5."""
    model, _ = load_model(ModelConfig(path="smollm2", attention="eager"))
    ways = all_ways(model)
    given = batch(((12, (6, 3)), (9, (1, 4))), vocabulary=40000)
    assert_alike(results(model, ways["always"], given), results(model, ways["never"], given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_comparison_passes_where_nothing_is_wrong(name: str, dtype: torch.dtype) -> None:
    model = build(*MODELS[name], dtype)
    model.get_output_embeddings().eval()
    modes = [module.training for module in model.modules()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        forward_pass = ForwardPass(model, ModelConfig(autocast="none"))
    assert not forward_pass.obstacles
    assert [module.training for module in model.modules()] == modes


def leak(packed: Any) -> None:
    packed.response_mask[:] = True


def shift(packed: Any) -> None:
    packed.positions[:] = torch.arange(packed.positions.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spoil", [leak, shift])
def test_the_comparison_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, spoil: Any, dtype: torch.dtype) -> None:
    """Responses that see what follows, or positions that run on: found in both dtypes, and prompts are repeated."""

    def spoilt(*arguments: Any) -> Any:
        packed = shared_prompts.pack_groups(*arguments)
        spoil(packed)
        return packed

    monkeypatch.setattr("g2rl.forward.pack_groups", spoilt)
    model = build(LLAMA, "sdpa", dtype)
    with pytest.warns(RuntimeWarning, match="hidden states with shared prompts differ by .*, where rounding explains"):
        forward_pass = ForwardPass(model, ModelConfig(autocast="none"))
    assert model.config._attn_implementation == "sdpa"
    given = batch(BATCHES["ragged"])
    never = ForwardPass(model, ModelConfig(autocast="none", prefix_sharing="never", packing="never"))
    assert torch.equal(forward_pass(model, given).hidden, never(model, given).hidden)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4), "bloom has an attention of its own"),
        # Older versions of transformers do not say what layers it has.
        (
            MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2),
            "(mamba has layers of type linear_attention|its attention does not take shared prompts)",
        ),
    ],
    ids=["alibi", "recurrent"],
)
def test_models_that_cannot(config: PretrainedConfig, why: str) -> None:
    model, given = build(config, "eager").eval(), batch(BATCHES["ragged"])
    with pytest.warns(RuntimeWarning, match=why):
        forward_pass = ForwardPass(model, ModelConfig(autocast="none"))
    expected = ForwardPass(model, ModelConfig(autocast="none", prefix_sharing="never", packing="never"))(model, given)
    assert torch.equal(forward_pass(model, given).hidden, expected.hidden)
    with pytest.raises(ConfigError, match=f"model.prefix_sharing: expected auto or never, found always, but {why}"):
        ForwardPass(model, ModelConfig(autocast="none", prefix_sharing="always"))


@pytest.mark.parametrize(
    "config",
    [
        # A recurrence, attention that goes both ways, and positions that count padding.
        RecurrentGemmaConfig(**(SIZES | {"num_hidden_layers": 3}), lru_width=32),
        RwkvConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2),
        XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48),
        BartConfig(vocab_size=61, d_model=32, decoder_layers=2, decoder_attention_heads=4, is_decoder=True),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("way", ["auto", "never"])
def test_models_that_read_padding_or_what_follows(config: PretrainedConfig, way: str) -> None:
    model = build(config, "eager")
    with pytest.raises(
        ConfigError, match=f"model.path: expected a model whose tokens .* states of {config.model_type}"
    ):
        ForwardPass(model, ModelConfig(autocast="none", prefix_sharing=way, packing=way))


def test_attention_width_by_hand() -> None:
    """Two layers of 4 heads of 8, 2 of keys; one of 8 and one of 16; and none."""
    if "gemma4" in MODELS:
        assert attention_width(MODELS["gemma4"][0]) == 4 * (8 + 16)
    assert (attention_width(LLAMA), attention_width(LLAMA, "num_key_value_heads")) == (64, 32)
    assert attention_width(MODELS["gpt2"][0], "num_key_value_heads") == 64
    assert attention_width(MambaConfig(hidden_size=32, num_hidden_layers=2)) == 0


def test_sliding_window_shorter_than_a_sequence() -> None:
    """Batches with a longer sequence repeat prompts, and say so; shorter ones share."""
    model = build(MistralConfig(**SIZES, sliding_window=14), "sdpa").eval()
    forward_pass = ForwardPass(model, ModelConfig(autocast="none", prefix_sharing="always"))
    never = ForwardPass(model, ModelConfig(autocast="none", prefix_sharing="never", packing="never"))
    short, long = batch(((9, (5, 2)),)), batch(((9, (6, 2)),))
    seen: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape[0]), with_kwargs=True
    )
    forward_pass(model, short)
    with pytest.warns(RuntimeWarning, match="a sequence of 15 tokens is longer than the sliding window of 14"):
        found = forward_pass(model, long)
    assert seen == [1, 2]
    assert torch.equal(found.hidden, never(model, long).hidden)


@pytest.mark.parametrize("sharing", ["auto", "never"])
@pytest.mark.parametrize(
    ("groups", "one_row"),
    [
        (((9, (4, 4)),), True),  # 15 tokens shared, or 24 packed with 234 pairs, against 24 padded with 288
        (((1, (6, 6)),), True),  # 11, or 12 with 62 pairs, against 12 with 72
        # 121 tokens, or 160, against 160, but 2 * 40^2, or 4 * 40^2, + 4 * 39 * 79 pairs against 4 * 40^2
        (((40, (1, 1)), (1, (40, 40))), False),
    ],
)
def test_auto_counts(groups: tuple, one_row: bool, sharing: str) -> None:
    """A wide attention on few weights, so that pairs matter."""
    sizes = SIZES | {"hidden_size": 8, "intermediate_size": 4, "num_attention_heads": 8, "num_key_value_heads": 1}
    model = build(LlamaConfig(**sizes, head_dim=16), "sdpa").eval()
    forward_pass = ForwardPass(model, ModelConfig(autocast="none", prefix_sharing=sharing))
    rows: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: rows.append(given["input_ids"].shape[0]), with_kwargs=True
    )
    forward_pass(model, batch(groups))
    assert (rows == [1]) == one_row


def test_scores_that_would_fill_memory_are_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and two calls of transformers' attention give the same."""
    model, given = build(LLAMA, "sdpa").train(), batch(BATCHES["ragged"])
    shared = all_ways(model)["always"]
    expected = results(model, shared, given)
    monkeypatch.setattr(shared_prompts, "_by_products", None)
    packed = pack_groups(given)
    monkeypatch.setattr(shared_prompts, "MOST_SCORES", packed.pairs / (packed.input_ids.numel() * 8) - 1e-6)
    assert_alike(results(model, shared, given), expected)


def by_cu_seqlens(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int,
    max_length_k: int,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What FlashAttention computes of a row of sequences, on a CPU."""
    assert attention_mask is None
    assert query.shape[0] == 1
    assert cu_seq_lens_q.dtype == torch.int32
    assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    lengths = cu_seq_lens_q.diff().tolist()
    assert max(lengths) == max_length_q == max_length_k
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    out = [attend(*part, is_causal=True, scale=scaling, enable_gqa=True) for part in parts]
    return torch.cat(out, 2).transpose(1, 2), None


@pytest.mark.parametrize("groups", BATCHES.values(), ids=BATCHES.keys())
def test_flash_attention_gets_cu_seqlens(groups: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interface, with a stand-in for the kernel, which needs a GPU; its results are those of a padded batch."""
    model, given = build(LLAMA, "sdpa").train(), batch(groups)
    expected = results(model, all_ways(model)["never"], given)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", by_cu_seqlens)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.warns(RuntimeWarning, match="attention flash_attention_2 takes no mask for it"):
        forward_pass = ForwardPass(model, ModelConfig(autocast="none"))
    assert forward_pass.facts["padding"] == "left out"
    assert forward_pass.facts["prompts"].startswith("once for each response (attention flash_attention_2")
    assert_alike(results(model, forward_pass, given), expected)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["model.autocast=none"], "model.attention: expected sdpa or eager for products in float32, found flash"),
        (["model.device=cpu"], "model.attention: expected sdpa or eager on a CPU, found flash_attention_2"),
    ],
)
def test_flash_attention_where_it_cannot(overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_model(load_config(None, ["model.attention=flash_attention_2", *overrides]).model)


def test_training_is_the_same(tiny_model: Path, tmp_path: Path) -> None:
    """Two steps with a KL term and two updates each: metrics agree to fp32 through two steps of Adam."""
    common = (
        f"model.path={tiny_model}", f"runs_dir={tmp_path}", "steps=2", "model.autocast=none", "rollout.dtype=float32",
        "task.options={digits: [1, 1]}", "task.held_out=0", "rollout.prompts=3", "rollout.group_size=4",
        "rollout.max_new_tokens=6", "objective.kl_coef=0.1", "objective.updates=2", "eval.every=0",
        "rewards=[{name: boxed}, {name: finished}]",
    )  # fmt: skip
    weights = []
    said = {
        "always": ("once for each group", "left out, where that is cheaper"),
        "never": ("once for each response (model.prefix_sharing is never)", "computed (model.packing is never)"),
    }
    for name, (prompts, padding) in said.items():
        ways = [f"model.prefix_sharing={name}", f"model.packing={'auto' if name == 'always' else name}"]
        trainer = Trainer(load_config(None, [*common, f"name={name}", *ways]))
        trainer.run()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        environment = json.loads((tmp_path / name / "environment.json").read_text())
        assert (environment["prompts"], environment["padding"]) == (prompts, padding)
        # What is saved is a plain model.
        saved = (find_checkpoint(tmp_path / name) / "config.json").read_text()
        assert "g2rl" not in saved
        assert json.loads(saved)["use_cache"] is True
    assert (weights[0] - weights[1]).norm() <= 1e-4 * weights[1].norm()
