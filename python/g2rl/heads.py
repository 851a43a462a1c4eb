"""A Hugging Face model's head as the kernels take it, and whether that is all that the model does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from g2rl.probes import evaluating, in_float64
from g2rl_kernels import LMHead, token_logprobs

Result = TypeVar("Result")

_ROUNDINGS = 2
"""Units in the last place of the largest logit by which rounding may move log p, on average over a few tokens. Product,
bias, scale and a cap's three steps are rounded at most, each by 0.3 of a unit (root mean square): together by 0.7."""


def lm_head(model: Any, temperature: float, dtype: torch.dtype) -> LMHead:
    """The model's head with every option that its architecture puts between hidden states and logits.

    To be made anew for each forward pass: in another dtype the head has a copy of the weight, which an optimiser's step
    leaves as it was, and what is made under `no_grad` gives the weight no gradient.

    Args:
        model: a causal language model of transformers. Called inside its forward pass, FSDP2 has gathered the weight.
            Elsewhere that is a DTensor whose ranks have tokens of their own, and is gathered for each call of an op.
            ZeRO-3 gathers it for the head's own call alone: see `inside_head`.
        temperature: of the policy.
        dtype: what the head's product is computed in; the cast is differentiable.

    Raises:
        TypeError: the model has no head, or wraps one of transformers; `dtype` is no torch.dtype.
        NotImplementedError: an adapter changes the head's logits, or the head is quantised.
    """
    _require_transformers(model)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, such as torch.bfloat16, found {dtype!r}")
    embeddings = model.get_output_embeddings()
    if getattr(embeddings, "weight", None) is None:
        raise TypeError(f"model: expected a language model with a head, found {type(model).__name__} without one")
    if adapted := adapter_on_head(model):
        raise NotImplementedError(f"model: {adapted}")
    _check_not_quantised(embeddings)
    config = model.config.get_text_config()
    weight, bias = embeddings.weight, getattr(embeddings, "bias", None)
    words = _unpadded_vocab_size(config)
    if words is not None:
        weight, bias = weight[:words], None if bias is None else bias[:words]
    return LMHead(
        weight.to(dtype),
        bias=None if bias is None else bias.to(dtype),
        temperature=temperature,
        logit_scale=_logit_scale(config),
        softcap=_soft_cap(config),
        gather_weight=isinstance(weight, DTensor),
    )


def _require_transformers(model: Any) -> None:
    if not hasattr(model, "get_output_embeddings"):
        way_out = "; causal_lm_inside of g2rl.integrations.head_pass finds it in a wrapper"
        raise TypeError(f"model: expected a language model of transformers, found {type(model).__name__}{way_out}")


def inside_head(model: Any, compute: Callable[[torch.Tensor], Result], hidden: torch.Tensor) -> Result:
    """`compute(hidden)`, which may use the model's head; where DeepSpeed keeps parts of it, within the head's own call.

    ZeRO-3's hooks gather the weight for that call, and again for its backward pass; every rank has to call.

    Args:
        compute: returns a tensor or a tuple; what of it has a gradient has it by way of its argument.
    """
    head = model.get_output_embeddings()
    if head is None or not any(map(_in_parts, head.parameters())):
        return compute(hidden)
    # PEFT's copy of a head is inside another module, which chooses between it and the original.
    owners = [part for part in head.modules() if "weight" in part._parameters]
    with ExitStack() as undo:
        for owner in owners:
            undo.enter_context(_forward_of(owner, compute))
        result: Result = head(hidden)
        return result


def _in_parts(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has a parameter, of which a rank has its part outside of the module's own call.

    Not to be asked of ``module.weight``: in a forward pass DeepSpeed takes that for a use by whatever module runs, and
    gathers the weight for that one from then on.
    """
    return hasattr(parameter, "ds_id")


@contextmanager
def _forward_of(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let calls of a module, its hooks included, run another function."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def adapter_on_head(model: Any) -> str:
    """What is wrong where an adapter adds to the products of the model's head, not a copy of it that is trained; else
    empty."""
    if not hasattr(model.get_output_embeddings(), "base_layer"):
        return ""
    return (
        "expected no adapter on the head, whose weight the features are made of, found one; leave the head out of "
        "target_modules and target_parameters"
    )


def _check_not_quantised(head: Any) -> None:
    """A cast would take a quantised head's codes for its weights, without their scales."""
    kind = getattr(head.weight, "dtype", None)  # PyTorch's own quantised layers have a method there
    if hasattr(head.weight, "__tensor_flatten__") and not isinstance(head.weight, DTensor):
        kind = type(head.weight).__name__  # torchao's weights keep their codes in tensors of their own
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point or kind.itemsize < 2:
        found = type(head).__name__ if kind is None else f"{kind} in a {type(head).__name__}"
        raise NotImplementedError(
            f"model: expected a head with a weight in floating point of 16 bits or more, found {found}; leave the head "
            "out of what is quantised, as `modules_to_not_convert` does"
        )


def head_difference(model: Any, dtype: torch.dtype | None = None) -> str:
    """What is wrong where the model's log-probabilities are not those of `lm_head` on its last hidden states.

    Some architectures have layers between body and head. Compared are eight random tokens, without gradient or dropout.

    Args:
        model: as in `lm_head`, under the autocast that it is trained with. With ZeRO-3 every rank has to ask.
        dtype: of the head's product; None is `product_dtype`'s.

    Returns:
        the difference in words, or that its hidden states cannot be had; empty where rounding explains it, and where
        the model does not run on tokens alone here, as one whose weights are split or not there yet.

    Raises:
        TypeError, NotImplementedError: as `lm_head`.
    """
    _require_transformers(model)
    if _is_split(model) or model.device.type == "meta":
        return ""
    name = type(model).__name__
    nowhere = f"{name} names no part of itself that has its last hidden states"
    if model.base_model is model:
        return nowhere
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    words = min(config.vocab_size, _unpadded_vocab_size(config) or config.vocab_size)
    ids = torch.randint(words, (1, 9), generator=generator).to(model.device)
    try:
        with torch.no_grad(), evaluating(model):
            states = model.base_model(input_ids=ids, use_cache=False)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return ""
    if not hasattr(states, "last_hidden_state"):  # it has a head itself, as the base of a PEFT model
        return nowhere
    hidden = states.last_hidden_state[0, :-1]
    product = dtype or product_dtype(hidden)

    def logps_or_size(hidden: torch.Tensor) -> torch.Tensor | int:
        head = lm_head(model, 1.0, product)
        d = head.weight.shape[1]
        return token_logprobs(hidden.to(product), head, ids[0, 1:]).logps if hidden.shape[1] == d else d

    with torch.no_grad():
        logps = inside_head(model, logps_or_size, hidden)
    if isinstance(logps, int):
        return f"{name} has last hidden states of {hidden.shape[1]} numbers, and its head takes {logps}"
    expected = in_float64(logits).log_softmax(-1)
    expected = expected.gather(-1, ids[0, 1:, None].to(expected.device))[:, 0]
    gap = float((logps.to(expected.device) - expected).abs().mean())
    # Products in fp32 may be made of tf32.
    unit = max(torch.finfo(product).eps, torch.finfo(logits.dtype).eps, 2**-10)
    rounding = _ROUNDINGS * unit * (1 + float(logits.abs().max()))
    if not gap > rounding:
        return ""
    return (
        f"log-probabilities of {name} differ from those of its head on its last hidden states by "
        f"{gap:.2g} a token, where rounding explains {rounding:.1g}: something lies in between that is not known here"
    )


def _is_split(model: Any) -> bool:
    """Whether ranks hold parts of its weights, which are whole in a wrapper's forward pass alone."""
    wrapped = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return wrapped or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What a product with hidden states is computed in: autocast's type, or theirs."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def keep_head_inputs_contiguous(model: Any) -> None:
    """Make decoding on a CPU several times faster; once for a model, however often it is asked.

    transformers hands the head a slice of the prompt's hidden states. PyTorch multiplies such a strided [B, 1, d] as B
    products and copies the weight for each of them, which takes longer than all decoding.
    """
    head = model.get_output_embeddings()
    if _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)


def _contiguous(head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].contiguous(), *inputs[1:]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A tensor that may be split over ranks, put together; every rank has to ask."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _unpadded_vocab_size(config: Any) -> int | None:
    """How many words have logits where others are there to round the vocabulary's size, as Inkling's; None for all."""
    return getattr(config, "unpadded_vocab_size", None)


def _first(config: Any, *names: str) -> Any:
    """What the configuration has by the first of these names, each an architecture's own; None for none of them."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _soft_cap(config: Any) -> float | None:
    """c of the c tanh(z / c) that logits go through: Gemma's, RecurrentGemma's, xLSTM's."""
    return _first(config, "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def _logit_scale(config: Any) -> float:
    """What logits are multiplied by: Cohere, Falcon-H1 and others multiply, Granite, MiniCPM3 and Inkling divide."""
    if config.model_type == "mpt":  # whose configuration has a scale that transformers leaves out
        return 1.0
    scale = _first(config, "logit_scale", "output_multiplier", "lm_head_multiplier")
    if scale is not None:
        return float(scale)
    divisor = _first(config, "logits_scaling", "logits_mup_width_multiplier")
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1 / float(divisor)
