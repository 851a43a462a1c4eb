r"""Gradients of single responses through the whole model, and their cosines.

g_i = grad log p(response i) over all weights, in the model's own dtype: its direction is what a response adds to a step
of GRPO, whose advantage and whose division by tokens are factors. The gradients of one problem's responses are held
together; of G problems only products <g_i, g_j> remain, part of the model by part.

Eq. 28 of the paper says that every layer's gradient is a linear image of Phi. Token by token it is: with J_t the
derivative of the head's input to a layer's weights, g = sum_t J_t^T phi_t / T. But J_t is another one for each token
and each response, so that cos(Phi) says what cos(g) is only as far as all J_t are alike (MATH.md, section 11).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from g2rl.analysis.responses import Subject
from g2rl.probes import in_float64
from g2rl.types import Episode
from g2rl_kernels import token_logprobs

ALL = "all"
"""The part that is the whole model."""
_CHUNK = 2**20
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.(.*)")


def model_parts(model: Any) -> dict[str, str]:
    """The part that each weight with a gradient belongs to, by the weight's name.

    ``layer 7 attention``, ``layer 7 mlp`` with the norm before each, ``embedding``, ``head`` or, where they are one
    weight, ``embedding and head``; ``other`` for the rest, such as the final norm.
    """
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    names = {id(outputs): "head", id(inputs): "embedding and head" if inputs is outputs else "embedding"}
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    return {name: names.get(id(weight)) or _part(name) for name, weight in weights}


def _part(name: str) -> str:
    found = _LAYER.search(name)
    if not found:
        return "other"
    inside = found[2]
    attention = "attn" in inside or "attention" in inside.partition(".")[0] or inside.startswith(("input", "ln_1"))
    return f"layer {found[1]} {'attention' if attention and 'post_attention' not in inside else 'mlp'}"


def gradient_products(subject: Subject, episodes: Sequence[Episode]) -> dict[str, Tensor]:
    """Products <g_i, g_j> of responses' gradients of log p, [m, m] fp64, by part of the model, and of `ALL`.

    Needs memory for m gradients of the whole model.

    Args:
        episodes: of one problem, none of them empty.
    """
    parts = model_parts(subject.model)
    named = dict(subject.model.named_parameters())
    weights = [named[name] for name in parts]
    # One block: memory that many tensors take piece by piece may not go back to the system.
    held = weights[0].new_empty(len(episodes), sum(weight.numel() for weight in weights))
    for i, episode in enumerate(episodes):
        found = torch.autograd.grad(response_logp(subject, episode), weights, materialize_grads=True)
        torch.cat([gradient.flatten() for gradient in found], out=held[i])
    products: dict[str, Tensor] = {}
    start = 0
    for weight, part in zip(weights, parts.values(), strict=True):
        product = gram(held[:, start : start + weight.numel()])
        start += weight.numel()
        for key in (ALL, part):
            products[key] = products[key] + product if key in products else product
    return products


def response_logp(subject: Subject, episode: Episode) -> Tensor:
    """log p of a response, the sum over its tokens, as a step of training computes it."""
    hidden, targets, _ = subject.states([episode])
    return token_logprobs(hidden, subject.head(hidden), targets).logps.sum()


def gram(vectors: Tensor) -> Tensor:
    """Products of vectors [m, k] in fp64, [m, m], without a copy of all of them."""
    chunks = map(in_float64, vectors.split(_CHUNK, 1))
    return reduce(Tensor.add_, (chunk @ chunk.T for chunk in chunks)).cpu()


def gram_cosines(products: Tensor) -> Tensor:
    """Cosines [m, m] from products [m, m]; 0 where a vector is 0."""
    norms = products.diagonal().sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    return products * scale[:, None] * scale
