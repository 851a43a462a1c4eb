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

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from g2rl_kernels import distributed
from g2rl_kernels.checks import (
    check_int,
    check_number,
    check_tensor,
    is_dtensor,
    is_made_of_tensors,
    refuse_function_transforms,
    refuse_tangents,
    short_name,
    values_readable,
)
from g2rl_kernels.dispatch import BACKENDS, backend_number, resolve
from g2rl_kernels.distributed import Values, VocabularyPart
from g2rl_kernels.ops import head_ops
from g2rl_kernels.products import wide
from g2rl_kernels.records import Head, SequenceFeatures, TokenLogprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class LMHead:
    """The last layer of a language model and how its logits are used.

    Ranks may each hold a part of the vocabulary (tensor parallel): same tokens on every rank, same results on every
    rank, and gradients of the rank's own part. Construction is then a collective: ranks compare their parts.

    Attributes:
        weight: [V, d], bf16, fp16, fp32 or fp64; the rank's part where the vocabulary is split. A DTensor sharded on
            dimension 0 brings its ranks along.
        bias: [V], weight's dtype or fp32. A value of -inf, or below -1e30, masks a word: its probability is 0, and its
            log-probability as a target is a large negative number instead of -inf. A soft cap would undo that. With a
            negative logit_scale large positive values mask.
        temperature: divides the logits for log-probabilities, entropy and features alike; 1e-18 to 1e18.
        logit_scale: multiplies W h + b (Cohere, Granite); of either sign.
        softcap: c in c tanh(z / c), applied before the temperature (Gemma); None for none.
        process_group: ranks that hold a part each, of any sizes; None for a whole vocabulary, or a DTensor's.
        vocab_start: first word of this rank's part; None: parts follow each other in the order of ranks.
        allreduce_dgrad: sum hidden's gradient over ranks, in its dtype. False leaves this rank's share to a caller that
            sums it, as Megatron's `sequence_parallel` does by a reduce-scatter.
        gather_weight: gather a DTensor for each call: its ranks have tokens of their own (FSDP2, outside of its
            module's forward pass). Its gradient is averaged over ranks, as FSDP2 does.

    Raises:
        TypeError, ValueError: an attribute has another type, shape, device or range, or parts do not join up.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    process_group: ProcessGroup | None = None
    vocab_start: int | None = None
    allreduce_dgrad: bool = True
    gather_weight: bool = False
    part: VocabularyPart | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.weight, torch.nn.Module):
            raise TypeError(_of_module("head.weight: expected a tensor", self.weight))
        weight = distributed.local_part(self.weight)
        check_tensor("head.weight", weight, ("V", "d"), FLOAT_DTYPES)
        if is_made_of_tensors(weight):
            found = f"found {type(weight).__name__}; where it is quantised, pass its dequantize()"
            raise TypeError(f"head.weight: expected a plain tensor, {found}")
        sizes = list(self.weight.shape if self.gather_weight else weight.shape)
        if 0 in sizes:
            raise ValueError(f"head.weight: expected V > 0 and d > 0, found shape {sizes}")
        if self.bias is not None:
            # A whole bias may stand beside a weight that is gathered.
            whole = self.gather_weight and not is_dtensor(self.bias)
            dtypes = tuple(dict.fromkeys((weight.dtype, torch.float32)))
            words = self.weight.shape[0] if whole else weight.shape[0]
            check_tensor("head.bias", distributed.local_part(self.bias), (words,), dtypes, weight.device)
        check_number("head.temperature", self.temperature, "a number from 1e-18 to 1e18", _is_moderate)
        either_sign = "a number of magnitude 1e-18 to 1e18"
        check_number("head.logit_scale", self.logit_scale, either_sign, lambda x: _is_moderate(abs(x)))
        if self.softcap is not None:
            check_number("head.softcap", self.softcap, "None or a number from 1e-18 to 1e18", _is_moderate)
        if self.vocab_start is not None:
            check_int("head.vocab_start", self.vocab_start, "None or an int")
        object.__setattr__(self, "part", self._part(weight))

    def _part(self, weight: torch.Tensor) -> VocabularyPart | None:
        """Which words this rank holds; None for all."""
        group, sharded = self.process_group, is_dtensor(self.weight)
        if sharded and group is not None:
            raise ValueError("head.process_group: expected None beside a DTensor, which has its own, found a group")
        if self.gather_weight:
            if not sharded:
                raise TypeError(f"head.gather_weight: expected a DTensor for weight, found {type(weight).__name__}")
            if self.vocab_start is not None:
                raise ValueError(f"head.vocab_start: expected None with gather_weight, found {self.vocab_start}")
            return None
        if sharded:
            group = distributed.vocabulary_group(self.weight)
        if group is None:
            if self.vocab_start is not None:
                raise ValueError(f"head.vocab_start: expected None without a process_group, found {self.vocab_start}")
            return None
        distributed.check_group("head.process_group", group, weight.device)
        if group.size() == 1:
            return None
        alike = {
            "head.vocab_start: expected on every rank or on none": self.vocab_start is not None,
            "head.weight: expected the same d on every rank": weight.shape[1],
            "head.weight: expected dtypes of one size on every rank": weight.dtype.itemsize,
            "head.bias: expected on every rank or on none": self.bias is not None,
            "head.temperature: expected the same on every rank": self.temperature,
            "head.logit_scale: expected the same on every rank": self.logit_scale,
            "head.softcap: expected the same on every rank": self.softcap or 0.0,
        }
        return distributed.join_parts(weight.shape[0], self.vocab_start, alike, group, weight.device)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """weight and bias as kernels take them, differentiable."""
        plain = distributed.gathered if self.gather_weight else distributed.local_part
        return plain(self.weight), None if self.bias is None else plain(self.bias)

    @property
    def options(self) -> tuple[float, float, float]:
        """temperature, logit_scale and softcap as ops take them."""
        return float(self.temperature), float(self.logit_scale), float(self.softcap or 0.0)


def _is_moderate(x: float) -> bool:
    """Whether quotients of two such numbers, which kernels multiply by, fit into fp32."""
    return 1e-18 <= x <= 1e18


def token_logprobs(
    hidden: torch.Tensor,
    head: LMHead | torch.Tensor,
    targets: torch.Tensor,
    *,
    workspace_bytes: int | None = None,
    check_finite: bool = False,
) -> TokenLogprobs:
    """Log-probability and entropy of each token, differentiable in hidden, weight and bias, once and in reverse mode.

    Equivalent to, without keeping logits::

        logits = (hidden @ head.weight.T).float() / head.temperature
        logps = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        entropy = torch.distributions.Categorical(logits=logits).entropy()

    Args:
        hidden: [N, d], the head's dtype; what the head multiplies, after the final norm.
        head: an `LMHead`, or its weight [V, d] alone.
        targets: [N] int64 in [0, V), V the whole vocabulary.
        workspace_bytes: limit for temporary tensors of vocabulary size and for partial sums of features; more of it can
            save a second product with the weight. Default: 256 MiB; on a GPU a fortieth of its memory if that is more,
            2 GiB at most; on a CPU with the compiled kernels 5 % of what fp32 logits would take, and at least 64 MiB
            unless a product is cheap, as of bf16 on AMX with d up to 1024.
        check_finite: also raise for NaN or inf in hidden, which costs one read of it. Not while a CUDA graph is
            captured, as for all values.

    Raises:
        NotImplementedError: hidden, weight or bias has a tangent, of forward-mode differentiation, or torch.func takes
            the gradient in it.
        TypeError, ValueError, IndexError: an argument has another type, shape, device or range.
    """
    head = _as_head(head)
    weight, bias = head.tensors
    _check_tokens(hidden, weight, bias, targets, workspace_bytes)
    options = (bool(check_finite), *head.options, int(workspace_bytes or 0))
    if head.part is not None:
        results = _over_parts(hidden, head, (weight, bias), targets, (None, None), options)[1:]
    else:
        results = head_ops.token_logprobs(hidden, weight, bias, targets, *options)
    return TokenLogprobs(*results)


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
    context_group: ProcessGroup | None = None,
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
        token_weights: [N] float, finite and >= 0, a_t of eq. 8, on a GPU such that fp32 holds a response's sum and its
            inverse; None weighs all tokens alike.
        lse: [N] float from the same weights and hidden states (say, of the pass for old log-probabilities); spares
            kernels the search for the row maximum, and with it a second product. Its values only affect rounding:
            results are normalised anew, and a response with wrong values, NaN included, is computed without them. Not
            used by the torch backend, on a GPU if exponentials can be kept or a graph is being captured, and if ranks
            hold parts of the vocabulary.
        context_group: ranks that hold some tokens each of the same B responses (context parallel); features are those
            of whole responses, on every rank. A rank without tokens of a response gives it an empty range.

    Features are additive: parts of one response, weighted by their sums of a_t, add up to the whole.

    Raises:
        NotImplementedError: hidden, weight or bias has a tangent, of forward-mode differentiation, or torch.func takes
            the gradient in it.
        TypeError, ValueError, IndexError: an argument has another type, shape, device or range, or ranks of one group
            have not the same tokens or responses.
    """
    head = _as_head(head)
    weight, bias = head.tensors
    _check_tokens(hidden, weight, bias, targets, workspace_bytes)
    check_tensor("cu_seqlens", cu_seqlens, ("B + 1",), (torch.int32, torch.int64), hidden.device)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens: expected at least the offset 0, found an empty tensor")
    for name, tensor in (("token_weights", token_weights), ("lse", lse)):
        if tensor is not None:
            check_tensor(name, tensor, (hidden.shape[0],), FLOAT_DTYPES, hidden.device)
    if context_group is not None:
        distributed.check_group("context_group", context_group, hidden.device)
    options = (bool(check_finite), *head.options, int(workspace_bytes or 0))
    if head.part is not None:
        found = _over_parts(hidden, head, (weight, bias), targets, (cu_seqlens, token_weights), options)
    else:
        found = head_ops.sequence_features(hidden, weight, bias, targets, cu_seqlens, token_weights, lse, *options)
    result = SequenceFeatures(*found)
    if context_group is None:
        return result
    return result._replace(features=_over_context(result.features, cu_seqlens, token_weights, context_group))


def _over_parts(
    hidden: torch.Tensor,
    head: LMHead,
    tensors: tuple[torch.Tensor, torch.Tensor | None],
    targets: torch.Tensor,
    responses: tuple[torch.Tensor | None, torch.Tensor | None],
    options: tuple[bool, float, float, float, int],
) -> tuple[torch.Tensor, ...]:
    """features, logps, entropy and lse where ranks hold parts of the vocabulary: MATH.md, section 10."""
    part, (weight, bias) = head.part, tensors
    assert part is not None
    if not torch.compiler.is_compiling() and values_readable(targets):
        run = resolve("token_sums", hidden.device, hidden.dtype, Head(weight, bias, *head.options))
        _check_same_tokens(part, targets, 0 if responses[0] is None else responses[0].shape[0], backend_number(run))
    with torch.no_grad():
        sums = head_ops.token_sums(hidden, weight, bias, targets, part.start, part.vocab_size, *options)
        sums = distributed.gather_sums(sums, part)
    local = distributed.local_targets(targets, part.start, weight.shape[0])
    dgrad_group = part.group if head.allreduce_dgrad else ""
    features, *results = head_ops.part_features(
        hidden, weight, bias, local, *responses, sums, dgrad_group, *options[1:]
    )
    if features.shape[0]:
        features = distributed.all_reduce(features, part.group)
    return features, *results


def _check_same_tokens(part: VocabularyPart, targets: torch.Tensor, offsets: int, backend: int) -> None:
    where = "on every rank of the head (gather_weight is for ranks with tokens of their own)"
    N = targets.shape[0]
    alike: Values = {
        f"hidden: expected the same N {where}": N,
        f"cu_seqlens: expected the same B + 1 {where}": offsets,
        f"targets: expected the same checksum {where}": (targets * torch.arange(1, N + 1, device=targets.device)).sum(),
        f"backend: expected the same on every rank, by number of {[b.name for b in BACKENDS]}": backend,
    }
    distributed.check_alike(alike, part.ranks, part.group, targets.device)


def _over_context(
    features: torch.Tensor, cu_seqlens: torch.Tensor, token_weights: torch.Tensor | None, group: ProcessGroup
) -> torch.Tensor:
    if not torch.compiler.is_compiling() and values_readable(features):
        alike = {"cu_seqlens: expected the same B + 1 on every rank of context_group": cu_seqlens.shape[0]}
        distributed.check_alike(alike, group.size(), group.group_name, features.device)
    if token_weights is None:
        weights = wide(cu_seqlens.diff())
    else:
        # Adds term by term: in fp32 the sum of a long response would lose digits. Weights, as features, are data.
        weights = torch.segment_reduce(wide(token_weights.detach()), "sum", offsets=cu_seqlens, initial=0)
    # In float64 to the end, which holds all that weights may be.
    return distributed.sum_features(wide(features), weights, group.group_name).to(features.dtype)


def _as_head(head: LMHead | torch.Tensor) -> LMHead:
    if isinstance(head, torch.nn.Module):
        raise TypeError(_of_module("head: expected an LMHead or a weight", head))
    return head if isinstance(head, LMHead) else LMHead(head)


def _of_module(expected: str, found: torch.nn.Module) -> str:
    if hasattr(found, "base_layer"):  # peft's: its weight is the base's, without a word of the adapter
        made = "LMHead(head.base_layer.weight + head.get_delta_weight(name))"
        return f"{expected}, found {type(found).__name__} with an adapter, which its weight leaves out; {made} has it"
    return f"{expected}, found {type(found).__name__}; LMHead(head.weight, head.bias) makes one"


def _check_tokens(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    workspace_bytes: int | None,
) -> None:
    """The checks that need no values of tensors."""
    check_tensor("hidden", hidden, ("N", weight.shape[1]), None, weight.device)
    if hidden.dtype != weight.dtype:
        expected, found = short_name(weight.dtype), short_name(hidden.dtype)
        way_out = "; pass LMHead(weight.to(hidden.dtype))" if hidden.dtype in FLOAT_DTYPES else ""
        raise TypeError(f"hidden: expected dtype {expected}, as head.weight, found {found}{way_out}")
    check_tensor("targets", targets, (hidden.shape[0],), (torch.int64,), hidden.device)
    if workspace_bytes is not None:
        check_int("workspace_bytes", workspace_bytes, "an int")
        if not 0 < workspace_bytes < 2**63:
            raise ValueError(f"workspace_bytes: expected a number of bytes > 0, found {workspace_bytes}")
    inputs = {"hidden": hidden, "head.weight": weight, "head.bias": bias}
    refuse_tangents(**inputs)
    refuse_function_transforms("use torch.autograd.grad", **inputs)
