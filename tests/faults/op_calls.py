"""Calls of the public ops with arguments drawn by hypothesis, right ones and broken ones, and what must come of them.

A call is drawn valid, and then up to two of its arguments are replaced or laid out in another way. The outcome is an
error of a documented type that names an argument, or the result that another backend finds in float64.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from g2rl_kernels import (
    LMHead,
    Shaping,
    exploration_scores,
    g2rl_advantages,
    group_advantages,
    group_similarity,
    pad,
    sequence_features,
    shape_rewards,
    token_logprobs,
    unpad,
    use_backend,
)

NAMED_ERRORS = (TypeError, ValueError, IndexError)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAR_BYTES = 9 << 30
"""Of address space, hardly any of it in memory: rows so far apart that 32 bits do not count to them."""


def head_gradients(
    hidden: Any, head: Any, targets: Any, grad_logps: Tensor, grad_entropy: Tensor
) -> tuple[Tensor | None, ...]:
    """Of hidden, weight and bias, by way of `token_logprobs`."""
    inputs = [hidden, head.weight, head.bias]
    leaves = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in inputs]
    of_leaves = replace(head, weight=leaves[1], bias=leaves[2])
    out = token_logprobs(leaves[0], of_leaves, targets)
    torch.autograd.backward((out.logps, out.entropy), (grad_logps.to(out.logps), grad_entropy.to(out.logps)))
    return tuple(x.grad for x in leaves if x is not None)


@dataclass
class Call:
    """An op, its arguments by name, and what was done to them.

    Attributes:
        head, shaping: fields of the records of that name, which are made when the op is called.
        twists: (argument, what was done to it).
    """

    op: Callable[..., Any]
    arguments: dict[str, Any]
    head: dict[str, Any] | None = None
    shaping: dict[str, Any] | None = None
    twists: list[tuple[str, str]] = field(default_factory=list)
    changing: str = ""

    def run(self) -> Any:
        """The op's result; records are made first, as a caller makes them."""
        arguments = dict(self.arguments)
        if self.head is not None:
            arguments["head"] = LMHead(**self.head)
        if self.shaping is not None:
            arguments["shaping"] = Shaping(**self.shaping)
        return self.op(**arguments)

    def tensors(self) -> dict[str, Any]:
        """Every argument, those of the head as head.weight and so on."""
        flat = dict(self.arguments)
        for record in ("head", "shaping"):
            for name, value in (getattr(self, record) or {}).items():
                flat[f"{record}.{name}"] = value
        return flat

    def put(self, name: str, value: Any) -> None:
        """Replace an argument, as `tensors` names it."""
        record, _, of_record = name.partition(".")
        (getattr(self, record) if of_record else self.arguments)[of_record or name] = value

    def __str__(self) -> str:
        described = ", ".join(f"{name}={_short(value)}" for name, value in self.tensors().items())
        done = "; ".join(f"{name}: {what}" for name, what in self.twists) or "as drawn"
        changing = f", {self.changing} changing" if self.changing else ""
        return f"{self.op.__name__}({described}) [{done}{changing}]"


def _short(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)[:60]
    if value.is_nested:
        return "a nested tensor"
    text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized and value.numel() <= 12:
        text += f"={value.flatten().tolist()}"
    return text


# What may be done to an argument. Each takes the argument and a generator, and returns what takes its place.

Twist = Callable[[Any, torch.Generator], Any]


def _sliced(x: Tensor, random: torch.Generator) -> Tensor:
    """Every second row of a larger tensor, and its inner columns: what lies between is NaN, or far out of range."""
    outer = _filler(x, [2 * n + 3 for n in x.shape])
    view = outer[tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)] if x.dim() == 1 else outer
    if x.dim() > 1:
        view = outer[(slice(1, 1 + 2 * x.shape[0], 2), *(slice(2, 2 + n) for n in x.shape[1:]))]
    view.copy_(x)
    return view


def _filler(x: Tensor, shape: list[int]) -> Tensor:
    if x.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    worst = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    return torch.full(shape, worst, dtype=x.dtype)


def _transposed(x: Tensor, random: torch.Generator) -> Tensor:
    """The same numbers, columns first in memory."""
    return x.T.contiguous().T if x.dim() == 2 else x.clone()


def _expanded(x: Tensor, random: torch.Generator) -> Tensor:
    """One row for all of them, by a stride of 0."""
    return x[:1].expand_as(x) if x.shape[0] else x


def _at_the_end(x: Tensor, random: torch.Generator) -> Tensor:
    """The last bytes of its storage, which starts with NaN."""
    outer = _filler(x, [x.numel() + 7])
    outer[7:].copy_(x.reshape(-1))
    return outer[7:].view(x.shape)


def _negated(x: Tensor, random: torch.Generator) -> Tensor:
    """A view whose numbers are negated when read."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype in (torch.float32, torch.float64) else x


_far: mmap.mmap | None = None


def _far_rows(x: Tensor, random: torch.Generator) -> Tensor:
    """Rows so far apart that the last one is 2^31 elements or more from the first."""
    global _far
    if x.shape[0] < 2:
        return x
    if _far is None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_NORESERVE
        _far = mmap.mmap(-1, FAR_BYTES, flags=flags)
    size = FAR_BYTES // x.element_size()
    storage = torch.frombuffer(_far, dtype=x.dtype, count=size)
    inner = x[0].numel()
    stride = (size - inner) // (x.shape[0] - 1)
    view = storage.as_strided(x.shape, (stride, *x[0].contiguous().stride()))
    view.copy_(x)
    return view


def _with_value(value: float) -> Twist:
    def put(x: Tensor, random: torch.Generator) -> Tensor:
        if x.numel() == 0 or (not x.is_floating_point() and not np.isfinite(value)):
            return x
        info = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
        x = x.clone()
        within = value if not np.isfinite(value) else min(max(value, info.min), info.max)
        x.view(-1)[int(torch.randint(x.numel(), (), generator=random))] = within
        return x

    return put


def _scaled(factor: float) -> Twist:
    return lambda x, random: (x.double() * factor).to(x.dtype)


def _last(value: Callable[[int], int]) -> Twist:
    """Change the last offset or target."""

    def put(x: Tensor, random: torch.Generator) -> Tensor:
        if x.numel() == 0:
            return x
        x = x.clone()
        x[-1] = max(torch.iinfo(x.dtype).min, min(torch.iinfo(x.dtype).max, value(int(x[-1]))))
        return x

    return put


def _shuffled(x: Tensor, random: torch.Generator) -> Tensor:
    return x[torch.randperm(x.shape[0], generator=random)]


def _in_between(x: Tensor, random: torch.Generator) -> Tensor:
    """An offset in the middle that is below 0, or beyond all memory."""
    if x.shape[0] < 3:
        return x
    x = x.clone()
    x[1] = -5 if torch.rand((), generator=random) < 0.5 else torch.iinfo(x.dtype).max
    return x


def _layout(make: Callable[[Tensor], Tensor]) -> Twist:
    def put(x: Tensor, random: torch.Generator) -> Any:
        try:
            return make(x)
        except (RuntimeError, TypeError, NotImplementedError):  # there is no such tensor of this dtype or shape
            return x

    return put


LAYOUTS: dict[str, Twist] = {
    "sliced": _sliced,
    "columns first": _transposed,
    "one row for all": _expanded,
    "end of its storage": _at_the_end,
    "negated when read": _negated,
    "far rows": _far_rows,
    "a Parameter": _layout(lambda x: torch.nn.Parameter(x, requires_grad=x.is_floating_point())),
}
KINDS: dict[str, Twist] = {
    "None": lambda x, random: None,
    "a list": lambda x, random: x.tolist(),
    "an array": lambda x, random: x.float().numpy() if x.is_floating_point() else x.numpy(),
    "a word": lambda x, random: "hidden",
    "a number": lambda x, random: 3,
    "an object": lambda x, random: object(),
    "sparse": _layout(lambda x: x.to_sparse()),
    "sparse rows": _layout(lambda x: x.to_sparse_csr()),
    "nested": _layout(lambda x: torch.nested.nested_tensor(list(x))),
    "of MKL-DNN": _layout(lambda x: x.to_mkldnn()),
    "quantised": _layout(lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)),
    "on meta": lambda x, random: x.to("meta"),
}
DTYPES: dict[str, Twist] = {
    f"of {str(dtype).removeprefix('torch.')}": (lambda x, random, dtype=dtype: x.to(dtype))
    for dtype in (
        *FLOATS,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
    )
}
SHAPES: dict[str, Twist] = {
    "one row more": lambda x, random: torch.cat([x, x[-1:] if x.shape[0] else x.new_zeros(1, *x.shape[1:])]),
    "one row less": lambda x, random: x[:-1],
    "no rows": lambda x, random: x[:0],
    "no columns": lambda x, random: x[..., :0],
    "flat": lambda x, random: x.reshape(-1),
    "one dimension more": lambda x, random: x[None],
    "a scalar": lambda x, random: x.new_ones(()),
    "turned": lambda x, random: x.T,
}
VALUES: dict[str, Twist] = {
    "a NaN": _with_value(torch.nan),
    "an inf": _with_value(torch.inf),
    "a -inf": _with_value(-torch.inf),
    "a huge number": _with_value(3e38),
    "a hugely negative number": _with_value(-3e38),
    "times 1e30": _scaled(1e30),
    "times 1e-30": _scaled(1e-30),
    "all equal": lambda x, random: torch.ones_like(x),
}
INTEGERS: dict[str, Twist] = {
    "one further": _last(lambda last: last + 1),
    "one less": _last(lambda last: last - 1),
    "far below": _last(lambda last: -(2**62)),
    "far beyond": _last(lambda last: 2**62),
    "beyond 32 bits": _last(lambda last: 2**32 + last),
    "as padding": _last(lambda last: -100),
    "shuffled": _shuffled,
    "wild in the middle": _in_between,
}
NUMBERS: dict[str, Any] = {
    str(value): value
    for value in (
        None,
        0,
        0.0,
        -1,
        -0.5,
        True,
        float("nan"),
        float("inf"),
        1e-300,
        1e300,
        1e-38,
        1e39,
        1e-10,
        1e10,
        2**70,
        "1.0",
        [1.0],
        1j,
        np.float32(0.7),
        np.float64(2.0),
    )
} | {"a tensor": torch.tensor(0.7), "tensors": torch.tensor([0.7, 0.7]), "an object": object()}
COUNTS: dict[str, Any] = {
    str(value): value
    for value in (
        None,
        0,
        -1,
        1,
        7,
        1000,
        2**31,
        2**63 - 1,
        2**63,
        2**70,
        1.5,
        "8",
        True,
        [8],
        np.int64(64),
        float("nan"),
    )
}
WORDS: dict[str, Any] = {
    "unknown": "mean",
    "None": None,
    "a number": 3,
    "a list": ["std"],
    "another case": "STD",
    "bytes": b"std",
    "an object": object(),
}
NUMERIC = ("temperature", "logit_scale", "softcap", "strength", "clip", "min_range", "value")
COUNTED = ("workspace_bytes", "groups")
WORDED = ("normalize", "rule", "uniform_groups")


def _twists(name: str, value: Any) -> list[tuple[str, Callable[[torch.Generator], Any]]]:
    """What may be done to this argument, and how often: right tensors laid out otherwise are half of it."""
    if isinstance(value, Tensor):
        values = VALUES if value.is_floating_point() else INTEGERS
        tables = [LAYOUTS] * 3 + [values] * 2
        if not name.startswith("grad_"):  # the results' own gradients are checked by PyTorch
            tables += [KINDS, DTYPES, SHAPES]
        return [(what, lambda random, f=f: f(value, random)) for table in tables for what, f in table.items()]
    last = name.rpartition(".")[2]
    choices = NUMBERS if last in NUMERIC else COUNTS if last in COUNTED else WORDS if last in WORDED else {}
    return [(what, lambda random, new=new: new) for what, new in choices.items()]


# Valid calls.


@dataclass
class _Draw:
    """hypothesis' choices, and a generator for the numbers inside tensors."""

    draw: Callable[[st.SearchStrategy[Any]], Any]

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.draw(st.integers(0, 2**40)))

    def of(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def size(self, most: int) -> int:
        """Small ones mostly."""
        return self.draw(st.integers(1, self.of(3, most, most)))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def sizes(self, total: int) -> Tensor:
        """Offsets of parts of `total`, some of them empty."""
        parts = self.draw(st.integers(0 if total == 0 else 1, 5))
        cuts = torch.randint(0, total + 1, (max(parts - 1, 0),), generator=self.random).sort().values
        ends = [total] if parts else []
        return torch.tensor([0, *cuts.tolist(), *ends], dtype=self.of(torch.int32, torch.int64))


def _head_call(d: _Draw, op: Callable[..., Any]) -> Call:
    N, V, D = d.draw(st.integers(0, d.of(4, 9, 40))), d.size(d.of(9, 70, 300)), d.size(d.of(5, 33, 70))
    dtype = d.of(*FLOATS)
    head = {
        "weight": (d.normal(V, D) * (2 / D**0.5)).to(dtype),
        "bias": d.of(None, d.normal(V).to(dtype), d.normal(V).float()) if dtype != torch.float64 else None,
        "temperature": d.of(1.0, 0.7, 1.3),
        "logit_scale": d.of(1.0, -1.25, 0.5),
        "softcap": d.of(None, None, 6.0),
    }
    arguments: dict[str, Any] = {
        "hidden": d.normal(N, D).to(dtype),
        "targets": torch.randint(0, V, (N,), generator=d.random),
    }
    if op is head_gradients:
        arguments |= {"grad_logps": d.normal(N), "grad_entropy": d.normal(N)}
    else:
        arguments["workspace_bytes"] = d.of(None, None, 1, 4 * V, 1 << 20)
    if op is sequence_features:
        arguments["cu_seqlens"] = d.sizes(N)
        arguments["token_weights"] = d.of(None, torch.rand(N, generator=d.random).to(d.of(*FLOATS)))
        arguments["lse"] = d.of(None, None, d.normal(N), d.normal(N) * 100)
    return Call(op, arguments, head)


def _similarity(features: Tensor, groups: Any) -> Tensor:
    """Of right arguments, in float64."""
    with use_backend("reference"):
        return group_similarity(features.double(), groups).to(features.dtype)


def _group_call(d: _Draw, op: Callable[..., Any]) -> Call:
    B, D = d.draw(st.integers(0, d.of(4, 12))), d.size(d.of(3, 20))
    divisors = [m for m in range(1, B + 1) if B % m == 0]
    groups = d.of(d.sizes(B), *divisors[-2:])
    dtype = d.of(torch.float32, torch.float32, torch.float64)
    features = d.normal(B, D).to(dtype)
    rewards = d.of(
        d.normal(B), torch.randint(0, 2, (B,), generator=d.random) * 2.0 - 1, torch.ones(B), d.normal(B).double()
    )
    arguments: dict[str, Any] = {"groups": groups}
    if op in (group_similarity, g2rl_advantages):
        arguments["features"] = features
    if op is exploration_scores:
        arguments["similarity"] = _similarity(features, groups)
    if op is not group_similarity:
        arguments["rewards"] = rewards
    if op is shape_rewards:
        arguments["scores"] = torch.rand(B, generator=d.random).to(dtype)
    if op in (exploration_scores, shape_rewards, g2rl_advantages):
        arguments["valid"] = d.of(None, torch.rand(B, generator=d.random) > 0.3)
    if op in (group_advantages, g2rl_advantages):
        arguments["normalize"] = d.of("std", "none")
    shaping = None
    if op in (shape_rewards, g2rl_advantages):
        shaping = {
            "strength": d.of(1.0, 0.0, 0.7),
            "clip": d.of(3.0, 0.5),
            "rule": d.of("scale", "centered", "literal"),
            "min_range": d.of(1e-2, 0.3),
            "uniform_groups": d.of("shape", "drop"),
        }
    return Call(op, arguments, None, shaping)


def _packing_call(d: _Draw, op: Callable[..., Any]) -> Call:
    B, L, more = d.draw(st.integers(0, 4)), d.draw(st.integers(0, 6)), d.of((), (3,), (2, 2))
    mask = torch.rand(B, L, generator=d.random) > 0.4
    mask = mask.to(d.of(torch.bool, torch.int64, torch.uint8))
    dtype = d.of(*FLOATS, torch.int64)
    if op is unpad:
        return Call(op, {"tensor": d.normal(B, L, *more).mul(9).to(dtype), "mask": mask})
    packed = d.normal(int(mask.bool().sum()), *more).mul(9).to(dtype)
    return Call(op, {"packed": packed, "mask": mask, "value": d.of(0.0, -1.0, 7)})


OPS: dict[Callable[..., Any], Callable[[_Draw, Callable[..., Any]], Call]] = {
    token_logprobs: _head_call,
    sequence_features: _head_call,
    head_gradients: _head_call,
    group_similarity: _group_call,
    exploration_scores: _group_call,
    shape_rewards: _group_call,
    group_advantages: _group_call,
    g2rl_advantages: _group_call,
    unpad: _packing_call,
    pad: _packing_call,
}
# Most kernels, and most arguments, are those of the head.
WEIGHTS = (token_logprobs, *[sequence_features] * 3, *[head_gradients] * 2, *[g2rl_advantages] * 2, *list(OPS)[3:])
MAY_CHANGE = ("targets", "cu_seqlens", "groups", "hidden", "features", "rewards", "token_weights", "valid", "lse")


@st.composite
def calls(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Call:
    """A call of an op, with none, one or two arguments twisted; one in fifty has an argument changed meanwhile."""
    d = _Draw(draw)
    op = d.of(*WEIGHTS)
    call = OPS[op](d, op)
    for _ in range(d.of(0, 1, 1, 1, 2)):
        name = d.of(*call.tensors())
        choices = _twists(name, call.tensors()[name])
        if choices:
            what, make = d.of(*choices)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    call.put(name, make(d.random))
                except (
                    RuntimeError,
                    TypeError,
                    ValueError,
                    IndexError,
                    AttributeError,
                ):  # not to be done to such an argument
                    continue
            call.twists.append((name, what))
    changeable = [name for name in MAY_CHANGE if isinstance(call.arguments.get(name), Tensor)]
    if changeable and not call.twists and d.of(*range(10)) == 0:
        call.changing = d.of(*changeable)
    return call
