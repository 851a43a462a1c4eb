"""The kernels that a configuration asks for by name."""

from __future__ import annotations

import torch

from g2rl.config import Config, ConfigError
from g2rl.model import resolve_device
from g2rl_kernels import LMHead, token_logprobs, use_backend


def choose_backend(config: Config) -> None:
    """Have the ops of this process run on `backend`; with `auto` nothing is chosen.

    Args:
        config: as `g2rl.precision.settled` returns it.

    Raises:
        ConfigError: the backend does not run here, on the model's device and types; the message says why.
    """
    if config.backend == "auto":
        return
    # By a product with one token: before the model is loaded, and not where its first batch comes.
    dtype = getattr(torch, config.model.product_dtype)
    device = resolve_device(config.model.device)
    try:
        with use_backend(config.backend):
            head = LMHead(torch.zeros(16, 16, dtype=dtype, device=device))
            token_logprobs(head.weight[:1], head, torch.zeros(1, dtype=torch.int64, device=device))
    except RuntimeError as error:
        raise ConfigError(f"backend: expected auto or one that runs here, found {config.backend!r}: {error}") from error
    use_backend(config.backend)
