"""Where models are: repeated on every rank, or split over ranks by PyTorch's FSDP2 and put together where needed.

Each layer's weights are gathered for its forward pass, and again for its backward pass. Embeddings and head, which may
share a weight, are gathered once for both and then freed. The ops of `g2rl_kernels` run inside the model's forward
pass (`within`), where the head's weight is whole, and is the only copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from g2rl.adapters import plain_copy
from g2rl.config import ConfigError, ModelConfig
from g2rl.parallel.ranks import Ranks

T = TypeVar("T")


def where_to_load(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """The same model, on a CPU where its weights are going to be split: they may be too large for one device."""
    return replace(config, device="cpu") if ranks.sharded else config


def place(model: Any, reference: Any, sampler: Any, config: ModelConfig, device: torch.device, ranks: Ranks) -> None:
    """Bring models that are loaded to where they work. With split weights, the sampler has a copy that is whole.

    Args:
        reference: of the KL term, None without one.
        device: where they work.

    Raises:
        ConfigError: ranks have loaded different weights.
    """
    if ranks.size > 1:
        found = ranks.gathered([_checksum(model)])
        wrong = [rank for rank, value in enumerate(found) if value != found[0]]
        if wrong:
            raise ConfigError(
                f"model.path: expected the same weights on every rank, found others on rank {wrong[0]} than on rank 0"
            )
    if not ranks.first:  # dropout of other inputs has other draws
        torch.manual_seed((torch.initial_seed() + ranks.rank) % 2**64)
    if ranks.sharded:
        if isinstance(getattr(sampler, "model", None), torch.nn.Module):  # of the engine in this process
            sampler.model = (plain_copy(model) if sampler.model is model else sampler.model).to(device)
        for part in (model,) if reference is None else (model, reference.model):
            shard(part, config, device, ranks.size)


def shard(model: Any, config: ModelConfig, device: torch.device, ranks: int) -> None:
    """Split a model of transformers over ranks, layer by layer, each weight on its first dimension.

    In bfloat16, `model.autocast` would keep a copy of every weight for the backward pass; here weights are rounded
    before they are gathered, which are half the bytes, too. Gradients are summed in fp32.

    Args:
        model: whole, on any device.
        config: `autocast` counts here.
        device: where the parts go.
    """
    half = torch.bfloat16 if config.in_bfloat16 else None
    trained = any(parameter.requires_grad for parameter in model.parameters())
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (ranks,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32),
    }
    for layer in _layers(model):
        fully_shard(layer, reshard_after_forward=True, **settings)
    # A frozen model has no backward pass that would free its embeddings and head.
    fully_shard(model, reshard_after_forward=not trained, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is a share of the whole step's: ranks add up, and there is no mean.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.g2rl_within = _plainly
    register_fsdp_forward_method(model, "g2rl_within")


def _plainly(function: Callable[[], T]) -> T:
    return function()


def within(model: Any, function: Callable[[], T]) -> T:
    """Call `function` as part of the model's forward pass."""
    run: Callable[[Callable[[], T]], T] = getattr(model, "g2rl_within", _plainly)
    return run(function)


def load_weights(model: Any, weights: dict[str, Any]) -> None:
    """Put weights into a model by name: whole ones, or, where both are split, as they are."""
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    if sharded and not any(isinstance(weight, DTensor) for weight in weights.values()):
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)


def split_states(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Split the tensors of an optimiser's whole state in place, each as the parameter that it is of."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, found in state["state"].items():
        parameter = parameters[index]
        for key, value in found.items():
            if value.shape == parameter.shape:
                value = value.to(parameter.device)
                found[key] = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _layers(model: Any) -> list[Any]:
    """The modules that transformers names as not to be cut, such as decoder layers."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _checksum(model: Any) -> int:
    """The same for the same bits of all weights; in any order, since integers are added."""
    total = 0
    for parameter in model.parameters():
        kind = torch.int32 if parameter.element_size() == 4 else torch.int16
        total = (31 * total + int(parameter.detach().contiguous().view(kind).sum(dtype=torch.int64))) % 2**64
    return total
