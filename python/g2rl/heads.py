"""A Hugging Face model's head as the kernels take it."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from g2rl_kernels import LMHead


def lm_head(model: Any, temperature: float, dtype: torch.dtype) -> LMHead:
    """The model's head with every option that its architecture puts between hidden states and logits.

    Args:
        model: a causal language model of transformers. Called inside its forward pass, FSDP2 has gathered the weight.
        temperature: of the policy.
        dtype: what the head's product is computed in; the cast is differentiable.
    """
    embeddings = model.get_output_embeddings()
    config = model.config.get_text_config()
    bias = getattr(embeddings, "bias", None)
    return LMHead(
        whole(embeddings.weight).to(dtype),
        bias=None if bias is None else whole(bias).to(dtype),
        temperature=temperature,
        logit_scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def keep_head_inputs_contiguous(model: Any) -> None:
    """Make decoding on a CPU several times faster.

    transformers hands the head a slice of the prompt's hidden states. PyTorch multiplies such a strided [B, 1, d] as B
    products and copies the weight for each of them, which takes longer than all decoding.
    """
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A tensor that may be split over ranks, put together; every rank has to ask."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _logit_scale(config: Any) -> float:
    """What logits are multiplied by: Cohere, Falcon-H1 and others multiply, Granite and MiniCPM3 divide."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1 / float(divisor)
