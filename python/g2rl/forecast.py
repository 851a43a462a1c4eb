"""What a configuration will take at its model's full size: parameters, memory and time, without any weights.

Sizes are those of tensors, counted on PyTorch's meta device, where operators know shapes and compute nothing; what the
allocator loses to fragments comes on top. Every response is taken to be as long as it may be. Times are the least that
the work can take: its multiplications at the rate of a large matrix product, and, where responses are generated token
by token, its weights and cache at the memory's rate, both measured here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from g2rl.adapters import add_adapter
from g2rl.config import Config
from g2rl.devices import synchronize
from g2rl.forward import attention_width, backbone_weights
from g2rl.model import checkpoint_activations

_FUSED = "g2rl_forecast"


@dataclass(frozen=True)
class Rates:
    """What a device reaches.

    Attributes:
        flops: of a large matrix product, a second, a multiplication with its addition counted as two.
        bandwidth: bytes read and written a second by a copy.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Forecast:
    """Of one training step.

    Attributes:
        parameters, trained: numbers of weights.
        lasting: bytes by what holds them from step to step.
        update, rollout: bytes by what holds them besides, while weights are updated, and while responses are generated.
        seconds: by stage.
    """

    parameters: int
    trained: int
    lasting: dict[str, float]
    update: dict[str, float]
    rollout: dict[str, float]
    seconds: dict[str, float]

    @property
    def peak(self) -> float:
        return sum(self.lasting.values()) + max(sum(self.update.values()), sum(self.rollout.values()))


def measure_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """The best of five products of 4096 rows, 1024 on a CPU, and of five copies of 256 MB."""
    n = 1024 if device.type == "cpu" else 4096
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(1 << 26, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    product = _seconds(lambda: torch.mm(a, b), device)
    copied = _seconds(lambda: target.copy_(source), device)
    return Rates(2 * n**3 / product, 2 * source.nbytes / copied)


def forecast(config: Config, shape: Any, prompt_tokens: int, rates: Rates) -> Forecast:
    """Forecast a step.

    Args:
        config: of the run.
        shape: the model's configuration in transformers.
        prompt_tokens: of the longest prompt.
    """
    length = prompt_tokens + config.rollout.max_new_tokens
    model = _meta_model(config, shape)
    layers = shape.get_text_config().num_hidden_layers
    rows = micro_batch_rows(config, length)
    saved = _saved_bytes(model, rows, length)
    if config.model.gradient_checkpointing:
        # The layer inputs of all, and one layer at a time computed again.
        checkpoint_activations(model)
        saved = _saved_bytes(model, rows, length) + saved / layers
    sizes = _Sizes.of(config, model)
    update = {"gradients": sizes.gradient_bytes, f"activations, {rows} x {length} tokens": saved}
    if config.model.in_bfloat16 and config.model.dtype == "float32":
        update["weights cast to bfloat16"] = 2 * sizes.plain
    return Forecast(
        parameters=sizes.plain + sizes.adapter,
        trained=sizes.trained,
        lasting=_lasting(config, sizes),
        update=update,
        rollout={f"cache, {_batch(config)} x {length} tokens": _cache_bytes(config, shape, length)},
        seconds=_seconds_by_stage(config, model, shape, prompt_tokens, rates),
    )


# ---- memory ---------------------------------------------------------------------------------------------------------


def _meta_model(config: Config, shape: Any) -> Any:
    computes = getattr(torch, config.model.product_dtype)
    attention = "eager" if config.model.attention == "eager" else _FUSED
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=computes, attn_implementation=attention)
    model.tie_weights()  # which early versions of transformers 5 leave undone on this device
    model.config.use_cache = False
    if config.model.lora.rank:
        add_adapter(model, config.model.lora)
    return model.train()


@contextmanager
def _nothing_cast_on_meta() -> Iterator[None]:
    """Early versions of transformers 5 ask whether autocast is on for this device, and torch knows none for it."""
    asked = torch.is_autocast_enabled

    def answered(*device_type: str) -> bool:
        return "meta" not in device_type and asked(*device_type)

    with patch.object(torch, "is_autocast_enabled", answered):
        yield


def _saved_bytes(model: Any, rows: int, length: int) -> float:
    """Of the tensors that a forward pass keeps for its backward pass, weights apart."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.device("meta"), _nothing_cast_on_meta(), keeping:
        ids = torch.zeros(rows, length, dtype=torch.int64)
        # A mask of four dimensions keeps transformers from looking into one, which has no values here.
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
        hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=ids).last_hidden_state
    return sum(storage.nbytes() for storage in kept.values()) + mask.nbytes + hidden.nbytes


class _FusedAttention(torch.autograd.Function):
    """Keeps what fused attention kernels keep: their inputs and their output, no scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


def _fused_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    copies = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(copies, 1) for tensor in (key, value))
    return _FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_FUSED, _fused_attention)


@dataclass(frozen=True)
class _Sizes:
    """Numbers of weights, of the plain model and of an adapter, whose type is fp32, and the plain one's bytes each."""

    plain: int
    adapter: int
    itemsize: int

    @classmethod
    def of(cls, config: Config, model: Any) -> _Sizes:
        everything = sum(p.numel() for p in model.parameters())
        adapter = sum(p.numel() for p in model.parameters() if p.requires_grad) if config.model.lora.rank else 0
        return cls(everything - adapter, adapter, getattr(torch, config.model.dtype).itemsize)

    @property
    def trained(self) -> int:
        return self.adapter or self.plain

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.adapter or self.itemsize * self.plain


def _lasting(config: Config, sizes: _Sizes) -> dict[str, float]:
    weights = sizes.plain * sizes.itemsize
    lasting: dict[str, float] = {f"weights ({config.model.dtype})": weights}
    if sizes.adapter:
        lasting["adapter (float32)"] = 4 * sizes.adapter
    elif sizes.itemsize < 4:
        lasting["master weights (float32)"] = 4 * sizes.plain
    lasting["AdamW's states"] = 2 * sizes.trained * (1 if config.optim.name == "adamw_8bit" else 4)
    if _has_copy(config):
        copied = sizes.plain * getattr(torch, config.rollout.dtype).itemsize
        lasting[f"rollout copy ({config.rollout.dtype})"] = copied
    if config.objective.kl_coef > 0 and not sizes.adapter:
        lasting["reference model"] = weights
    return lasting


def _has_copy(config: Config) -> bool:
    """Whether the sampler's weights are its own."""
    other = config.rollout.dtype != config.model.dtype or config.model.lora.rank > 0
    return other or config.rollout.ahead > 0 or config.parallel.strategy == "fsdp2"


def _batch(config: Config) -> int:
    return min(config.rollout.batch_size, config.rollout.prompts * config.rollout.group_size)


def micro_batch_rows(config: Config, length: int) -> int:
    """Responses in a micro-batch, of so many tokens each."""
    update = config.rollout.prompts // config.objective.mini_batches * config.rollout.group_size
    if config.objective.tokens_per_micro_batch:
        return min(update, max(1, config.objective.tokens_per_micro_batch // length))
    return min(update, config.objective.micro_batch_groups * config.rollout.group_size)


def _cache_bytes(config: Config, shape: Any, length: float) -> float:
    """Keys and values of a batch of responses, so many tokens each with their prompts."""
    width = 2 * attention_width(shape.get_text_config(), "num_key_value_heads")
    return _batch(config) * length * width * getattr(torch, config.rollout.dtype).itemsize


def has_first_pass(config: Config, length: int) -> bool:
    """Whether responses of so many tokens pass the model once before the first update: see `g2rl.update`."""
    objective = config.objective
    cut = objective.tokens_per_micro_batch and micro_batch_rows(config, length) < config.rollout.group_size
    return objective.updates * objective.mini_batches > 1 or bool(cut and config.log.geometry)


# ---- time -----------------------------------------------------------------------------------------------------------


def _seconds_by_stage(config: Config, model: Any, shape: Any, prompt_tokens: int, rates: Rates) -> dict[str, float]:
    objective, rollout, text = config.objective, config.rollout, shape.get_text_config()
    responses, length = rollout.prompts * rollout.group_size, prompt_tokens + rollout.max_new_tokens
    head = text.vocab_size * text.hidden_size
    body = backbone_weights(model)
    # A token attends to half of its sequence on average: two products of a multiplication and an addition.
    attention = 2 * attention_width(text) * length
    through_body = responses * length * (2 * body + attention)
    forward = through_body + responses * rollout.max_new_tokens * 2 * head
    # With an adapter no gradient of the other weights is computed.
    backward = forward * (1 if config.model.lora.rank else 2)
    backward += through_body if config.model.gradient_checkpointing else 0
    passes = {"forward and backward": objective.updates * (forward + backward)}
    if has_first_pass(config, length):
        passes["first pass"] = forward
    if objective.kl_coef > 0:
        passes["reference"] = forward
    weights = (body + head) * getattr(torch, rollout.dtype).itemsize
    cache = _cache_bytes(config, shape, prompt_tokens + rollout.max_new_tokens / 2)
    rounds = -(-responses // _batch(config))
    reading = rounds * rollout.max_new_tokens * (weights + cache) / rates.bandwidth
    seconds = {"rollout": max(reading, forward / rates.flops)}
    return seconds | {name: flops / rates.flops for name, flops in passes.items()}


def _seconds(run: Any, device: torch.device) -> float:
    """The best of five."""
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
