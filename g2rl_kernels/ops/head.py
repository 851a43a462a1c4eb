"""Log-probabilities, entropy and gradient features of a language model's head, from hidden states.

For token t with hidden state h_t and target y_t (N tokens, d hidden, V vocab, B responses):

    z_t   = logit_scale * (W h_t + b);  with a soft cap c: z_t = c tanh(z_t / c)
    p_t   = softmax(z_t / T)                                            paper eq. 5
    logp_t = log p_t[y_t],   H_t = -sum_v p_t[v] log p_t[v]
    phi_t = T dlogp_t / dh_t = logit_scale W^T ((e_y - p_t) * dz/dz_raw)     eq. 6, 7, 14
    Phi_b = sum_{t in b} a_t phi_t / sum_{t in b} a_t                   eq. 8

Neither logits [N, V] nor token gradients [N, d] are kept. MATH.md derives the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from g2rl_kernels.checks import ValueChecks, check_tensor
from g2rl_kernels.dispatch import resolve
from g2rl_kernels.records import Head, Needs, Responses, SequenceFeatures, TokenLogprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class LMHead:
    """The last layer of a language model and how its logits are used.

    Attributes:
        weight: [V, d], bf16, fp16, fp32 or fp64.
        bias: [V], weight's dtype or fp32.
        temperature: divides the logits for log-probabilities, entropy and features alike; > 0.
        logit_scale: multiplies W h + b (Cohere, Granite).
        softcap: c in c tanh(z / c), applied before the temperature (Gemma); None for none.
        process_group: ranks that hold equal shares of the vocabulary. Not implemented for more than one rank.

    Raises:
        TypeError, ValueError: an attribute has another type, shape, device or range.
        NotImplementedError: `process_group` has more than one rank.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    process_group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        check_tensor("head.weight", self.weight, ("V", "d"), FLOAT_DTYPES)
        if self.weight.shape[0] == 0 or self.weight.shape[1] == 0:
            raise ValueError(f"head.weight: expected V > 0 and d > 0, found shape {list(self.weight.shape)}")
        if self.bias is not None:
            accepted = (self.weight.dtype, torch.float32)
            check_tensor("head.bias", self.bias, (self.weight.shape[0],), accepted, self.weight.device)
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"head.temperature: expected a finite number > 0, found {self.temperature}")
        if self.logit_scale == 0 or not math.isfinite(self.logit_scale):
            raise ValueError(f"head.logit_scale: expected a finite number other than 0, found {self.logit_scale}")
        if self.softcap is not None and not (self.softcap > 0 and math.isfinite(self.softcap)):
            raise ValueError(f"head.softcap: expected None or a finite number > 0, found {self.softcap}")
        if self.process_group is not None and self.process_group.size() > 1:
            raise NotImplementedError(
                f"head.process_group: expected one rank, found {self.process_group.size()}: a vocabulary split over "
                "ranks is not implemented; gather the weight and pass it whole"
            )


def token_logprobs(
    hidden: torch.Tensor,
    head: LMHead | torch.Tensor,
    targets: torch.Tensor,
    *,
    workspace_bytes: int | None = None,
    check_finite: bool = False,
) -> TokenLogprobs:
    """Log-probability and entropy of each token, differentiable in hidden, weight and bias.

    Equivalent to, without keeping logits::

        logits = (hidden @ head.weight.T).float() / head.temperature
        logps = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        entropy = torch.distributions.Categorical(logits=logits).entropy()

    Args:
        hidden: [N, d], the head's dtype; what the head multiplies, after the final norm.
        head: an `LMHead`, or its weight [V, d] alone.
        targets: [N] int64 in [0, V).
        workspace_bytes: limit for temporary tensors of vocabulary size; more of it can save a second product with the
            weight. Default: 256 MiB; on a GPU a fortieth of its memory if that is more, 2 GiB at most; on a CPU with
            the compiled kernels, 5 % of what fp32 logits would take.
        check_finite: also raise for NaN or inf in hidden, which costs one read of it.

    Raises:
        TypeError, ValueError, IndexError: an argument has another type, shape, device or range.
    """
    head = _checked_head(hidden, head, targets, workspace_bytes, check_finite)
    return TokenLogprobs(
        *_token_logprobs(
            hidden,
            head.weight,
            head.bias,
            targets,
            float(head.temperature),
            float(head.logit_scale),
            float(head.softcap or 0.0),
            workspace_bytes or 0,
        )
    )


def sequence_features(
    hidden: torch.Tensor,
    head: LMHead | torch.Tensor,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_weights: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    *,
    workspace_bytes: int | None = None,
    check_finite: bool = False,
) -> SequenceFeatures:
    """The gradient feature Phi of each response (eq. 8), with the log-probabilities and entropy of `token_logprobs`.

    Phi is T times the gradient of the weighted mean log-probability with respect to the head's input. logps and entropy
    are differentiable; features are data for the reward and are not. Equivalent to, without keeping token gradients::

        p = ((hidden @ head.weight.T).float() / head.temperature).softmax(-1)
        phi = head.weight.float()[targets] - p @ head.weight.float()
        features[b] = (a[s:e, None] * phi[s:e]).sum(0) / a[s:e].sum()      # s, e = cu_seqlens[b], cu_seqlens[b + 1]

    Args:
        hidden, head, targets, workspace_bytes, check_finite: as in `token_logprobs`.
        cu_seqlens: [B + 1] int32 or int64, from 0 to N, never decreasing; response b owns tokens cu[b] to cu[b + 1].
        token_weights: [N] float >= 0, a_t of eq. 8; None weighs all tokens alike.
        lse: [N] float from the same weights and hidden states (say, of the pass for old log-probabilities); spares
            kernels the search for the row maximum. Values of it only steer rounding: the result is normalised anew.

    Features are additive: parts of one response, weighted by their sums of a_t, add up to the whole.

    Raises:
        TypeError, ValueError, IndexError: an argument has another type, shape, device or range.
    """
    head = _checked_head(hidden, head, targets, workspace_bytes, check_finite)
    check_tensor("cu_seqlens", cu_seqlens, ("B + 1",), (torch.int32, torch.int64), hidden.device)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens: expected at least the offset 0, found an empty tensor")
    for name, tensor in (("token_weights", token_weights), ("lse", lse)):
        if tensor is not None:
            check_tensor(name, tensor, (hidden.shape[0],), FLOAT_DTYPES, hidden.device)
    return SequenceFeatures(
        *_sequence_features(
            hidden,
            head.weight,
            head.bias,
            targets,
            cu_seqlens,
            token_weights,
            lse,
            float(head.temperature),
            float(head.logit_scale),
            float(head.softcap or 0.0),
            workspace_bytes or 0,
        )
    )


def _checked_head(
    hidden: torch.Tensor,
    head: LMHead | torch.Tensor,
    targets: torch.Tensor,
    workspace_bytes: int | None,
    check_finite: bool,
) -> LMHead:
    """The head as an `LMHead`, after the checks that need no values."""
    if not isinstance(head, LMHead):
        head = LMHead(head)
    weight = head.weight
    check_tensor("hidden", hidden, ("N", weight.shape[1]), (weight.dtype,), weight.device)
    check_tensor("targets", targets, (hidden.shape[0],), (torch.int64,), hidden.device)
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise ValueError(f"workspace_bytes: expected a number of bytes > 0, found {workspace_bytes}")
    if check_finite:
        finite = torch.isfinite(hidden).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(f"hidden: expected finite values, found NaN or inf in row {row}")
    return head


# Registration. Values are checked inside the ops, so that compiled programs check them too.


def _result_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@torch.library.custom_op("g2rl::token_logprobs", mutates_args=())
def _token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float,
    workspace_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    checks = ValueChecks()
    targets = checks.targets(targets, weight.shape[0])
    head = Head(weight, bias, temperature, logit_scale, softcap)
    run = resolve("token_logprobs", hidden.device, hidden.dtype, head)
    with checks:
        return tuple(run(hidden, head, targets, workspace_bytes))


@_token_logprobs.register_fake
def _(hidden, weight, bias, targets, temperature, logit_scale, softcap, workspace_bytes):
    dtype = _result_dtype(hidden)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))


@torch.library.custom_op("g2rl::sequence_features", mutates_args=())
def _sequence_features(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_weights: torch.Tensor | None,
    lse: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    workspace_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    checks = ValueChecks()
    targets = checks.targets(targets, weight.shape[0])
    cu_seqlens = checks.offsets("cu_seqlens", cu_seqlens, hidden.shape[0], "N")
    if token_weights is not None:
        checks.not_negative("token_weights", token_weights)
    head, responses = Head(weight, bias, temperature, logit_scale, softcap), Responses(cu_seqlens, token_weights, lse)
    run = resolve("sequence_features", hidden.device, hidden.dtype, head)
    with checks:
        return tuple(run(hidden, head, targets, responses, workspace_bytes))


@_sequence_features.register_fake
def _(
    hidden, weight, bias, targets, cu_seqlens, token_weights, lse, temperature, logit_scale, softcap, workspace_bytes
):
    dtype = _result_dtype(hidden)
    features = hidden.new_empty((cu_seqlens.shape[0] - 1, hidden.shape[1]), dtype=dtype)
    return (features, *(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3)))


@torch.library.custom_op("g2rl::logprobs_backward", mutates_args=())
def _logprobs_backward(
    grad_logps: torch.Tensor,
    grad_entropy: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    logps: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float,
    workspace_bytes: int,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for hidden, weight and bias; those that `needs` does not ask for are tensors without elements."""
    head, saved = Head(weight, bias, temperature, logit_scale, softcap), TokenLogprobs(logps, entropy, lse)
    run = resolve("logprobs_backward", hidden.device, hidden.dtype, head)
    grads = run(grad_logps, grad_entropy, hidden, head, targets, saved, Needs(*needs), workspace_bytes)
    grad_hidden, grad_weight, grad_bias = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return grad_hidden, grad_weight, grad_bias


@_logprobs_backward.register_fake
def _(
    grad_logps,
    grad_entropy,
    hidden,
    weight,
    bias,
    targets,
    logps,
    entropy,
    lse,
    temperature,
    logit_scale,
    softcap,
    workspace_bytes,
    needs,
):
    inputs = (hidden, weight, bias)
    return tuple(
        hidden.new_empty(x.shape, dtype=x.dtype) if need else hidden.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _save_for_backward(ctx, inputs, output):
    hidden, weight, bias, targets = inputs[:4]
    *features, logps, entropy, lse = output
    ctx.mark_non_differentiable(*features, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, logps, entropy, lse)
    ctx.options = inputs[-4:]
    ctx.trailing = len(inputs) - 3


def _backward(ctx, *grads):
    grad_logps, grad_entropy = grads[-3:-1]
    hidden, weight, bias, targets, logps, entropy, lse = ctx.saved_tensors
    none = (None,) * ctx.trailing
    if grad_logps is None and grad_entropy is None:
        return (None, None, None, *none)
    needs = list(ctx.needs_input_grad[:3])
    grad_logps = torch.zeros_like(logps) if grad_logps is None else grad_logps
    grad_entropy = torch.zeros_like(entropy) if grad_entropy is None else grad_entropy
    computed = _logprobs_backward(
        grad_logps, grad_entropy, hidden, weight, bias, targets, logps, entropy, lse, *ctx.options, needs
    )
    return (*(grad if need else None for grad, need in zip(computed, needs, strict=True)), *none)


_token_logprobs.register_autograd(_backward, setup_context=_save_for_backward)
_sequence_features.register_autograd(_backward, setup_context=_save_for_backward)
