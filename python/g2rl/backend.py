"""The kernels that a configuration asks for by name."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch

from g2rl.config import Config, ConfigError
from g2rl.devices import resolve_device
from g2rl_kernels import LMHead, token_logprobs, use_backend

VARIABLE = "G2RL_KERNELS_BACKEND"
"""Of the environment: the backend of ops for which none is chosen."""


def choose_backend(config: Config) -> None:
    """Have the ops of this process run on `backend`; with `auto` nothing is chosen.

    Args:
        config: as `g2rl.precision.settled` returns it.

    Raises:
        ConfigError: the backend, with `auto` that of ``G2RL_KERNELS_BACKEND``, does not run here, on the model's device
            and types; the message says why.
    """
    name = None if config.backend == "auto" else config.backend
    if not (name or os.environ.get(VARIABLE)):
        return
    # By a product with one token: before the model is loaded, and not where its first batch comes.
    dtype = getattr(torch, config.model.product_dtype)
    device = resolve_device(config.model.device)
    try:
        with use_backend(name) if name else nullcontext():
            head = LMHead(torch.zeros(16, 16, dtype=dtype, device=device))
            token_logprobs(head.weight[:1], head, torch.zeros(1, dtype=torch.int64, device=device))
    except ValueError as error:  # the variable names none
        raise ConfigError(str(error)) from error
    except RuntimeError as error:
        found = f"backend: expected auto or one that runs here, found {name!r}" if name else VARIABLE
        raise ConfigError(f"{found}: {error}") from error
    if name:
        use_backend(name)
