"""Functions as ops of PyTorch.

`torch.library.custom_op` does the same, but with its first call it imports PyTorch's compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def register_op(function: Callable[..., Any]) -> torch._ops.OpOverload:
    """The op ``g2rl::`` and a function's name, by its annotations; what it returns shares no memory with arguments."""
    name = function.__name__.removeprefix("_")
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(f"g2rl::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"g2rl::{name}", "default", function)
    op: torch._ops.OpOverload = getattr(torch.ops.g2rl, name).default
    return op
