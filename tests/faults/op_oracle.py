"""What is to come of a drawn call: a named error, or what another backend finds in float64, within derived bounds."""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from g2rl_kernels import (
    LMHead,
    exploration_scores,
    g2rl_advantages,
    group_advantages,
    pad,
    shape_rewards,
    unpad,
    use_backend,
)
from g2rl_kernels.testing import ENTROPY_ABSOLUTE, LOGP_ABSOLUTE, PHI_RELATIVE, ROUNDOFF
from tests.faults.op_calls import NAMED_ERRORS, Call, head_gradients

GROUP_BOUND = 5e-6
"""Groups are computed in float64 and rounded once; but scores are square roots of what cancels to 1e-16, and shaping
divides them by `min_range`."""
ILL_CONDITIONED = 1e-6
"""A smaller `min_range` asks to stretch what rounding left of equal scores."""
LARGEST_SUM = 1e29
"""Of products W h: kernels take less than -1e30 for no logit at all, and fp32 ends at 3e38."""
RUNS_WHILE_CHANGING = 4
UNSTEADY = 0.1
"""An error of logits beyond this says nothing of gradients: exp(u - lse) has no digits, at logits of 1e5 and more."""
FP32_EXPONENTS = 88.0
"""exp of more is infinite in fp32."""
PACKING = (pad, unpad)
FAR_OFF = 20.0
"""A given lse that is further from the right one leaves GPU kernels without results."""


def judge(call: Call, backend: str | None) -> str | None:
    """What is wrong with the outcome of the call; None if nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if call.changing:
                with changing(call.arguments[call.changing]), use_backend(backend):
                    for _ in range(RUNS_WHILE_CHANGING):
                        call.run()
                return None
            with use_backend(backend):
                found = call.run()
        except NAMED_ERRORS as error:
            return wrong_error(call, error)
        except Exception as error:
            if str(error).startswith(f"backend {backend!r} cannot run "):  # asked for by name, it says what it lacks
                return None
            return f"raised {type(error).__name__}: {_first_line(error)}"
        try:
            with use_backend("torch" if backend == "reference" else "reference"):
                expected = in_float64(call).run() if call.op not in PACKING else by_indexing(call)
        except Exception as error:
            return f"was accepted, and in float64 raised {type(error).__name__}: {_first_line(error)}"
    if backend == "triton" and _far_off(call, expected):
        return None
    return wrong_result(call, found, expected)


def _far_off(call: Call, expected: Any) -> bool:
    given = call.arguments.get("lse")
    return given is not None and not bool(((given.double() - expected.lse).abs() <= FAR_OFF).all())


def by_indexing(call: Call) -> Any:
    """What `pad` and `unpad` are to return."""
    mask = call.arguments["mask"].bool()
    if call.op is unpad:
        ends = mask.sum(1).cumsum(0)
        return call.arguments["tensor"][mask], torch.cat([ends.new_zeros(1), ends]).int()
    packed = call.arguments["packed"]
    padded = torch.full((*mask.shape, *packed.shape[1:]), float(call.arguments["value"]), dtype=torch.float64)
    kind = packed.dtype if packed.dtype.itemsize > 1 else torch.float32  # float8 cannot be filled
    padded = padded.to(packed.dtype).to(kind)
    padded[mask] = packed.detach().to(kind)
    return padded.to(packed.dtype)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "without a message").splitlines()[0]


def wrong_error(call: Call, error: Exception) -> str | None:
    """None if there was something to refuse and the message begins with the name of an argument."""
    message = _first_line(error)
    if not call.twists and not call.changing:
        return f"refused a right call: {message}"
    names = {part for name in call.tensors() for part in (name, name.partition(".")[0])}
    named = re.match(r"[a-z_.]+(?=: expected)", message)
    if named is None or named[0] not in names:
        return f"raised {type(error).__name__} without the argument's name: {message}"
    return None


@contextmanager
def changing(tensor: Tensor) -> Iterator[None]:
    """Another thread writes wild values into the tensor, and its own back, as fast as it can."""
    raw = tensor.contiguous().view(-1)
    if raw.data_ptr() != tensor.data_ptr() or raw.numel() == 0:
        yield
        return
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[raw.element_size()]
    memory = raw.view(bits).numpy() if raw.dtype != torch.bool else raw.numpy()
    kept, done = memory.copy(), threading.Event()
    wild = (-1, -(2**13), 2**14) if raw.dtype != torch.bool else (False, True)

    def write() -> None:
        while not done.is_set():
            for value in wild:
                memory[:] = value if bits != torch.uint8 else value % 2
                memory[:] = kept

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)


def in_float64(call: Call) -> Call:
    """The same call with plain tensors of the same values in float64; what an op rounds first, it still rounds."""
    rounded = {exploration_scores: "similarity", shape_rewards: "scores", g2rl_advantages: "features"}.get(call.op)
    arguments = dict(call.arguments)
    if rounded is not None:
        arguments["rewards"] = arguments["rewards"].to(arguments[rounded].dtype)
    elif call.op is group_advantages and arguments["rewards"].dtype != torch.float64:
        arguments["rewards"] = arguments["rewards"].float()
    head = None if call.head is None else {name: _double(value) for name, value in call.head.items()}
    return replace(call, arguments={name: _double(value) for name, value in arguments.items()}, head=head)


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device.type == "meta":
        return value
    value = value.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    return value.double() if value.is_floating_point() else value


def wrong_result(call: Call, found: Any, expected: Any) -> str | None:
    """The first result that is not what it should be."""
    found, expected = _tensors(found), _tensors(expected)
    for name, got, want in zip(_names(call, len(found)), found, expected, strict=True):
        if got.shape != want.shape:
            return f"{name}: expected shape {list(want.shape)}, found {list(got.shape)}"
    if any(x.device.type == "meta" for x in found):
        return None
    if call.op in PACKING:
        same = all(
            got.dtype == want.dtype and torch.allclose(_numbers(got), _numbers(want), 0, 0, equal_nan=True)
            for got, want in zip(found, expected, strict=True)
        )
        return None if same else "not what indexing with the mask gives"
    allowed = (
        _allowed_of_gradients(call, expected)
        if call.op is head_gradients
        else _allowed_of_head(call, expected)
        if call.head is not None
        else _allowed_of_groups(call, expected)
    )
    for name, got, want, bound in zip(_names(call, len(found)), found, expected, allowed, strict=True):
        wrong = ~_agrees(got, want, bound)
        if bool(wrong.any()):
            at = tuple(int(i) for i in wrong.nonzero()[0])
            values = [float(x[at]) for x in (got, want, bound)]
            return "{}{} is {:.8g}, expected {:.8g} within {:.2g}".format(name, list(at), *values)
    return None


def _numbers(x: Tensor) -> Tensor:
    x = x.detach().dequantize() if x.is_quantized else x.detach()
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _names(call: Call, count: int) -> list[str]:
    return [f"result {i}" if count > 1 else "result" for i in range(count)]


def _agrees(got: Tensor, want: Tensor, bound: Tensor) -> Tensor:
    """Where the two agree. What is not finite in float64, or beyond the result's dtype, is not finite."""
    got = got.detach().double()
    beyond = ~want.isfinite() | (want.abs() + bound > torch.finfo(torch.float32).max)
    return ((got - want).abs() <= bound) | (beyond & ~got.isfinite()) | bound.isinf()


def _allowed_of_head(call: Call, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The contract, and what an error of the logits that fp32 sums cannot avoid does to each result."""
    *features, logps, entropy, lse = expected
    delta, _ = _error_of_logits(call)
    bounds = (
        LOGP_ABSOLUTE + 2 * delta + 1e-6 * logps.abs(),
        ENTROPY_ABSOLUTE + 20 * delta,
        LOGP_ABSOLUTE + delta + 2 * ROUNDOFF[torch.float32] * lse.abs(),
    )
    bounds = tuple(torch.where(bound.isnan(), torch.inf, bound) for bound in bounds)
    return (_allowed_of_features(call, features[0], delta), *bounds) if features else bounds


def _error_of_logits(call: Call) -> tuple[Tensor, Tensor]:
    """[N] of u = z / T, infinite where fp32 cannot hold it; and the logits u [N, V], in float64."""
    head = LMHead(**in_float64(call).head or {})
    h, W = call.arguments["hidden"].detach().double(), head.weight
    raw, most = h @ W.T, h.abs() @ W.abs().T
    if head.bias is not None:
        raw, most = raw + head.bias, most + head.bias.abs()
    temperature, scale, cap = head.options
    slope = abs(scale) / temperature
    unit = 2 * ROUNDOFF[torch.float32]
    delta = unit * (W.shape[1] ** 0.5 + 4) * most.amax(1) * slope
    u = raw * scale
    if cap:
        u = cap * torch.tanh(u / cap)
        delta = torch.minimum(delta, torch.full_like(delta, 2 * cap / temperature)) + unit * cap / temperature
    beyond = ~(most.amax(1) * max(1.0, slope, slope * temperature / cap if cap else 0) < LARGEST_SUM)
    return torch.where(beyond, torch.inf, delta), u / temperature


def _allowed_of_features(call: Call, features: Tensor, delta: Tensor) -> Tensor:
    arguments = in_float64(call).arguments
    N, offsets = delta.shape[0], arguments["cu_seqlens"].tolist()
    a = torch.ones(N, dtype=torch.float64) if arguments.get("token_weights") is None else arguments["token_weights"]
    head = LMHead(**in_float64(call).head or {})
    row = head.weight.norm(dim=1).max() * abs(head.logit_scale)
    of_token = 2 * row * (torch.expm1(2 * delta).clamp(max=1) + 2e-6)
    # Kernels may find no number at all where an error of logits spans fp32's exponents, at logits beyond 1e9.
    of_token = torch.where(delta > FP32_EXPONENTS, torch.inf, of_token)
    bound = torch.empty_like(features)
    for b, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        total = a[start:end].sum()
        part = (a[start:end] * of_token[start:end]).sum() / total if float(total) else delta.new_zeros(())
        bound[b] = PHI_RELATIVE * features[b].norm() + part
    return torch.where(bound.isnan(), torch.inf, bound)


def _allowed_of_gradients(call: Call, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A share of the sums of absolute values, of which the gradients are sums."""
    exact, arguments = in_float64(call), in_float64(call).arguments
    head, h = LMHead(**exact.head or {}), arguments["hidden"]
    delta, u = _error_of_logits(call)
    log_p = u.log_softmax(1)
    p, y = log_p.exp(), arguments["targets"][:, None]
    H = -(p * torch.where(p > 0, log_p, 0)).sum(1, keepdim=True)
    g, g_H = (arguments[name].double().abs()[:, None] for name in ("grad_logps", "grad_entropy"))
    M = p * (g + g_H * (torch.where(p > 0, log_p.abs(), 0) + H))
    M = M.scatter_add(1, y, g * -torch.expm1(log_p.gather(1, y))) * abs(head.logit_scale) / head.temperature
    dtype = call.arguments["hidden"].dtype
    share = (4 * ROUNDOFF[dtype] + 1e-4 + 8 * delta.clamp(max=1))[:, None]
    share = torch.where((delta > UNSTEADY)[:, None], torch.inf, share)
    coefficient = (g + g_H * (log_p.abs().amax(1, keepdim=True) + H)) * abs(head.logit_scale) / head.temperature
    share = torch.where(coefficient > torch.finfo(torch.float32).max, torch.inf, share)
    lost = 2.0**-22 * float(M.max()) if dtype == torch.float16 and M.numel() else 0.0
    E = share * M + lost
    bounds = [E @ head.weight.abs(), E.T @ h.abs()] + ([] if head.bias is None else [E.sum(0)])
    smallest = 1e-7 if dtype == torch.float16 else 1e-37
    largest = torch.finfo(dtype).max
    allowed = []
    for bound, want in zip(bounds, expected, strict=True):
        bound = torch.where(bound.isnan(), torch.inf, bound + smallest)
        allowed.append(torch.where(want.abs() + bound > largest, torch.inf, bound))
    return tuple(allowed)


def _allowed_of_groups(call: Call, expected: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    bounds = [GROUP_BOUND * (1 + want.abs()) for want in expected]
    if call.shaping is not None and call.shaping["min_range"] < ILL_CONDITIONED:
        for i in (0, 1) if call.op is g2rl_advantages else (0,):
            bounds[i] = torch.full_like(bounds[i], torch.inf)
    of_group = _group_of(call)
    for name in ("features", "scores", "similarity"):
        values = call.arguments.get(name)
        if values is None:
            continue
        finite = values.detach().isfinite().flatten(1).all(1) if values.dim() > 1 else values.isfinite()
        wild = set((~finite).nonzero()[:, 0].tolist() if name == "similarity" else of_group[~finite].tolist())
        for g in wild:
            for bound in bounds:
                bound[g if bound.dim() == 3 else of_group == g] = torch.inf
    return tuple(bounds)


def _group_of(call: Call) -> Tensor:
    """The group of each response [B]."""
    groups = call.arguments["groups"]
    values = call.arguments.get("features", call.arguments.get("rewards"))
    B = values.shape[0]
    cu_groups = groups.long() if isinstance(groups, Tensor) else torch.arange(0, B + 1, int(groups))
    return torch.repeat_interleave(torch.arange(cu_groups.shape[0] - 1), cu_groups.diff())
