"""The head's ops as PyTorch knows them: flat schemas, fakes, one autograd formula; `ops.head` documents them.

Values are checked inside the ops, so that compiled programs check them too. Where ranks hold parts of the vocabulary
`token_sums` and `part_features` take the place of the others, see `ops.head._over_parts`; they share the backward pass.
"""

from __future__ import annotations

import torch

from g2rl_kernels.checks import ValueChecks, check_targets, own_copy, refuse_second_derivative
from g2rl_kernels.dispatch import resolve
from g2rl_kernels.distributed import all_reduce, local_targets
from g2rl_kernels.ops.registration import register_op
from g2rl_kernels.records import Head, Needs, Responses, TokenLogprobs

# Of the largest weight of a response, as a power of two: fp32 holds sums of millions of these, and their inverse, and
# float64 each power of two that leads there, also from its smallest numbers.
_MODERATE_EXPONENT = 64
# Of the bias of a word that is masked, and of its logit where the head's scale is large: fp32 holds both, and multiples
# of them by any gradient that is of use.
_MASKED_BIAS, _MASKED_LOGIT = 1e30, 1e37


def head_record(
    weight: torch.Tensor, bias: torch.Tensor | None, temperature: float, logit_scale: float, softcap: float
) -> Head:
    """The record that backends get, in which no bias makes a logit -inf: p log p = 0 * -inf would be NaN."""
    if bias is not None:
        largest = min(_MASKED_BIAS, _MASKED_LOGIT * temperature / abs(logit_scale))
        bias = bias.float() if bias.dtype == torch.float16 else bias  # whose own lowest number may mask nothing
        bias = bias.clamp(min=-largest) if logit_scale > 0 else bias.clamp(max=largest)
    return Head(weight, bias, temperature, logit_scale, softcap)


def _result_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _fake_results(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=_result_dtype(hidden)) for _ in range(3))


def _fake_features(hidden: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    B = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return hidden.new_empty((B, hidden.shape[1]), dtype=_result_dtype(hidden))


def _checked_tokens(
    hidden: torch.Tensor, targets: torch.Tensor, vocab_size: int, check_finite: bool
) -> tuple[ValueChecks, torch.Tensor]:
    """The checks of a forward op, and what kernels may use in the place of targets."""
    checks = ValueChecks()
    if check_finite:
        checks.finite("hidden", hidden)
    return checks, checks.targets(targets, vocab_size)


def _checked_responses(
    checks: ValueChecks,
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_weights: torch.Tensor | None,
    lse: torch.Tensor | None = None,
) -> Responses:
    """What kernels may use in the place of cu_seqlens and token_weights."""
    cu_seqlens = checks.offsets("cu_seqlens", cu_seqlens, hidden.shape[0], "N")
    if token_weights is not None:
        checks.not_negative("token_weights", token_weights)
        token_weights = _moderate(token_weights, cu_seqlens)
    return Responses(cu_seqlens, token_weights, lse)


def _moderate(token_weights: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Weights [N] whose sums fit kernels' fp32: a power of two times those of a response whose largest does not.

    Phi does not depend on the scale of a response's weights. Others keep their bits. On a CPU alone: elsewhere to ask
    is to wait, and not to ask a dozen launches that hardly anybody needs.
    """
    if token_weights.device.type != "cpu":
        return token_weights
    weights = token_weights.double()
    exponent = torch.frexp(torch.segment_reduce(weights, "max", offsets=cu_seqlens, initial=0)).exponent
    shift = exponent.clamp(-_MODERATE_EXPONENT, _MODERATE_EXPONENT) - exponent
    if not bool(shift.any()):
        return token_weights
    factor = torch.exp2(shift.double()).repeat_interleave(cu_seqlens.diff(), output_size=token_weights.shape[0])
    return (weights * factor).to(token_weights.dtype)


@register_op
def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    check_finite: bool,
    temperature: float,
    logit_scale: float,
    softcap: float,
    workspace_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    checks, targets = _checked_tokens(hidden, targets, weight.shape[0], check_finite)
    head = head_record(weight, bias, temperature, logit_scale, softcap)
    run = resolve("token_logprobs", hidden.device, hidden.dtype, head)
    with checks:
        return tuple(run(hidden, head, targets, workspace_bytes))


@torch.library.register_fake(token_logprobs)
def _(hidden, *_):
    return _fake_results(hidden)


@register_op
def sequence_features(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_weights: torch.Tensor | None,
    lse: torch.Tensor | None,
    check_finite: bool,
    temperature: float,
    logit_scale: float,
    softcap: float,
    workspace_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    checks, targets = _checked_tokens(hidden, targets, weight.shape[0], check_finite)
    responses = _checked_responses(checks, hidden, cu_seqlens, token_weights, lse)
    head = head_record(weight, bias, temperature, logit_scale, softcap)
    run = resolve("sequence_features", hidden.device, hidden.dtype, head)
    with checks:
        return tuple(run(hidden, head, targets, responses, workspace_bytes))


@torch.library.register_fake(sequence_features)
def _(hidden, weight, bias, targets, cu_seqlens, *_):
    return (_fake_features(hidden, cu_seqlens), *_fake_results(hidden))


@register_op
def token_sums(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    check_finite: bool,
    temperature: float,
    logit_scale: float,
    softcap: float,
    workspace_bytes: int,
) -> torch.Tensor:
    """Sums [4, N] over the words vocab_start to vocab_start + V of vocab_size; only a backend's own can read them."""
    checks, targets = _checked_tokens(hidden, targets, vocab_size, check_finite)
    head = head_record(weight, bias, temperature, logit_scale, softcap)
    run = resolve("token_sums", hidden.device, hidden.dtype, head)
    with checks:
        return run(hidden, head, local_targets(targets, vocab_start, weight.shape[0]), workspace_bytes)


@torch.library.register_fake(token_sums)
def _(hidden, *_):
    return hidden.new_empty((4, hidden.shape[0]), dtype=_result_dtype(hidden))


@register_op
def part_features(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    sums: torch.Tensor,
    dgrad_group: str,
    temperature: float,
    logit_scale: float,
    softcap: float,
    workspace_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the sums [4, ranks, N] of all parts: this part's share of features, and the results of the whole vocabulary.

    `targets` count from the part's first word, and are -1 in other parts. There are no features without cu_seqlens.
    `dgrad_group` names the ranks over which the backward pass sums hidden's gradient; "" leaves it a share.
    """
    checks = ValueChecks()
    if cu_seqlens is None:
        responses = Responses(targets.new_zeros(1))
    else:
        responses = _checked_responses(checks, hidden, cu_seqlens, token_weights)
    head = head_record(weight, bias, temperature, logit_scale, softcap)
    run = resolve("part_features", hidden.device, hidden.dtype, head)
    with checks:
        return tuple(run(hidden, head, targets, responses, sums, workspace_bytes))


@torch.library.register_fake(part_features)
def _(hidden, weight, bias, targets, cu_seqlens, *_):
    return (_fake_features(hidden, cu_seqlens), *_fake_results(hidden))


@register_op
def logprobs_backward(
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
    head, saved = head_record(weight, bias, temperature, logit_scale, softcap), TokenLogprobs(logps, entropy, lse)
    if targets.device.type == "cpu":  # another thread may have changed them since the forward pass
        targets = own_copy(targets)
        check_targets(targets, weight.shape[0], lowest=-1)  # -1: in another part of the vocabulary
    run = resolve("logprobs_backward", hidden.device, hidden.dtype, head)
    grads = run(grad_logps, grad_entropy, hidden, head, targets, saved, Needs(*needs), workspace_bytes)
    grad_hidden, grad_weight, grad_bias = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return grad_hidden, grad_weight, grad_bias if bias is None else grad_bias.to(bias.dtype)


@torch.library.register_fake(logprobs_backward)
def _(grad_logps, grad_entropy, hidden, weight, bias, *rest):
    inputs, needs = (hidden, weight, bias), rest[-1]
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
    computed = logprobs_backward(
        grad_logps, grad_entropy, hidden, weight, bias, targets, logps, entropy, lse, *ctx.options, needs
    )
    return (*(grad if need else None for grad, need in zip(computed, needs, strict=True)), *none)


torch.library.register_autograd(token_logprobs, _backward, setup_context=_save_for_backward)
torch.library.register_autograd(sequence_features, _backward, setup_context=_save_for_backward)
torch.library.register_autograd(logprobs_backward, refuse_second_derivative("logps, entropy"))


def _save_of_part(ctx, inputs, output):
    _save_for_backward(ctx, inputs, output)
    ctx.dgrad_group = inputs[7]


def _backward_of_part(ctx, *grads):
    grad_hidden, *others = _backward(ctx, *grads)
    if grad_hidden is not None and ctx.dgrad_group:
        grad_hidden = all_reduce(grad_hidden, ctx.dgrad_group)
    return (grad_hidden, *others)


torch.library.register_autograd(part_features, _backward_of_part, setup_context=_save_of_part)
