"""The plug-in for verl: features of its engine against autograd, and its trainer against a float64 reference."""

from __future__ import annotations

import os

# verl reads this when it is imported, and so do the processes that Ray starts.
os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl_cpu"

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils import ulysses
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl

from g2rl.integrations.verl.engine import FEATURES, REQUEST, G2RLEngine

SIZES = {"vocab_size": 77, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.2),
    "tied": LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True),
    "bias": PhiConfig(**SIZES, initializer_range=0.2),
    "softcap": Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=2, final_logit_softcapping=2.0),
    "scale": CohereConfig(**SIZES, logit_scale=0.3, initializer_range=0.2),
    "divisor": GraniteConfig(**SIZES, logits_scaling=4.0, initializer_range=0.2),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases are zero at first
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
    return folder


def batch(seed: int = 0) -> TensorDict:
    """Five sequences: prompts of 2 to 5 tokens, ragged responses, tokens of tools inside, a row of padding."""
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = (3, 5, 2, 4, 3), (6, 1, 9, 4, 1)
    ids = [torch.randint(77, (p + r,), generator=generator) for p, r in zip(prompts, responses, strict=True)]
    masks = [torch.ones(r, dtype=torch.int64) for r in responses]
    masks[2][3:5] = 0
    masks[4][:] = 0
    masks = [torch.nested.as_nested_tensor(masks, layout=torch.jagged) for _ in range(2)]
    return TensorDict(
        {
            "input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged),
            "position_ids": torch.nested.as_nested_tensor([torch.arange(len(x)) for x in ids], layout=torch.jagged),
            "response_mask": masks[0],
            "loss_mask": masks[1],
        },
        batch_size=5,
    )


def by_autograd(folder: Path, data: TensorDict, temperature: float) -> Tensor:
    """T times the gradient of each response's mean log-probability, in float64 through the model's own logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    return through_logits(lambda ids: model(ids).logits, model.get_output_embeddings(), data, temperature)


def through_logits(
    logits_of: Callable[[Tensor], Tensor], head: torch.nn.Module, data: TensorDict, temperature: float
) -> Tensor:
    """That of a model's logits [1, L, V] of ids [1, L], which come from its head."""
    heads: list[Tensor] = []

    def keep(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        heads.append(args[0].detach().requires_grad_())
        return (heads[-1],)

    head.register_forward_pre_hook(keep)
    features = []
    for ids, mask in zip(data["input_ids"].unbind(), data["response_mask"].unbind(), strict=True):
        logits = logits_of(ids[None])[0, :-1]
        logps = (logits / temperature).log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        own = mask.bool()
        (gradient,) = torch.autograd.grad(logps[-len(mask) :][own].sum(), heads.pop())
        features.append(temperature * gradient.sum((0, 1)) / max(int(own.sum()), 1))
    return torch.stack(features)


@dataclass(frozen=True)
class Case:
    """One way to run the engine.

    Attributes:
        model: of `MODELS`; settings: of `HFModelConfig`; engine: of `FSDPEngineConfig`.
        max_tokens: of a micro-batch of dynamic size; None takes two sequences at a time.
    """

    model: str = "llama"
    remove_padding: bool = True
    fused: bool = False
    temperature: float = 1.0
    max_tokens: int | None = 16
    strategy: str = "fsdp2"
    attention: str = "eager"
    dtype: str = "fp32"
    settings: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)


class FSDPOnCPU(FSDP):
    """FSDP, but for what it refuses on a CPU."""

    def __init__(self, *args: Any, sync_module_states: bool, **kwargs: Any) -> None:
        kwargs["device_id"] = torch.device("cpu")
        super().__init__(*args, **kwargs)


def make_engine(folder: Path, case: Case) -> G2RLEngine:
    model_config = HFModelConfig(
        path=str(folder / case.model),
        load_tokenizer=False,
        use_remove_padding=case.remove_padding,
        use_fused_kernels=case.fused,
        fused_kernel_options={"impl_backend": "torch"},
        override_config={"attn_implementation": case.attention},
        **case.settings,
    )
    model_config.model_type = "language_model"
    engine = EngineRegistry.new(
        "language_model",
        case.strategy,
        model_config=model_config,
        engine_config=FSDPEngineConfig(
            strategy=case.strategy,
            forward_only=False,
            use_torch_compile=False,
            mixed_precision={"param_dtype": case.dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            **case.engine,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def run(engine: G2RLEngine, case: Case, data: TensorDict, **asked: Any) -> dict[str, Tensor]:
    data = data.clone()
    if "temperature" not in data.keys():
        tu.assign_non_tensor(data, temperature=case.temperature)
    tu.assign_non_tensor(
        data,
        use_remove_padding=case.remove_padding,
        use_fused_kernels=case.fused,
        use_dynamic_bsz=case.max_tokens is not None,
        max_token_len_per_gpu=case.max_tokens,
        micro_batch_size_per_gpu=1,
        calculate_entropy=True,
        **asked,
    )
    with engine.eval_mode():
        return engine.infer_batch(data)["model_output"]


def assert_equal(features: Tensor, expected: Tensor, bound: float) -> None:
    """Within `bound`, relative and each response by itself; the last row is padding, whose feature is 0."""
    features = torch.stack(features.unbind())
    assert features.dtype == torch.float32
    assert float(expected[:4].norm(dim=1).min()) > 0.01
    error = (features - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-9)
    assert float(error.max()) < bound, error


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


CASES = {
    "plain": Case(),
    "fused": Case("tied", fused=True, temperature=0.7),
    "padded": Case(remove_padding=False, temperature=0.7),
    "padded-fused": Case("tied", remove_padding=False, fused=True),
    "sequence-by-sequence": Case(max_tokens=None),
    "padded-to-length": Case(engine={"pad_to_length": True, "pad_to_length_bucket": 32}),
    "tied": Case("tied"),
    "bias": Case("bias", temperature=1.3, remove_padding=False),
    "softcap": Case("softcap", temperature=0.7, remove_padding=False),
    "scale": Case("scale", remove_padding=False),
    "divisor": Case("divisor", remove_padding=False),
    "fsdp": Case(strategy="fsdp"),
    "fsdp-fused": Case(strategy="fsdp", fused=True),
    "lora": Case(settings={"lora_rank": 2, "target_modules": "all-linear"}),
}


@pytest.mark.parametrize("name", CASES)
def test_features_are_those_of_autograd(
    name: str, models: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, data = CASES[name], batch()
    expected = by_autograd(models / case.model, data, case.temperature)
    # verl's fused kernels replace the method of the class.
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(MODELS[case.model])]
    monkeypatch.setattr(model_class, "forward", model_class.forward)
    monkeypatch.setattr(transformer_impl, "FSDP", FSDPOnCPU)
    engine = make_engine(models, case)
    plain = run(engine, case, data)
    assert FEATURES not in plain
    outputs = run(engine, case, data, **{REQUEST: True})
    assert_equal(outputs[FEATURES], expected, 1e-5)
    for field_name in ("log_probs", "entropy"):
        assert torch.equal(outputs[field_name].values(), plain[field_name].values())


def test_bf16_features_point_the_same_way(models: Path, one_rank: None) -> None:
    case, data = Case(dtype="bf16"), batch()
    features = torch.stack(run(make_engine(models, case), case, data, **{REQUEST: True})[FEATURES].unbind())
    cosines = torch.cosine_similarity(features, by_autograd(models / case.model, data, 1.0), dim=1)
    assert float(cosines[:4].min()) > 0.999 and float(features[4].norm()) == 0


def test_refusals_of_the_engine(models: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_impl, "FSDP", FSDPOnCPU)
    case = Case(strategy="fsdp", settings={"lora_rank": 2, "target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(ValueError, match="target_modules: expected no adapter on the head"):
        run(make_engine(models, case), case, batch(), **{REQUEST: True})
    data = batch()
    data["temperature"] = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0])
    with pytest.raises(NotImplementedError, match=r"temperature: expected one for all responses, found \[0.5, 1.0\]"):
        run(make_engine(models, Case()), Case(max_tokens=64), data, **{REQUEST: True})
    # verl's fused kernels know no logit scale.
    case = Case("divisor", fused=True, strategy="fsdp", engine={"use_orig_params": True})
    monkeypatch.setattr(GraniteForCausalLM, "forward", GraniteForCausalLM.forward)
    with pytest.raises(RuntimeError, match=r"GraniteForCausalLM by .* logit scale .*; set .*use_fused_kernels=False"):
        run(make_engine(models, case), case, batch(), **{REQUEST: True})


def ulysses_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **kwargs: Any) -> Any:
    """Attention of packed sequences that are split over ranks; verl has it for flash attention alone."""
    group = ulysses.get_ulysses_sequence_parallel_group()
    q, k, v = (ulysses.gather_seq_scatter_heads(x, seq_dim=2, head_dim=1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    positions = ulysses.all_gather_tensor(kwargs["position_ids"].T.contiguous(), group)[:, 0]
    sequence = (positions == 0).cumsum(0)
    sees = (sequence[:, None] == sequence) & (positions[:, None] >= positions)
    weights = (q @ k.mT * scaling).masked_fill(~sees, -torch.inf).softmax(-1)
    return ulysses.gather_heads_scatter_seq((weights @ v).transpose(1, 2), head_dim=2, seq_dim=1), None


ULYSSES = {"attention": "ulysses", "engine": {"ulysses_sequence_parallel_size": 2}}
TWO_RANKS = {
    "data-parallel": Case(temperature=0.7),
    "data-parallel-fsdp": Case("tied", strategy="fsdp"),
    "sequence-parallel": Case(temperature=0.7, max_tokens=8, **ULYSSES),
    "sequence-parallel-one-by-one": Case(max_tokens=None, **ULYSSES),
    # Last: it replaces a method of the model's class.
    "sequence-parallel-fused": Case("tied", fused=True, max_tokens=8, **ULYSSES),
}


def one_of_two(rank: int, models: Path, folder: Path) -> None:
    """All cases, one after the other, on this rank; what they give goes to files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    transformer_impl.FSDP = FSDPOnCPU
    ALL_ATTENTION_FUNCTIONS["ulysses"] = ulysses_attention
    for name, case in TWO_RANKS.items():
        engine = make_engine(models, case)
        data = batch(engine.get_data_parallel_rank())
        torch.save(run(engine, case, data, **{REQUEST: True})[FEATURES].unbind(), folder / f"{name}-{rank}")
    dist.destroy_process_group()


def test_features_over_two_ranks(models: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two, (models, tmp_path), nprocs=2)
    for name, case in TWO_RANKS.items():
        for rank in range(2):
            seed = 0 if name.startswith("sequence") else rank
            expected = by_autograd(models / case.model, batch(seed), case.temperature)
            assert_equal(torch.stack(torch.load(tmp_path / f"{name}-{rank}")), expected, 1e-5)
