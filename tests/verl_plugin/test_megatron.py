"""verl's engine for Megatron with G2RL: real Megatron-core on ranks that are processes, features against autograd.

verl's engine without its bridge, which needs CUDA: the model is built here, its attention in PyTorch.
"""

from __future__ import annotations

import os

os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl_cpu"

import re
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from test_verl import SIZES, assert_equal, batch, through_logits
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import McoreEngineConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.megatron import transformer_impl

from g2rl.integrations.verl.engine import FEATURES, REQUEST
from g2rl.integrations.verl.megatron import G2RLMegatronEngine

V, D = SIZES["vocab_size"] + 3, SIZES["hidden_size"]  # three rows of padding, for ranks to have equal parts


@dataclass(frozen=True)
class Case:
    """How many ranks of each kind of parallelism there are, and how verl lays a batch out."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    packed: bool = True
    tied: bool = False
    temperature: float = 1.0
    sequence_parallel: bool = True
    bucket: int | None = None


CASES = {
    1: {
        "whole": Case(temperature=0.7),
        "padded": Case(packed=False),
    },
    2: {
        "tensor": Case(tensor=2, temperature=0.7),
        "tensor-padded": Case(tensor=2, packed=False, sequence_parallel=False),
        "context": Case(context=2, temperature=1.3),
        "pipeline": Case(pipeline=2),
    },
    4: {
        "tensor-context": Case(tensor=2, context=2, tied=True),
        "tensor-context-to-length": Case(tensor=2, context=2, bucket=64),
        "tensor-pipeline": Case(tensor=2, pipeline=2),
    },
}


class Attention(torch.nn.Module):
    """Causal, of sequences that are padded [s, b, heads, size] or packed [s, heads, size], and dealt out over ranks."""

    def __init__(self, config: TransformerConfig, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, packed_seq_params: Any = None, **__: Any) -> Tensor:
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return found.permute(2, 0, 1, 3).flatten(2)
        place = places(packed_seq_params.cu_seqlens_q_padded.tolist())
        own = place[mpu.get_context_parallel_rank()]
        everywhere = [
            torch.cat(torch.distributed.nn.functional.all_gather(x, mpu.get_context_parallel_group())) for x in (k, v)
        ]
        q, k, v = (x.transpose(0, 1) for x in (q, *everywhere))
        all_places = torch.cat(place)
        sees = (own[:, None, 0] == all_places[:, 0]) & (own[:, None, 1] >= all_places[:, 1])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(0, 1).flatten(1)


def places(starts: list[int]) -> list[Tensor]:
    """Of each rank's positions sequence and place in it: a chunk from either end of every sequence."""
    ranks = mpu.get_context_parallel_world_size()
    found: list[list[Tensor]] = [[] for _ in range(ranks)]
    for i, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        sequence = torch.stack([torch.full((stop - start,), i), torch.arange(stop - start)], dim=1)
        chunks = sequence.chunk(2 * ranks) if ranks > 1 else (sequence, sequence[:0])
        for rank in range(ranks):
            found[rank] += [chunks[rank], chunks[-1 - rank]]
    return [torch.cat(rank) for rank in found]


def build(case: Case, dtype: torch.dtype) -> GPTModel:
    """A rank's part of a model whose layers are all alike, and whose weights do not depend on how it is split."""
    config = TransformerConfig(
        num_layers=SIZES["num_hidden_layers"],
        hidden_size=D,
        num_attention_heads=SIZES["num_attention_heads"],
        tensor_model_parallel_size=case.tensor,
        context_parallel_size=case.context,
        pipeline_model_parallel_size=case.pipeline,
        sequence_parallel=case.tensor > 1 and case.sequence_parallel,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
    )
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules.core_attention = Attention
    model = GPTModel(
        config,
        spec,
        V,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=case.tied,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
    ).to(dtype)
    for name, parameter in model.named_parameters():
        parameter.data = part(re.sub(r"\d+", "", name), parameter)
    return model.eval()


def part(name: str, parameter: Tensor) -> Tensor:
    shape, split = list(parameter.shape), getattr(parameter, "tensor_model_parallel", False)
    if split:
        shape[parameter.partition_dim] *= mpu.get_tensor_model_parallel_world_size()
    whole = 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if "layernorm.weight" in name:
        whole += 1
    if split:
        ranks, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
        whole = whole.chunk(ranks, parameter.partition_dim)[rank]
    return whole.to(parameter.dtype)


def make_engine(case: Case) -> G2RLMegatronEngine:
    hf_config = LlamaConfig(**SIZES)
    hf_config.architectures = ["LlamaForCausalLM"]
    model_config = SimpleNamespace(
        hf_config=hf_config,
        model_type="language_model",
        mtp=SimpleNamespace(enable=False, enable_train=False),
        tokenizer=SimpleNamespace(pad_token_id=0),
    )
    engine_config = McoreEngineConfig(
        tensor_model_parallel_size=case.tensor,
        context_parallel_size=case.context,
        pipeline_model_parallel_size=case.pipeline,
        sequence_parallel=case.sequence_parallel,
        use_remove_padding=case.packed,
        pad_to_length=case.bucket is not None,
        pad_to_length_bucket=case.bucket or 512,
        forward_only=True,
    )
    engine = G2RLMegatronEngine(model_config, engine_config, None, None)
    model = build(case, torch.float32)
    engine.module, engine.tf_config = [model], model.config
    return engine


def run(engine: G2RLMegatronEngine, case: Case, **asked: Any) -> dict[str, Tensor] | None:
    """What the engine gives on its last pipeline stage."""
    data = batch()
    tu.assign_non_tensor(
        data,
        temperature=case.temperature,
        use_remove_padding=case.packed,
        use_dynamic_bsz=True,
        max_token_len_per_gpu=16,
        calculate_entropy=True,
        **asked,
    )
    with torch.no_grad():
        return engine.forward_backward_batch(data, None, forward_only=True).get("model_output")


def by_autograd(case: Case) -> Tensor:
    """T times the gradient of each response's mean log-probability, in float64 through the whole model's logits."""
    model = build(Case(tied=case.tied), torch.float64)

    def logits_of(ids: Tensor) -> Tensor:
        return model(ids, torch.arange(ids.shape[1])[None], None)

    return through_logits(logits_of, model.output_layer, batch(), case.temperature)


class OnCPU(TorchFunctionMode):
    """Tensors that are asked for on CUDA are made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def prepare() -> None:
    """What Megatron-core asks of CUDA, and a norm for parts of sequences, which its own in PyTorch refuses."""
    OnCPU().__enter__()
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda: None
    CudaRNGStatesTracker.fork = lambda *_: nullcontext()
    transformer_impl.set_random_seed = lambda seed: None
    make = WrappedTorchNorm.__new__

    def norm(cls: type, config: TransformerConfig, *args: Any, **kwargs: Any) -> torch.nn.Module:
        return make(cls, SimpleNamespace(**vars(config) | {"sequence_parallel": False}), *args, **kwargs)

    WrappedTorchNorm.__new__ = norm


def one_of(rank: int, ranks: int, folder: Path) -> None:
    """All cases of so many ranks, one after the other; what a last pipeline stage gives goes to files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    prepare()
    for name, case in CASES[ranks].items():
        engine = make_engine(case)
        plain, found = run(engine, case), run(engine, case, **{REQUEST: True})
        if found is not None:
            assert FEATURES not in plain
            assert all(torch.equal(found[key].values(), plain[key].values()) for key in ("log_probs", "entropy"))
            torch.save(found[FEATURES].unbind(), folder / f"{name}-{rank}")
        mpu.destroy_model_parallel()
    if ranks == 1:
        mpu.initialize_model_parallel()
        everything = {name: case for cases in CASES.values() for name, case in cases.items()}
        torch.save({name: by_autograd(case) for name, case in everything.items()}, folder / "expected")
    dist.destroy_process_group()


def test_verl_takes_this_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    assert EngineRegistry.get_engine_cls("language_model", "megatron") is G2RLMegatronEngine


@pytest.mark.slow
def test_features_are_those_of_autograd(tmp_path: Path) -> None:
    for ranks in CASES:
        torch.multiprocessing.spawn(one_of, (ranks, tmp_path), nprocs=ranks)
    expected = torch.load(tmp_path / "expected")
    for ranks, cases in CASES.items():
        for name, case in cases.items():
            found = [torch.load(path) for rank in range(ranks) if (path := tmp_path / f"{name}-{rank}").exists()]
            assert len(found) == ranks // case.pipeline
            for features in found:
                assert_equal(torch.stack(features), expected[name], 1e-5)
