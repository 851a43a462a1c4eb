"""Features of a forward pass of Megatron-core's models, whose heads and sequences may be split over ranks.

    done = FeaturePass(response, targets, B, temperature, mpu.get_context_parallel_group())
    with run_alongside(model, done):
        logits = model(ids, position_ids, attention_mask)  # of a micro-batch, as for old log-probabilities
    done.outputs.features  # [B, d], the same on the tensor- and context-parallel ranks of the last pipeline stage

Ranks of tensor parallelism have a part of the output layer's vocabulary each, and with `sequence_parallel` a part of
the positions; those of context parallelism have parts of each sequence. Nothing of Megatron-core, 0.13 or later, is
imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.nn.functional as F

from g2rl.heads import product_dtype
from g2rl.integrations.head_pass import FeaturePass
from g2rl_kernels import LMHead

# Output layers whose logits were found to be their products.
_checked: WeakSet[torch.nn.Module] = WeakSet()


@contextmanager
def run_alongside(model: Any, done: FeaturePass) -> Iterator[None]:
    """Set the outputs of `done` by the forward pass that runs inside the block.

    Args:
        model: with an `output_layer` of Megatron-core's `ColumnParallelLinear`, in whatever wraps it. On pipeline
            stages without one nothing is set.
        done: `response` and `targets` have the shape of the model's input on this rank, [B, L] or packed [1, N].

    Raises:
        NotImplementedError: an adapter on the output layer, or logits that are not its product.
        RuntimeError: the forward pass did not call it.
    """
    layer = _output_layer(model)
    if layer is None:
        yield
        return
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        hidden, weight = (*inputs, keywords.get("weight"))[:2]
        # That of the next token comes last: before it, multi-token prediction calls the layer for those after it.
        calls[:] = [(hidden.detach(), (layer.weight if weight is None else weight).detach())]
        if layer not in _checked:
            _check_product(layer, *calls[0], output[0])
            _checked.add(layer)

    handle = layer.register_forward_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise RuntimeError(
            "g2rl: expected a forward pass through model.output_layer, found none: fused kernels go past it"
        )
    ((hidden, weight),) = calls
    if layer.sequence_parallel:
        hidden = _gathered(hidden, layer.tp_group)
    done.run_head(_head(layer, weight, done.temperature, product_dtype(hidden)), hidden.transpose(0, 1))


def _output_layer(model: Any) -> Any:
    """The output layer in whatever wraps a model; None on stages of a pipeline that have none.

    Raises:
        NotImplementedError: an adapter on it.
    """
    layer = next((part.output_layer for part in model.modules() if hasattr(part, "output_layer")), None)
    if layer is not None and not hasattr(layer, "tp_group"):
        raise NotImplementedError(
            "model.output_layer: expected ColumnParallelLinear of Megatron-core 0.13 or later, without an adapter, "
            f"found {type(layer).__name__}: features are made of its weight"
        )
    return layer


def _head(layer: Any, weight: torch.Tensor, temperature: float, dtype: torch.dtype) -> LMHead:
    """Its rows of padding are words like others, as they are in Megatron's log-probabilities."""
    group = layer.tp_group if dist.get_world_size(layer.tp_group) > 1 else None
    bias = _bias(layer)
    return LMHead(weight.to(dtype), None if bias is None else bias.to(dtype), temperature, process_group=group)


def _bias(layer: Any) -> torch.Tensor | None:
    return None if layer.bias is None or layer.skip_bias_add else layer.bias.detach()


def _gathered(hidden: torch.Tensor, group: Any) -> torch.Tensor:
    """All positions of hidden states [s / ranks, b, d]."""
    ranks = dist.get_world_size(group)
    whole = hidden.new_empty(ranks * hidden.shape[0], *hidden.shape[1:])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
    return whole


def _check_product(layer: Any, hidden: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor) -> None:
    """Compare logits of one position: some architectures scale or cap them, by a layer of their own."""
    rank = dist.get_rank(layer.tp_group)
    z = F.linear(hidden[0, 0], weight, _bias(layer)).float()
    found = logits[rank * len(hidden) if layer.sequence_parallel else 0, 0].float()
    found = found.narrow(0, rank * len(z) if len(found) > len(z) else 0, len(z))
    unit = max(torch.finfo(logits.dtype).eps, 2**-10)  # products in fp32 may be made of tf32
    if not bool(((found - z).abs() <= 4 * unit * (1 + z.abs().max())).all()):
        raise NotImplementedError(
            f"model.output_layer: expected logits that are the product with its weight, found {type(layer).__name__} "
            "with others: their scale or soft cap is not known here"
        )
