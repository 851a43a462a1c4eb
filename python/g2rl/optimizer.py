"""AdamW as the configuration asks for it: its states' type, and fp32 master weights of a model in bfloat16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from g2rl.config import Config, OptimConfig
from g2rl.plugins import import_package


def make_optimizer(parameters: Iterable[Parameter], config: Config) -> Optimizer:
    """Of those parameters that are trained.

    `optim.name=adamw` is PyTorch's fused AdamW, with fp32 states; `adamw_8bit` is that of bitsandbytes, whose states
    take a byte each (Dettmers et al., arXiv 2110.02861).

    A weight in bfloat16 has 8 bits: it would lose every change of less than 1/256 of it, which at this learning rate
    are nearly all. The optimiser updates an fp32 copy of each such weight, and the model gets that rounded
    (Micikevicius et al., arXiv 1710.03740). Copies are part of the optimiser's `state_dict`.

    Raises:
        ConfigError: bitsandbytes is asked for and not installed.
    """
    optim, trained = config.optim, [p for p in parameters if p.requires_grad]
    kind, options = _kind(optim.name)
    options |= group_settings(optim)
    masters = [p if p.dtype == torch.float32 else Parameter(p.detach().float()) for p in trained]
    pairs = [(p, master) for p, master in zip(trained, masters, strict=True) if p is not master]
    if not pairs:
        return kind(trained, **options)
    optimizer = type(f"Master{kind.__name__}", (_MasterWeights, kind), {"pairs": pairs})(masters, **options)
    assert isinstance(optimizer, Optimizer)
    return optimizer


def group_settings(optim: OptimConfig) -> dict[str, Any]:
    """What the configuration says of each of the optimiser's groups of parameters."""
    return {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "weight_decay": optim.weight_decay}


def in_words(config: Config) -> str:
    """What is used, for the run's facts."""
    name = "AdamW of bitsandbytes, 8-bit states" if config.optim.name == "adamw_8bit" else "fused AdamW, fp32 states"
    has_masters = config.model.dtype == "bfloat16" and not config.model.lora.rank
    return f"{name}, fp32 master weights" if has_masters else name


def _kind(name: str) -> tuple[type[Optimizer], dict[str, Any]]:
    """The class, and what it is told besides the numbers of the configuration."""
    if name == "adamw":
        return torch.optim.AdamW, {"fused": True}
    return import_package("bitsandbytes", "optim.name: adamw_8bit").optim.AdamW8bit, {}


MASTERS = "masters"
"""What the states have besides PyTorch's, where there are copies."""


def dtype_of(states: Iterable[str]) -> str:
    """The `model.dtype` of a whole model that is trained, by the keys of its optimiser's `state_dict`."""
    return "bfloat16" if MASTERS in states else "float32"


class _MasterWeights(Optimizer):
    """Before an optimiser's class: gradients go from weights to their fp32 copies, new values go back.

    Attributes:
        pairs: each weight with its copy, which is what the optimiser holds.
    """

    pairs: list[tuple[Parameter, Parameter]]

    def step(self, closure: Any = None) -> Any:
        for p, master in self.pairs:
            master.grad, p.grad = None if p.grad is None else p.grad.float(), None
        result = super().step(closure)
        for p, master in self.pairs:
            p.data.copy_(master.data)
            master.grad = None
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for p, _ in self.pairs:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {MASTERS: [master.data for _, master in self.pairs]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for (_, master), value in zip(self.pairs, state_dict[MASTERS], strict=True):
            master.data.copy_(value)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != MASTERS})
