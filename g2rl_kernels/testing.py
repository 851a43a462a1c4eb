"""Inputs, shapes and error bounds for the head ops, shared by tests and benchmarks.

Oracles are float64 on the very same (rounded) inputs. Bounds hold for each response and token by itself, so that one
wrong response cannot hide behind many right ones. N tokens, d hidden, V vocab, B responses, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from g2rl_kernels.backends import reference
from g2rl_kernels.dispatch import BACKENDS, OPS, backend_number, resolve, use_backend
from g2rl_kernels.ops.head import LMHead, token_logprobs
from g2rl_kernels.records import Gradients, Head, Responses, SequenceFeatures, TokenLogprobs

# The numerics contract. Phi: relative error and 1 - cosine of each response. logp: every token must meet both.
PHI_RELATIVE = 1e-5
PHI_COSINE = 1e-9
LOGP_ABSOLUTE = 1e-5
LOGP_RELATIVE = 1e-4
ENTROPY_ABSOLUTE = 1e-5
# The gradient of the entropy needs H as exact as log p for confident tokens, where both are small: `oracle_gradients`.
ENTROPY_RELATIVE = 1e-4

# Half a unit in the last place, relative: what rounding to a dtype may change.
ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}

LARGEST_LOGIT = 120.0


class Shape(NamedTuple):
    """Sizes of a head problem.

    Attributes:
        lengths: tokens of each response; N is their sum.
        d, V: hidden size and vocabulary.
        reason: what goes wrong elsewhere and not here.
    """

    lengths: tuple[int, ...]
    d: int
    V: int
    reason: str

    @property
    def N(self) -> int:
        return sum(self.lengths)


# The vocabularies of SmolLM2 (49152), GPT-2 (50257) and Qwen3 (151936) leave 0, 81 and 384 modulo 1024, as 1024, 1105
# and 1408 do, and with that the same remainders modulo every smaller power of two, which tile sizes are.
HEAD_SHAPES = (
    Shape((), 16, 64, "no responses"),
    Shape((0,), 16, 64, "no tokens, one empty response"),
    Shape((1,), 64, 1024, "a single token, nothing ragged: 49152"),
    Shape((3, 2), 1, 1, "a vocabulary of one: p = 1, H = 0, Phi = 0"),
    Shape((2, 1), 1, 2, "the smallest problem with a choice"),
    Shape((5, 0, 1, 17, 0), 63, 1105, "N = 23 prime, odd d, empty first-class and last, one token: 50257"),
    Shape((16, 1, 15), 96, 1408, "responses end on and off tile edges of 16 and 32: 151936"),
    Shape((67, 64), 129, 257, "N = 131 prime, one above tiles of 128 in d and of 256 in V, 64 exactly"),
    Shape((1,) * 37, 33, 130, "more responses than a tile has rows, each of one token"),
)
# One shape for tests that vary something else: ragged in everything.
SMALL = Shape((5, 0, 9, 1, 8), 63, 1105, "N = 23 prime, odd d, ragged V, an empty and a one-token response")


class Options(NamedTuple):
    """How logits become u = z / T: the fields of `LMHead`, with the bias by its dtype ("weight" for weight's own)."""

    bias: str | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None


OPTIONS = {
    "plain": Options(),
    "bias": Options(bias="weight"),
    "bias-fp32": Options(bias="float32"),
    "temperature": Options(temperature=0.7),
    "logit-scale": Options(logit_scale=-1.25),
    "softcap": Options(softcap=6.0),
    "together": Options(bias="float32", temperature=1.3, logit_scale=0.8, softcap=8.0),
}

KINDS = ("random", "peaked", "flat", "bias+", "bias-", "hidden+", "hidden-", "drawn", "spread")


@dataclass(frozen=True, eq=False)
class HeadSample:
    """Inputs of the head ops."""

    hidden: Tensor
    head: LMHead
    targets: Tensor
    cu_seqlens: Tensor
    token_weights: Tensor

    @property
    def options(self) -> tuple[float, float, float]:
        """temperature, logit_scale and softcap as ops take them."""
        return self.head.options

    @property
    def record(self) -> Head:
        """The head as backends take it."""
        return Head(self.head.weight, self.head.bias, *self.options)


def head_sample(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    kind: str = "random",
    options: Options | None = None,
    seed: int = 0,
) -> HeadSample:
    """Inputs with random token weights, a quarter of them 0; the same values on every device.

    Args:
        kind: what the logits look like.
            "random": standard deviation 2.
            "peaked": 1 - p_y falls from 0.9 for the first token to 1e-6 for the last, by moving hidden towards W[y].
            "flat": near zero, exactly zero for the first token.
            "bias+", "bias-": all near +120 or -120, through the bias.
            "hidden+", "hidden-": all near +120 or -120, through a direction common to hidden and weight.
            "drawn": all near +30, through the bias, for tokens that are alike, with targets that the model draws: of
                many tokens Phi is what is left of large sums.
            "spread": standard deviation 16, with targets that the model draws: a few words have all of p, and what
                their logits are rounded by, Phi is off by.
        options: of the head; None for a plain one.
    """
    options = options or Options()
    random = torch.Generator().manual_seed(seed)
    N, d, V = shape.N, shape.d, shape.V
    weight = torch.randn(V, d, generator=random) * (2 / d**0.5)
    hidden = torch.randn(N, d, generator=random)
    bias = torch.randn(V, generator=random)
    targets = torch.randint(0, V, (N,), generator=random)
    cu_seqlens = F.pad(torch.tensor(shape.lengths, dtype=torch.int64).cumsum(0), (1, 0)).to(torch.int32)
    token_weights = torch.rand(N, generator=random)
    token_weights *= torch.rand(N, generator=random) > 0.25
    # Every response keeps some weight: one of zeros is a case of its own, not one of chance.
    first_tokens = cu_seqlens[:-1][cu_seqlens.diff() > 0].long()
    token_weights[first_tokens] += 0.1

    sign = -1 if kind.endswith("-") else 1
    has_bias = options.bias is not None or kind.startswith("bias") or kind == "drawn"
    bias_dtype = dtype if options.bias in (None, "weight") else getattr(torch, options.bias)
    if kind.startswith("bias"):
        # Logits deviate from the offset by 8 at most, as their standard deviation is 2.
        bias = bias * 0.1 + sign * (LARGEST_LOGIT - 8)
    elif kind.startswith("hidden"):
        # |W_v - common| = 2 and |common| = 10: logits deviate from the offset with a standard deviation of 2 to 3.
        common = F.normalize(torch.randn(d, generator=random), dim=0) * 10
        weight, hidden = weight + common, hidden / 4 + sign * common
    elif kind == "flat":
        hidden = hidden * 1e-3
        hidden[:1] = 0
    elif kind == "spread":
        weight = weight * 8
    elif kind == "drawn":
        hidden, bias = hidden[:1] + 0.3 * hidden, bias * 0.1 + 30
    elif kind not in ("random", "peaked"):
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, found {kind!r}")

    head = LMHead(
        weight.to(device, dtype),
        bias.to(device, bias_dtype) if has_bias else None,
        options.temperature,
        options.logit_scale,
        options.softcap,
    )
    if kind == "peaked":
        hidden = _moved_towards_targets(hidden, head, targets)
    elif kind in ("drawn", "spread"):
        z = hidden.to(dtype).double() @ weight.to(dtype).double().T
        z = z + bias.to(bias_dtype).double() if has_bias else z
        targets = torch.multinomial(logits_from_raw(z, head).softmax(1), 1, generator=random)[:, 0]
    return HeadSample(
        hidden.to(device, dtype), head, targets.to(device), cu_seqlens.to(device), token_weights.to(device)
    )


def _moved_towards_targets(hidden: Tensor, head: LMHead, targets: Tensor) -> Tensor:
    """hidden + x W[y] with x such that 1 - p_y falls from 0.9 to 1e-6 along the tokens, found by bisection."""
    # In float64, whose products are the same from every library once they are rounded: so are the samples.
    weight = head.weight.cpu().double()
    bias = None if head.bias is None else head.bias.cpu().float()
    wanted = 0.9 * (1e-6 / 0.9) ** torch.linspace(0, 1, max(hidden.shape[0], 2))[: hidden.shape[0]]
    moved = hidden.clone()
    for rows in torch.arange(hidden.shape[0]).split(64):
        y = targets[rows, None]
        direction = weight[targets[rows]] * (1 if head.logit_scale > 0 else -1)
        z, slope = ((x @ weight.T).float() for x in (hidden[rows].double(), direction))
        if bias is not None:
            z = z + bias
        low = torch.zeros(rows.shape[0], 1)
        high = 1e3 / slope.gather(1, y).abs()
        for _ in range(40):
            x = (low + high) / 2
            log_p = logits_from_raw(z + x * slope, head).log_softmax(1).gather(1, y)
            enough = -torch.expm1(log_p) < wanted[rows, None]
            low, high = torch.where(enough, low, x), torch.where(enough, x, high)
        moved[rows] += high * direction.float()
    return moved


def logits_from_raw(z: Tensor, head: LMHead) -> Tensor:
    """u = z / T from W h + b, in plain PyTorch."""
    z = z * head.logit_scale
    if head.softcap is not None:
        # tanh in a form whose derivative keeps its digits where it is tiny: autograd's 1 - tanh^2 has none at x = 20.
        sign = torch.where(z >= 0, 1.0, -1.0)
        e = torch.exp(-2 * sign * z / head.softcap)
        z = head.softcap * sign * (1 - e) / (1 + e)
    return z / head.temperature


def oracle(sample: HeadSample) -> SequenceFeatures:
    """What `sequence_features` should return, in float64."""
    head, responses = sample.record, Responses(sample.cu_seqlens, sample.token_weights.double())
    exact = replace(head, weight=head.weight.double(), bias=None if head.bias is None else head.bias.double())
    return reference.sequence_features(sample.hidden.double(), exact, sample.targets, responses)


def accumulation_error(sample: HeadSample) -> Tensor:
    """What fp32 sums inside the product W h may change of each token's logits u [N], beyond the contract's allowance.

    A sum of d terms rounds d times, each time by up to 2^-24 of its partial sum. Partial sums that grow evenly to |z|
    have a mean square of z^2 / 3, and a rounding error has a mean square of a third of its largest: the standard
    deviation is 2^-24 |z| sqrt(d) / 3, and three of them are allowed. A unit that sums term by term in fp32 does no
    better; blocked sums stay well below.
    """
    head, d = sample.head, sample.hidden.shape[1]
    u = (sample.hidden.double() @ head.weight.double().T) * (head.logit_scale / head.temperature)
    return ROUNDOFF[torch.float32] * d**0.5 * u.abs().amax(1)


def assert_bounds(
    result: SequenceFeatures | TokenLogprobs,
    expected: SequenceFeatures,
    cu_seqlens: Tensor | None = None,
    logit_error: Tensor | None = None,
    few_words: bool = False,
) -> None:
    """Hold results to the numerics contract, each response and token by itself.

    Args:
        result: features are checked where it has them.
        expected: from `oracle`.
        cu_seqlens: for messages, the length of a failing response.
        logit_error: [N], an absolute error of logits that no backend can avoid; added to the bounds of logps, entropy
            and lse. Features keep theirs: independent errors of logits average out over the vocabulary.
        few_words: they do not, since two words of each token have nearly all of p: the error of the difference of their
            logits is a relative one of the feature.

    Raises:
        AssertionError: names the first failing response or token of each quantity, its error and the bound.
    """
    unavoidable = torch.zeros_like(expected.logps) if logit_error is None else logit_error
    problems: list[str] = []

    def check(what: str, error: Tensor, bound: Tensor | float, unit: str) -> None:
        # NaN compares false, so that it fails.
        failing = ~(error <= bound)
        if bool(failing.any()):
            i = int(failing.nonzero()[0])
            limit = bound if isinstance(bound, float) else float(bound[i])
            where = f"{unit} {i}"
            if unit == "response" and cu_seqlens is not None:
                where += f" of {int(cu_seqlens[i + 1] - cu_seqlens[i])} tokens"
            count = int(failing.sum())
            problems.append(
                f"{what}: {where} is off by {float(error[i]):.3g} > {limit:.3g} ({count} of {len(error)} fail)"
            )

    logps, entropy = result.logps.double(), result.entropy.double()
    error = (logps - expected.logps).abs()
    check("logp, absolute", error, LOGP_ABSOLUTE + unavoidable, "token")
    # A relative error of log p near 1 is one of 1 - p_y, to which an error of logits passes unchanged.
    relative = (LOGP_RELATIVE + unavoidable) * expected.logps.abs()
    # The oracle subtracts lse from a logit, and has rounded both.
    rounding = torch.finfo(torch.float64).eps * expected.lse.abs()
    check("logp, relative", error, torch.where(expected.logps == 0, 0.0, relative) + rounding, "token")
    check("logp <= 0", logps.clamp(min=0), 0.0, "token")
    error = (entropy - expected.entropy).abs()
    check("entropy, absolute", error, ENTROPY_ABSOLUTE + unavoidable, "token")
    error = (result.lse.double() - expected.lse).abs()
    # lse is a fp32 number: half a unit in its last place is the least that it can be off.
    check("lse, absolute", error, LOGP_ABSOLUTE + unavoidable + ROUNDOFF[torch.float32] * expected.lse.abs(), "token")
    if isinstance(result, SequenceFeatures):
        features = result.features.double()
        length = expected.features.norm(dim=1)
        error = (features - expected.features).norm(dim=1)
        # Where Phi is 0: a kernel may count what it masks as fp32's smallest normal number, 1.2e-38, each.
        of_words = 2**0.5 * float(unavoidable.amax()) if few_words else 0.0
        bound = torch.where(length > 0, PHI_RELATIVE + of_words, 1e-34)
        check("Phi, relative", torch.where(length > 0, error / length, error), bound, "response")
        cosine = F.cosine_similarity(features, expected.features, dim=1, eps=1e-300)
        check("Phi, 1 - cosine", torch.where(length > 0, 1 - cosine, 0), PHI_COSINE + of_words**2 / 2, "response")
    if problems:
        raise AssertionError("\n".join(problems))


def gradients(
    sample: HeadSample, grad_logps: Tensor, grad_entropy: Tensor, workspace_bytes: int | None = None
) -> Gradients:
    """Of hidden, weight and bias, as `token_logprobs` makes them from those of logps and entropy, [N]."""
    hidden, weight = (x.detach().requires_grad_() for x in (sample.hidden, sample.head.weight))
    bias = None if sample.head.bias is None else sample.head.bias.detach().requires_grad_()
    head = replace(sample.head, weight=weight, bias=bias)
    out = token_logprobs(hidden, head, sample.targets, workspace_bytes=workspace_bytes)
    torch.autograd.backward((out.logps, out.entropy), (grad_logps, grad_entropy))
    return Gradients(hidden.grad, weight.grad, None if bias is None else bias.grad)


def oracle_gradients(sample: HeadSample, grad_logps: Tensor, grad_entropy: Tensor) -> tuple[Gradients, Gradients]:
    """Gradients by autograd through plain float64 logits, and the error allowed for each entry.

    The bound follows a backward pass as it must be made: G, the gradient of W h + b, is computed in fp32 from
    recomputed logits, rounded once to the model's dtype, and multiplied by W or h with fp32 sums; the result is rounded
    to its dtype. `_evaluation_error` is that of G before it is rounded.

    - Rounding adds ROUNDOFF[dtype] of each entry. fp16 has few exponents, and a scale for each row of G (for weight and
      bias: for all of G) is what keeps small entries: 2^-24 of the largest is lost.
    - These errors are independent between entries: a sum over K of them is off by their root of squares, times four.
      What an error of lse does to all p_v of a token alike is added as it is.
    - A fp32 sum of K terms of random sign adds 2^-24 sqrt(K) of the same root.
    """
    head, dtype, y = sample.head, sample.hidden.dtype, sample.targets[:, None]
    h, W = (x.detach().to(torch.float64, copy=True).requires_grad_() for x in (sample.hidden, head.weight))
    b = None if head.bias is None else head.bias.detach().to(torch.float64, copy=True).requires_grad_()
    raw = F.linear(h, W, b)
    log_p = logits_from_raw(raw, head).log_softmax(1)
    logps, entropy = log_p.gather(1, y)[:, 0], -(log_p.exp() * log_p).sum(1)
    loss = (grad_logps.double() * logps).sum() + (grad_entropy.double() * entropy).sum()
    G, *exact = torch.autograd.grad(loss, [raw, h, W, *([] if b is None else [b])])

    h, W = h.detach(), W.detach()
    error = _evaluation_error(sample, raw.detach(), log_p.detach(), G, grad_logps, grad_entropy)
    error += ROUNDOFF[dtype] * G.abs()
    lost = 2.0**-24 if dtype == torch.float16 else 0.0
    by_row = error + lost * G.abs().amax(1, keepdim=True)
    overall = error + lost * (G.abs().max() if G.numel() else 0.0)

    def product(error: Tensor, a: Tensor, b: Tensor) -> Tensor:
        sums = ROUNDOFF[torch.float32] * a.shape[1] ** 0.5
        return 4 * ((error + sums * a.abs()).square() @ b.square()).sqrt()

    alike = 1e-5 * (G.scatter(1, y, 0) @ W).abs()
    allowed = [product(by_row, G, W) + alike, product(overall.T, G.T, h)]
    if head.bias is not None:
        allowed.append(product(overall.T, G.T, h.new_ones(h.shape[0], 1))[:, 0])
    for bound, grad, out in zip(allowed, exact, (sample.hidden, head.weight, head.bias), strict=False):
        rounded = dtype if out is None else out.dtype
        bound += ROUNDOFF[rounded] * grad.abs() + (2.0**-25 if rounded == torch.float16 else 0.0)
    return Gradients(*exact), Gradients(*allowed)


def _evaluation_error(
    sample: HeadSample, raw: Tensor, log_p: Tensor, G: Tensor, grad_logps: Tensor, grad_entropy: Tensor
) -> Tensor:
    """What fp32 may get wrong in each entry of G = slope (g_logp (e_y - p) - g_H p (log p + H)) [N, V].

    log p_v is off by 1e-5 at most (the contract's bound of log p), so p_v by 1e-5 of itself. For the target, log p_y
    and H are also exact to 1e-4 of themselves where p_y > 1/2: 1 - p_y = -expm1(log p_y) and log p_y + H keep their
    digits. The slope of the soft cap is off by 1e-5 of itself, as the bound of Phi asks for.
    """
    head, y, p = sample.head, sample.targets[:, None], log_p.exp()
    H, log_p_y = -(p * log_p).sum(1, keepdim=True), log_p.gather(1, y)
    g, g_H = grad_logps.double()[:, None], grad_entropy.double()[:, None]
    slope = torch.full_like(raw, abs(head.logit_scale) / head.temperature)
    if head.softcap is not None:
        slope /= torch.cosh(raw * (head.logit_scale / head.softcap)).square()
    confident = log_p_y.exp() > 0.5
    delta_H = torch.where(confident, (ENTROPY_RELATIVE * H).clamp(max=ENTROPY_ABSOLUTE), ENTROPY_ABSOLUTE)
    delta_y = torch.where(confident, (LOGP_RELATIVE * -log_p_y).clamp(max=LOGP_ABSOLUTE), LOGP_ABSOLUTE)
    rest = LOGP_ABSOLUTE * (g + g_H * (log_p + H)).abs() + g_H.abs() * (LOGP_ABSOLUTE + delta_H)
    target = (g.abs() + g_H.abs() * ((log_p_y + H).abs() + 1)) * delta_y + g_H.abs() * delta_H
    return slope * (p * rest).scatter(1, y, log_p_y.exp() * target) + PHI_RELATIVE * G.abs()


def assert_gradients(result: Gradients, exact: Gradients, allowed: Gradients) -> None:
    """Hold gradients to the bounds of `oracle_gradients`; None in `result` is not checked.

    Where an exact gradient is beyond the result's dtype, infinity of its sign is right.

    Raises:
        AssertionError: names the tensor, its worst entry, the error and the bound.
    """
    for name, got, want, bound in zip(Gradients._fields, result, exact, allowed, strict=True):
        if got is None or want is None or bound is None:
            continue
        assert got.shape == want.shape, (
            f"gradient of {name}: expected shape {list(want.shape)}, found {list(got.shape)}"
        )
        largest = torch.finfo(got.dtype).max
        beyond = (want.abs() + bound > largest) & (got.isinf() & (got.sign() == want.sign()))
        excess = torch.where(beyond, 0, (got.double() - want).abs() - bound)
        failing = ~(excess <= 0)
        if bool(failing.any()):
            i = int(torch.where(failing, torch.nan_to_num(excess / bound, nan=torch.inf), -1).argmax())
            at = list(torch.unravel_index(torch.tensor(i), got.shape))
            raise AssertionError(
                f"gradient of {name}: entry {[int(x) for x in at]} is {float(got.flatten()[i]):.6g}, expected "
                f"{float(want.flatten()[i]):.6g} within {float(bound.flatten()[i]):.3g} ({int(failing.sum())} of "
                f"{failing.numel()} entries fail)"
            )


def available_backends(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, ops: tuple[str, ...] = OPS
) -> list[str]:
    """Names of the backends that serve all of `ops` on this device and dtype here, fastest first."""
    names = []
    for backend in BACKENDS:
        with use_backend(backend.name):
            try:
                found = [resolve(op, torch.device(device), dtype) for op in ops]
            except RuntimeError:
                continue
        if all(BACKENDS[backend_number(run)] == backend for run in found):  # ops that it lacks fall to others
            names.append(backend.name)
    return names
