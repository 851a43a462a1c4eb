"""What each public function refuses, and how it says so; and the choice of backends.

Tensors of two devices: test_devices.py.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

import g2rl_kernels
from g2rl_kernels import (
    LMHead,
    Shaping,
    dispatch,
    explain,
    exploration_scores,
    g2rl_advantages,
    group_advantages,
    group_similarity,
    records,
    sequence_features,
    shape_rewards,
    testing,
    token_logprobs,
    use_backend,
    workspace,
)
from g2rl_kernels.backends import eager
from g2rl_kernels.checks import ValueChecks
from g2rl_kernels.ops import groups as groups_ops
from g2rl_kernels.ops import head_ops

N, D, V, B = 6, 4, 9, 2


def weight(**options: Any) -> torch.Tensor:
    return torch.zeros(V, D, **options)


def head_call(function: Callable, **changes: Any) -> None:
    arguments = {"hidden": torch.zeros(N, D), "head": weight(), "targets": torch.zeros(N, dtype=torch.int64)}
    if function is sequence_features:
        arguments["cu_seqlens"] = torch.tensor([0, 2, N])
    function(**(arguments | changes))


def group_call(function: Callable, **changes: Any) -> None:
    rewards = torch.tensor([1.0, -1, 1, -1, 1, -1])
    arguments = {
        group_similarity: {"features": torch.ones(N, D)},
        exploration_scores: {"similarity": torch.ones(2, 3, 3), "rewards": rewards},
        shape_rewards: {"rewards": rewards, "scores": torch.zeros(N)},
        group_advantages: {"rewards": rewards},
        g2rl_advantages: {"features": torch.ones(N, D), "rewards": rewards},
    }[function]
    function(**({"groups": 3} | arguments | changes))


def offsets(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def adapted_head() -> torch.nn.Module:
    """As peft wraps a layer: `weight` would be that of `base_layer`."""
    head = torch.nn.Module()
    head.base_layer = torch.nn.Linear(D, V)
    return head


HEADS = [
    (lambda: LMHead("weight"), TypeError, "head.weight: expected a tensor, found str"),
    (
        lambda: LMHead(torch.nn.Linear(D, V)),
        TypeError,
        "head.weight: expected a tensor, found Linear; LMHead(head.weight, head.bias) makes one",
    ),
    (
        lambda: LMHead(adapted_head()),
        TypeError,
        "head.weight: expected a tensor, found Module with an adapter, which its weight leaves out; "
        "LMHead(head.base_layer.weight + head.get_delta_weight(name)) has it",
    ),
    (
        lambda: LMHead(TwoTensor(torch.zeros(V, D), torch.zeros(V, D))),  # as torchao's quantised weights, which call
        TypeError,  # themselves floating point
        "head.weight: expected a plain tensor, found TwoTensor; where it is quantised, pass its dequantize()",
    ),
    (lambda: LMHead(torch.zeros(3)), ValueError, "head.weight: expected shape [V, d], found [3]"),
    (lambda: LMHead(weight(dtype=torch.int64)), TypeError, "or float64, found int64"),
    (lambda: LMHead(torch.zeros(0, 3)), ValueError, "head.weight: expected V > 0 and d > 0, found shape [0, 3]"),
    (lambda: LMHead(torch.zeros(3, 0)), ValueError, "head.weight: expected V > 0 and d > 0, found shape [3, 0]"),
    (lambda: LMHead(weight(), torch.zeros(3)), ValueError, "head.bias: expected shape [9], found [3]"),
    (
        lambda: LMHead(weight(dtype=torch.bfloat16), torch.zeros(V, dtype=torch.float16)),
        TypeError,
        "head.bias: expected dtype bfloat16 or float32, found float16",
    ),
    (
        lambda: LMHead(weight(), temperature=0.0),
        ValueError,
        "head.temperature: expected a number from 1e-18 to 1e18, found 0.0",
    ),
    (
        lambda: LMHead(weight(), temperature=-1.0),
        ValueError,
        "head.temperature: expected a number from 1e-18 to 1e18, found -1.0",
    ),
    (lambda: LMHead(weight(), temperature=float("nan")), ValueError, "head.temperature: expected a number"),
    (lambda: LMHead(weight(), temperature=float("inf")), ValueError, "head.temperature: expected a number"),
    (
        lambda: LMHead(weight(), logit_scale=0.0),
        ValueError,
        "head.logit_scale: expected a number of magnitude 1e-18 to 1e18, found 0.0",
    ),
    (lambda: LMHead(weight(), logit_scale=float("inf")), ValueError, "head.logit_scale: expected a number"),
    (
        lambda: LMHead(weight(), softcap=0.0),
        ValueError,
        "head.softcap: expected None or a number from 1e-18 to 1e18, found 0.0",
    ),
    (lambda: LMHead(weight(), softcap=float("inf")), ValueError, "head.softcap: expected None or a number"),
    (
        lambda: LMHead(weight(), temperature=1e-300),  # its inverse is infinite in fp32
        ValueError,
        "head.temperature: expected a number from 1e-18 to 1e18, found 1e-300",
    ),
    (
        lambda: LMHead(weight(), temperature="1"),
        TypeError,
        "head.temperature: expected a number from 1e-18 to 1e18, found str",
    ),
    (lambda: LMHead(weight(), logit_scale=None), TypeError, "head.logit_scale: expected a number of magnitude"),
    (lambda: LMHead(weight(), softcap=torch.ones(2)), TypeError, "1e-18 to 1e18, found Tensor"),
    (
        lambda: LMHead(weight().to_sparse()),
        TypeError,
        "head.weight: expected a dense tensor, found one of layout sparse_coo",
    ),
    (
        lambda: LMHead(weight(), process_group="tp"),
        TypeError,
        "head.process_group: expected a torch.distributed.ProcessGroup, found str",
    ),
    (
        lambda: LMHead(weight(), gather_weight=True),
        TypeError,
        "head.gather_weight: expected a DTensor for weight, found Tensor",
    ),
    (
        lambda: LMHead(weight(), vocab_start=9),
        ValueError,
        "head.vocab_start: expected None without a process_group, found 9",
    ),
    (
        lambda: LMHead(weight(), vocab_start=1.5),
        TypeError,
        "head.vocab_start: expected None or an int, found float",
    ),
    (lambda: LMHead(weight(), temperature=True), TypeError, "head.temperature: expected a number from 1e-18 to 1e18, "),
]

HEAD_FUNCTIONS = [
    (changes, error, message, function)
    for changes, error, message in [
        ({"hidden": "h"}, TypeError, "hidden: expected a tensor, found str"),
        ({"hidden": torch.zeros(N, D + 1)}, ValueError, "hidden: expected shape [N, 4], found [6, 5]"),
        ({"hidden": torch.zeros(2, 3, D)}, ValueError, "hidden: expected shape [N, 4], found [2, 3, 4]"),
        (
            {"hidden": torch.zeros(N, D).bfloat16()},
            TypeError,
            "hidden: expected dtype float32, as head.weight, found bfloat16; pass LMHead(weight.to(hidden.dtype))",
        ),
        (
            {"hidden": torch.zeros(N, D).long()},
            TypeError,
            "hidden: expected dtype float32, as head.weight, found int64",
        ),
        ({"head": [1, 2]}, TypeError, "head.weight: expected a tensor, found list"),
        ({"head": torch.nn.Linear(4, V)}, TypeError, "head: expected an LMHead or a weight, found Linear; LMHead("),
        ({"targets": None}, TypeError, "targets: expected a tensor, found NoneType"),
        ({"targets": offsets(0)}, ValueError, "targets: expected shape [6], found [1]"),
        ({"targets": torch.zeros(N)}, TypeError, "targets: expected dtype int64, found float32"),
        ({"targets": offsets(0, 1, 2, 3, 4, V)}, IndexError, "targets: expected values in [0, 9), found 9"),
        (
            {"targets": offsets(0, 1, -100, 3, 4, 5)},
            IndexError,
            "targets: expected values in [0, 9), found -100; leave out what a loss ignores, as unpad(",
        ),
        ({"hidden": torch.zeros(N, D).to_mkldnn()}, TypeError, "hidden: expected a dense tensor, found one of layout"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes: expected a number of bytes > 0, found 0"),
        ({"workspace_bytes": 2**63}, ValueError, "workspace_bytes: expected a number of bytes > 0, found 9223372"),
        ({"workspace_bytes": 1.5}, TypeError, "workspace_bytes: expected an int, found float"),
        ({"workspace_bytes": True}, TypeError, "workspace_bytes: expected an int, found bool"),
        (
            {"hidden": torch.tensor([[0.0] * D] * 2 + [[float("nan")] * D] * 4), "check_finite": True},
            ValueError,
            "hidden: expected finite values, found NaN or inf in row 2",
        ),
        (
            {"hidden": torch.tensor([[0.0, float("-inf")] * 2] * N), "check_finite": True},
            ValueError,
            "hidden: expected finite values, found NaN or inf in row 0",
        ),
    ]
    for function in (token_logprobs, sequence_features)
]

RESPONSES = [
    ({"cu_seqlens": [0, N]}, TypeError, "cu_seqlens: expected a tensor, found list"),
    ({"cu_seqlens": offsets(0, N)[None]}, ValueError, "cu_seqlens: expected shape [B + 1], found [1, 2]"),
    ({"cu_seqlens": offsets(0, N).float()}, TypeError, "cu_seqlens: expected dtype int32 or int64, found float32"),
    ({"cu_seqlens": offsets()}, ValueError, "cu_seqlens: expected at least the offset 0, found an empty tensor"),
    ({"cu_seqlens": offsets(1, N)}, ValueError, "cu_seqlens: expected to start at 0 and end at N = 6, found 1 and 6"),
    ({"cu_seqlens": offsets(0, 5)}, ValueError, "cu_seqlens: expected to start at 0 and end at N = 6, found 0 and 5"),
    ({"cu_seqlens": offsets(0, 7)}, ValueError, "cu_seqlens: expected to start at 0 and end at N = 6, found 0 and 7"),
    (
        {"cu_seqlens": offsets(0, 4, 3, N, dtype=torch.int32)},
        ValueError,
        "cu_seqlens: expected values that never decrease, found 4 then 3 at 1",
    ),
    ({"token_weights": torch.ones(5)}, ValueError, "token_weights: expected shape [6], found [5]"),
    ({"token_weights": torch.ones(N).long()}, TypeError, "token_weights: expected dtype bfloat16 or"),
    *(
        ({"token_weights": torch.tensor([1] * 5 + [x])}, ValueError, f"weights: expected finite values >= 0, found {x}")
        for x in (-1.0, float("nan"), float("inf"), float("-inf"))
    ),
    ({"lse": torch.ones(5)}, ValueError, "lse: expected shape [6], found [5]"),
    ({"lse": torch.ones(N).int()}, TypeError, "lse: expected dtype bfloat16 or"),
    ({"context_group": "cp"}, TypeError, "context_group: expected a torch.distributed.ProcessGroup, found str"),
]

ALL_GROUP_FUNCTIONS = (group_similarity, exploration_scores, shape_rewards, group_advantages, g2rl_advantages)
TAKE_REWARDS = ALL_GROUP_FUNCTIONS[1:]
TAKE_VALID = (exploration_scores, shape_rewards, g2rl_advantages)

GROUPS = [
    (function, changes, error, message)
    for functions, changes, error, message in [
        (ALL_GROUP_FUNCTIONS, {"groups": 4}, ValueError, "groups: expected a divisor of B = 6, found 4"),
        (ALL_GROUP_FUNCTIONS, {"groups": 0}, ValueError, "groups: expected a divisor of B = 6, found 0"),
        (ALL_GROUP_FUNCTIONS, {"groups": -3}, ValueError, "groups: expected a divisor of B = 6, found -3"),
        (
            ALL_GROUP_FUNCTIONS,
            {"groups": True},
            TypeError,
            "groups: expected an int or a tensor of offsets, found bool",
        ),
        (
            ALL_GROUP_FUNCTIONS,
            {"groups": [3, 3]},
            TypeError,
            "groups: expected an int or a tensor of offsets, found list",
        ),
        (ALL_GROUP_FUNCTIONS, {"groups": offsets()}, ValueError, "groups: expected at least the offset 0"),
        (ALL_GROUP_FUNCTIONS, {"groups": offsets(0, 6)[None]}, ValueError, "groups: expected shape [G + 1]"),
        (
            ALL_GROUP_FUNCTIONS,
            {"groups": offsets(0, 6).half()},
            TypeError,
            "groups: expected dtype int32 or int64, found float16",
        ),
        (
            ALL_GROUP_FUNCTIONS,
            {"groups": offsets(0, 3, 5)},
            ValueError,
            "groups: expected to start at 0 and end at B = 6",
        ),
        (
            ALL_GROUP_FUNCTIONS,
            {"groups": offsets(0, 7, 6)},
            ValueError,
            "groups: expected values that never decrease, found 7",
        ),
        (TAKE_REWARDS, {"rewards": [1.0] * N}, TypeError, "rewards: expected a tensor, found list"),
        (TAKE_REWARDS, {"rewards": torch.ones(N, 1)}, ValueError, "found [6, 1]"),
        (TAKE_REWARDS, {"rewards": torch.ones(())}, ValueError, "rewards: expected shape ["),
        (
            TAKE_REWARDS,
            {"rewards": torch.full((N,), float("nan"))},
            ValueError,
            "rewards: expected finite values, found NaN",
        ),
        (
            TAKE_REWARDS,
            {"rewards": torch.tensor([1, 1, 1, 1, 1, float("inf")])},
            ValueError,
            "rewards: expected finite values, found NaN or inf",
        ),
        (
            TAKE_REWARDS,
            {"rewards": torch.tensor([-float("inf"), 1, 1, 1, 1, 1])},
            ValueError,
            "rewards: expected finite values, found NaN or inf",
        ),
        (TAKE_REWARDS, {"rewards": torch.ones(N) * 1j}, TypeError, "rewards: expected real numbers, found complex64"),
        (TAKE_REWARDS, {"rewards": torch.ones(N).to_sparse()}, TypeError, "rewards: expected a dense tensor"),
        (TAKE_VALID, {"valid": torch.ones(N)}, TypeError, "valid: expected dtype bool, found float32"),
        (TAKE_VALID, {"valid": torch.ones(5).bool()}, ValueError, "valid: expected shape [6], found [5]"),
        (TAKE_VALID, {"valid": [True] * N}, TypeError, "valid: expected a tensor, found list"),
        (
            (group_similarity, g2rl_advantages),
            {"features": torch.ones(N)},
            ValueError,
            "features: expected shape [B, d], found [6]",
        ),
        (
            (group_similarity, g2rl_advantages),
            {"features": torch.ones(N, D).half()},
            TypeError,
            "features: expected dtype float32 or float64, found float16",
        ),
        ((g2rl_advantages,), {"rewards": torch.ones(5)}, ValueError, "rewards: expected shape [6], found [5]"),
        ((shape_rewards,), {"rewards": torch.ones(5)}, ValueError, "rewards: expected shape [6], found [5]"),
        (
            (shape_rewards,),
            {"scores": torch.ones(N).long()},
            TypeError,
            "scores: expected dtype float32 or float64, found int64",
        ),
        (
            (exploration_scores,),
            {"similarity": torch.ones(2, 3)},
            ValueError,
            "similarity: expected shape [G, m_max, m_max]",
        ),
        (
            (exploration_scores,),
            {"similarity": torch.ones(3, 3, 3)},
            ValueError,
            "similarity: expected shape [2, 3, 3]",
        ),
        (
            (exploration_scores,),
            {"similarity": torch.ones(2, 4, 4)},
            ValueError,
            "similarity: expected shape [2, 3, 3]",
        ),
        (
            (exploration_scores,),
            {"similarity": torch.ones(2, 3, 3), "groups": offsets(0, 4, 6)},
            ValueError,
            "with m_max of the largest group, found [2, 3, 3] and a group of 4",
        ),
        (
            (shape_rewards, g2rl_advantages),
            {"shaping": {"strength": 1.0}},
            TypeError,
            "shaping: expected a Shaping, found dict",
        ),
        (
            (group_advantages, g2rl_advantages),
            {"normalize": "mean"},
            ValueError,
            "normalize: expected one of std, none, found 'mean'",
        ),
    ]
    for function in functions
]

SHAPINGS = [
    ({"strength": -0.1}, "shaping.strength: expected a number from 0 to 1e18, found -0.1"),
    ({"strength": float("inf")}, "shaping.strength: expected a number from 0 to 1e18, found inf"),
    ({"clip": 0.0}, "shaping.clip: expected a number > 0, found 0.0"),
    ({"clip": float("nan")}, "shaping.clip: expected a number > 0, found nan"),
    ({"rule": "square"}, "shaping.rule: expected one of scale, centered, literal, found 'square'"),
    ({"min_range": -1.0}, "shaping.min_range: expected a number >= 0, found -1.0"),
    ({"min_range": float("nan")}, "shaping.min_range: expected a number >= 0, found nan"),
    ({"uniform_groups": "keep"}, "shaping.uniform_groups: expected one of shape, drop, found 'keep'"),
]


def raises(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
    assert type(raised.value) is error


@pytest.mark.parametrize(("call", "error", "message"), HEADS, ids=[message for *_, message in HEADS])
def test_head(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    raises(call, error, message)


@pytest.mark.parametrize(("changes", "error", "message", "function"), HEAD_FUNCTIONS)
def test_head_functions(changes: dict, error: type[Exception], message: str, function: Callable) -> None:
    raises(lambda: head_call(function, **changes), error, message)


def test_checks_of_values_where_there_is_one_or_none() -> None:
    for n in (0, 1):
        ValueChecks().not_negative("x", torch.ones(n))
        ValueChecks().finite("x", torch.ones(n, 1))
        ValueChecks().targets(torch.ones(n, dtype=torch.int64), 2)
    raises(lambda: ValueChecks().not_negative("x", -torch.ones(1)), ValueError, "x: expected finite values >= 0")
    raises(lambda: ValueChecks().finite("x", torch.full((1, 1), torch.nan)), ValueError, "x: expected finite values")
    raises(lambda: ValueChecks().targets(torch.tensor([2]), 2), IndexError, "targets: expected values in [0, 2), found")


@pytest.mark.parametrize("function", [token_logprobs, sequence_features])
def test_late_checks_of_hidden(function: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: launched before the kernels, read after them."""
    monkeypatch.setattr(ValueChecks, "_is_late", lambda checks, tensor: True)
    head_call(function, check_finite=True)
    hidden = torch.zeros(N, D)
    hidden[3, 1] = torch.nan
    message = "hidden: expected finite values, found NaN or inf in row 3"
    raises(lambda: head_call(function, hidden=hidden, check_finite=True), ValueError, message)


def test_late_checks_hand_on_what_is_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right stays as it is, and nothing that kernels get leads them outside of a tensor."""
    monkeypatch.setattr(ValueChecks, "_is_late", lambda checks, tensor: True)
    checks, right, targets = ValueChecks(), offsets(0, 0, 3, 3, 6, 6), torch.tensor([0, V - 1])
    assert torch.equal(checks.offsets("cu_seqlens", right, 6, "N"), right)
    assert torch.equal(checks.targets(targets, V), targets)
    with checks:
        pass
    assert ValueChecks().offsets("cu_seqlens", offsets(1, 9, -1, 4, 5), 6, "N").tolist() == [0, 6, 6, 6, 6]
    assert ValueChecks().targets(torch.tensor([-1, 2, V]), V).tolist() == [0, 2, V - 1]


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
@pytest.mark.parametrize(("changes", "error", "message"), RESPONSES)
def test_responses(
    changes: dict, error: type[Exception], message: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ValueChecks, "_is_late", lambda checks, tensor: late and tensor.numel() > 0)
    raises(lambda: head_call(sequence_features, **changes), error, message)


@pytest.mark.parametrize(("function", "changes", "error", "message"), GROUPS)
def test_group_functions(function: Callable, changes: dict, error: type[Exception], message: str) -> None:
    raises(lambda: group_call(function, **changes), error, message)


@pytest.mark.parametrize(("changes", "error", "message"), [case[1:] for case in GROUPS if case[0] is g2rl_advantages])
def test_late_checks_of_groups(
    changes: dict, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where this op alone does not wait for its arguments' values."""
    monkeypatch.setattr(ValueChecks, "_is_late", lambda checks, tensor: True)
    raises(lambda: group_call(g2rl_advantages, **changes), error, message)


@pytest.mark.parametrize(("changes", "message"), SHAPINGS)
def test_shaping(changes: dict, message: str) -> None:
    raises(lambda: Shaping(**changes), ValueError, message)


@pytest.mark.parametrize("name", ["strength", "clip", "min_range"])
def test_shaping_by_no_number(name: str) -> None:
    raises(lambda: Shaping(**{name: "1"}), TypeError, f"shaping.{name}: expected a number")


def test_a_group_of_any_size_in_a_batch_of_none() -> None:
    none = torch.ones(0)
    assert group_advantages(none, 2**31 - 1).shape == (0,)
    raises(lambda: group_advantages(none, 2**63), ValueError, "groups: expected a divisor of B = 0, found 92233720")


TARGETS = torch.zeros(N, dtype=torch.int64)
TANGENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "hidden": lambda x: token_logprobs(x, weight(), TARGETS).logps,
    "head.weight": lambda x: sequence_features(torch.zeros(N, D), x, TARGETS, offsets(0, N)).entropy,
    "head.bias": lambda x: token_logprobs(torch.zeros(N, D), LMHead(weight(), x[0, :1].expand(V)), TARGETS).logps,
    "features": lambda x: group_similarity(x, 3),
}


@pytest.mark.parametrize("name", TANGENTS)
def test_forward_mode_is_refused(name: str) -> None:
    """PyTorch would take the missing tangent for zero. Where something else has one, ops are constants."""
    x, run = torch.ones(N, D), TANGENTS[name]

    def with_dual_numbers() -> None:
        with forward_ad.dual_level():
            run(forward_ad.make_dual(x, x))

    message = f"{name}: expected no tangent, found one: ops have no forward-mode derivative"
    raises(with_dual_numbers, NotImplementedError, message)
    raises(lambda: torch.func.jvp(run, (x,), (x,)), NotImplementedError, message)
    assert float(torch.func.jvp(lambda y: run(x).sum() + y, (x[0, 0],), (x[0, 0],))[1]) == 1


@pytest.mark.parametrize("name", TANGENTS)
def test_gradients_of_functions_are_refused(name: str) -> None:
    """PyTorch's message would name no argument. What they do not differentiate is a constant, and `vmap` works."""
    x, run = torch.ones(N, D), TANGENTS[name]
    message = f"{name}: expected no gradient of torch.func (grad, vjp, jacrev), found one: use torch.autograd.grad"

    def both(y: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(run)(y[None]).sum()

    for function in (torch.func.grad(lambda y: run(y).sum()), torch.func.jacrev(run), torch.func.grad(both)):
        raises(lambda function=function: function(x), NotImplementedError, message)
    assert float(torch.func.grad(lambda y: run(x).sum() + y)(x[0, 0])) == 1
    assert torch.equal(torch.func.vmap(run)(x[None])[0], run(x))


@pytest.mark.parametrize("name", TANGENTS)
def test_second_derivatives_are_refused(name: str) -> None:
    """PyTorch's message would ask the caller to register a formula. The first may be part of a graph."""
    x = torch.ones(N, D, requires_grad=True)
    (gradient,) = torch.autograd.grad(TANGENTS[name](x).sum(), x, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(TANGENTS[name](x).sum(), x)[0])
    results = "similarity" if name == "features" else "logps, entropy"
    message = f"{results}: expected to be differentiated once, found a derivative of the gradient"
    raises(lambda: gradient.sum().backward(), NotImplementedError, message)


@pytest.mark.parametrize("function", TAKE_REWARDS)
def test_gradients_of_functions_are_refused_by_rewards_too(function: Callable) -> None:
    def run(rewards: torch.Tensor) -> torch.Tensor:
        return group_call(function, rewards=rewards)

    found = "of torch.func (grad, vjp, jacrev), found one: results are data, without a gradient"
    message = f"rewards: expected no gradient {found}"
    raises(lambda: torch.func.grad(run)(-torch.ones(N)), NotImplementedError, message)


def test_indices_changed_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend addresses memory with is what was checked, whatever becomes of the caller's tensor since then."""
    targets, cu_seqlens, groups = torch.zeros(N).long(), offsets(0, 2, N), offsets(0, 3, N)
    given = [targets.data_ptr(), cu_seqlens.data_ptr(), groups.data_ptr()]
    seen: list[int] = []

    def resolved_spy(op: str, *arguments: Any, **named: Any) -> Callable:
        run = resolve(op, *arguments, **named)

        def spy(*args: Any) -> Any:
            for x in (*args, *(y for r in args if isinstance(r, records.Responses) for y in vars(r).values())):
                if isinstance(x, torch.Tensor) and not x.is_floating_point():
                    seen.append(x.data_ptr())
            return run(*args)

        return spy

    resolve = dispatch.resolve
    for module in (head_ops, groups_ops):
        monkeypatch.setattr(module, "resolve", resolved_spy)
    head_call(token_logprobs, targets=targets)
    head_call(sequence_features, targets=targets, cu_seqlens=cu_seqlens)
    for function in ALL_GROUP_FUNCTIONS:
        group_call(function, groups=groups)
    assert len(seen) == 3 + len(ALL_GROUP_FUNCTIONS) and not set(seen) & set(given)


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
def test_targets_changed_between_forward_and_backward(backend: str) -> None:
    """By way of NumPy PyTorch does not see it, and cannot refuse it itself."""
    targets = torch.zeros(N).long()
    with use_backend(backend):
        logps = token_logprobs(torch.randn(N, D, requires_grad=True), LMHead(torch.randn(V, D)), targets).logps
        targets.numpy()[-1] = V
        raises(lambda: logps.sum().backward(), IndexError, f"targets: expected values in [-1, {V}), found {V}")


def test_what_is_accepted() -> None:
    """The base cases of the tables above; NaN in hidden passes where nobody asked to look."""
    for function in (token_logprobs, sequence_features):
        head_call(function)
        head_call(function, hidden=torch.full((N, D), float("nan")))
        head_call(function, check_finite=True)
        head_call(function, head=LMHead(weight(), torch.zeros(V)))
    head_call(sequence_features, cu_seqlens=offsets(0, 0, N, N, dtype=torch.int32))
    head_call(sequence_features, token_weights=torch.zeros(N).bfloat16(), lse=torch.zeros(N).double())
    for function in ALL_GROUP_FUNCTIONS:
        group_call(function)
        group_call(function, groups=np.int64(3))
        if function is not exploration_scores:
            group_call(function, groups=offsets(0, 6, 6, dtype=torch.int32))


# Backends.


def resolved(op: str = "sequence_features", dtype: torch.dtype = torch.float32) -> str:
    """The module that an op resolves to."""
    return dispatch.resolve(op, torch.device("cpu"), dtype).__module__


def test_use_backend_as_a_context_manager() -> None:
    automatic = resolved()
    with use_backend("reference"):
        assert resolved() == "g2rl_kernels.backends.reference.head"
        with use_backend("torch"):
            assert resolved() == "g2rl_kernels.backends.eager.head"
            with use_backend(None):
                assert resolved() == automatic
            assert resolved() == "g2rl_kernels.backends.eager.head"
        assert resolved() == "g2rl_kernels.backends.reference.head"
    assert resolved() == automatic


def test_use_backend_ends_with_its_block_also_by_an_error() -> None:
    automatic = resolved()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert resolved() == automatic


def test_use_backend_for_the_process() -> None:
    automatic = resolved()
    use_backend("reference")
    assert resolved() == "g2rl_kernels.backends.reference.head"
    use_backend(None)
    assert resolved() == automatic


def test_use_backend_in_blocks_that_overlap() -> None:
    """As of two threads: each ends its own choice, and the last one that is left holds."""
    automatic = resolved()
    first, second = use_backend("torch").__enter__(), use_backend("reference").__enter__()
    assert resolved() == "g2rl_kernels.backends.reference.head"
    first.__exit__(None, None, None)
    assert resolved() == "g2rl_kernels.backends.reference.head"
    second.__exit__(None, None, None)
    assert resolved() == automatic
    chosen = use_backend("reference")
    use_backend(None)
    assert resolved() == automatic
    with chosen:
        assert resolved() == "g2rl_kernels.backends.reference.head"
        with chosen:
            pass
        assert resolved() == "g2rl_kernels.backends.reference.head"
    assert resolved() == automatic


def test_choices_for_the_process_replace_each_other() -> None:
    for _ in range(5):
        use_backend("torch")
        use_backend(None)
    assert len(dispatch._choices) <= 2


@pytest.mark.parametrize("fullgraph", [True, False])
def test_use_backend_is_not_ignored_in_a_compiled_function(fullgraph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    def spy(*arguments: Any) -> Callable:
        served.append(dispatch.resolve(*arguments))
        return served[-1]

    @torch.compile(fullgraph=fullgraph, backend="eager")
    def compiled(hidden: torch.Tensor) -> torch.Tensor:
        with use_backend("reference"):
            return token_logprobs(hidden, weight(), torch.zeros(N, dtype=torch.int64)).logps

    monkeypatch.setattr(head_ops, "resolve", spy)
    if fullgraph:
        with pytest.raises(RuntimeError, match="use_backend: expected a call outside of what torch.compile compiles"):
            compiled(torch.zeros(N, D))
    else:
        compiled(torch.zeros(N, D))
        assert [run.__module__ for run in served] == ["g2rl_kernels.backends.reference.head"]


def test_backend_holds_in_backward_passes() -> None:
    """Autograd may run them on threads of its own."""
    hidden = torch.randn(3, D, requires_grad=True)
    seen = []

    def spy(*args: Any) -> Any:
        seen.append(args)
        return original(*args)

    from g2rl_kernels.backends import reference

    original = reference.logprobs_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "logprobs_backward", spy)
        with use_backend("reference"):
            token_logprobs(hidden, weight(), offsets(0, 1, 2)).logps.sum().backward()
    assert len(seen) == 1


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "expected one of cuda, triton, native, torch, reference, found 'cpu'"
    raises(lambda: use_backend("cpu"), ValueError, f"backend: {expected}")
    assert resolved() == resolved()
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "cpu")
    raises(resolved, ValueError, f"G2RL_KERNELS_BACKEND: {expected}")
    raises(explain, ValueError, f"G2RL_KERNELS_BACKEND: {expected}")
    with use_backend("torch"):
        assert resolved() == "g2rl_kernels.backends.eager.head"


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G2RL_KERNELS_BACKEND", "reference")
    assert resolved() == "g2rl_kernels.backends.reference.head"
    assert "backend set by name: reference" in explain()
    with use_backend("torch"):
        assert resolved() == "g2rl_kernels.backends.eager.head"
        with use_backend(None):
            assert resolved() == "g2rl_kernels.backends.reference.head"
    monkeypatch.setenv("G2RL_KERNELS_BACKEND", "")
    assert "set by name" not in explain()


def test_backend_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of this table or another: refusing, or without the op. Asked for by name, it says why."""
    table = (
        dispatch.Backend("refusing", "g2rl_kernels.backends.refusing"),
        dispatch.Backend("torch", "g2rl_kernels.backends.eager"),
    )

    class Module:
        @staticmethod
        def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
            return None if dtype == torch.float32 else "only float32 today"

    monkeypatch.setattr(dispatch, "BACKENDS", table)
    load = dispatch._load
    monkeypatch.setattr(dispatch, "_load", lambda backend: Module if backend.name == "refusing" else load(backend))
    with use_backend("refusing"):
        message = "backend 'refusing' cannot run sequence_features on cpu torch.bfloat16: only float32 today"
        raises(lambda: resolved(dtype=torch.bfloat16), RuntimeError, message)
        half = {"hidden": torch.zeros(N, D).bfloat16(), "head": weight().bfloat16()}
        raises(lambda: head_call(sequence_features, **half), RuntimeError, message)
        assert resolved() == "g2rl_kernels.backends.eager.head", "an op that it lacks is served as if it was not chosen"
    assert resolved() == "g2rl_kernels.backends.eager.head"
    report = explain().split("\n\n")
    assert report[1].splitlines() == [
        "cpu, bfloat16, float16",
        f"  torch      serves {', '.join(dispatch.OPS)}",
        "  not refusing: only float32 today",
    ]
    assert report[2].splitlines()[0] == "cpu, float32"
    assert "  not refusing: does not have this op" in report[2].splitlines()
    with use_backend("refusing"):
        report = explain().split("\n\n")
    assert report[1].splitlines() == [
        "cpu, bfloat16, float16",
        "  not refusing: only float32 today",
        "  not torch: refusing was asked for",
    ]
    assert report[2].splitlines() == [
        "cpu, float32",
        f"  torch      serves {', '.join(dispatch.OPS)}",
        "  not refusing: does not have this op",
    ]


@pytest.mark.parametrize("backend", testing.available_backends(ops=("g2rl_advantages",)))
def test_every_op_runs_whichever_backend_is_chosen(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, here or from outside: those that it lacks run elsewhere, and so do gradients."""
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, backend)
    for function in (token_logprobs, sequence_features):
        head_call(function)
    for function in ALL_GROUP_FUNCTIONS:
        group_call(function)
    features = torch.ones(N, D, requires_grad=True)
    group_similarity(features, 3).sum().backward()
    assert features.grad.abs().max() < 1e-6
    served = [line.split(" serves ")[1] for line in explain().split("\n\n")[-1].splitlines() if " serves " in line]
    assert sorted(", ".join(served).split(", ")) == sorted(dispatch.OPS)


@pytest.mark.parametrize("groups", [3, offsets(0, 3, 3, N)], ids=["equal", "ragged"])
def test_a_backend_without_room_for_a_group_is_passed_over(
    groups: int | torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by name, it says what it has room for."""
    served = []

    def advantages(*arguments: Any) -> Any:
        served.append(arguments[3])
        return eager.g2rl_advantages(*arguments)

    small = SimpleNamespace(
        unavailable=lambda device, dtype: None,
        g2rl_advantages=advantages,
        most_members=lambda device: 2,
    )
    row, load = dispatch.Backend("small", "g2rl_kernels.backends.small"), dispatch._load
    monkeypatch.setattr(dispatch, "BACKENDS", (row, *dispatch.BACKENDS))
    monkeypatch.setattr(dispatch, "_load", lambda backend: small if backend is row else load(backend))
    group_call(g2rl_advantages, groups=groups)
    assert served == []
    with use_backend("small"):
        message = "'small' cannot run g2rl_advantages on cpu torch.float32: groups: expected at most 2 responses in a"
        raises(lambda: group_call(g2rl_advantages, groups=groups), RuntimeError, message)
        small.most_members = lambda device: 3
        group_call(g2rl_advantages, groups=groups)
    assert served == [3]
    group_call(g2rl_advantages, groups=groups)
    assert served == [3, 3]


def test_backends_serve_what_the_table_promises() -> None:
    """The torch backend serves everything, and nothing is automatic that is slower; the reference only by name."""
    for op in dispatch.OPS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            available = testing.available_backends("cpu", dtype, (op,))
            assert available[-2:] == ["torch", "reference"]
            with use_backend(available[0]):
                fastest = resolved(op, dtype)
            assert resolved(op, dtype) == fastest
            assert ".reference" not in fastest


@pytest.mark.parametrize("backend", dispatch.BACKENDS, ids=lambda backend: backend.name)
def test_backends_take_records(backend: dispatch.Backend) -> None:
    """At most eight arguments, the same ones under the same names in every backend that has the op."""
    module, reference = dispatch._load(backend), dispatch._load(dispatch.BACKENDS[-1])
    for op in dispatch.OPS:
        if hasattr(module, op):
            names = list(inspect.signature(getattr(module, op)).parameters)
            assert len(names) <= 8 and names == list(inspect.signature(getattr(reference, op)).parameters)


def test_a_backend_is_told_from_one_whose_name_begins_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of `native_sparse` are not those of `native`, for whose tests they would be left out."""

    def sequence_features(*arguments: Any) -> None: ...

    sequence_features.__module__ = "g2rl_kernels.backends.native_sparse"
    row = dispatch.Backend("native_sparse", sequence_features.__module__)
    monkeypatch.setattr(dispatch, "BACKENDS", (*dispatch.BACKENDS, row))
    assert dispatch.backend_number(sequence_features) == len(dispatch.BACKENDS) - 1
    names = [backend.name for backend in dispatch.BACKENDS]
    assert dispatch.backend_number(eager.sequence_features) == names.index("torch")


@pytest.mark.parametrize("backend", dispatch.BACKENDS, ids=lambda backend: backend.name)
def test_tests_of_bounds_find_every_backend(backend: dispatch.Backend) -> None:
    """They run where a backend has all of these; one with some of them would be tested by none."""
    module, together = dispatch._load(backend), ("token_logprobs", "sequence_features", "logprobs_backward")
    assert [op for op in together if hasattr(module, op)] in ([], list(together))


@pytest.mark.parametrize(("memory", "expected"), [(8, 0.25), (24, 0.6), (80, 2.0), (192, 2.0)])
def test_workspace_by_default(memory: int, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In GiB, of GPUs by what they have; a CPU has one size, and a caller's wish holds everywhere."""
    properties = SimpleNamespace(total_memory=memory << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    workspace._share_of_gpu.cache_clear()
    gpu = torch.device("cuda", 0)
    assert workspace.workspace_or_default(0, gpu) == int(expected * 2**30)
    assert workspace.workspace_or_default(0, torch.device("cpu")) == 256 << 20
    assert workspace.workspace_or_default(5, gpu) == 5
    workspace._share_of_gpu.cache_clear()


def test_explain() -> None:
    text = explain()
    assert text.startswith(f"torch {torch.__version__}, {torch.get_num_threads()} threads, devices: cpu")
    titles = [section.splitlines()[0] for section in text.split("\n\n")[1:]]
    assert ", ".join(title.removeprefix("cpu, ") for title in titles) == "bfloat16, float16, float32"
    section = text.split("\n\n")[1]
    served = ", ".join(line.split(" serves ")[1] for line in section.splitlines() if " serves " in line)
    assert sorted(served.split(", ")) == sorted(dispatch.OPS)
    with use_backend("reference"):
        section = explain().split("\n\n")[1]
    assert f"  reference  serves {', '.join(dispatch.OPS)}" in section.splitlines()
    assert any(line.startswith("  not torch: reference was asked for") for line in section.splitlines())


def test_command_line() -> None:
    """The module prints what `explain` says, of its own process."""
    environment = os.environ | {"G2RL_KERNELS_BACKEND": "reference"}
    run = subprocess.run(
        [sys.executable, "-m", "g2rl_kernels"], capture_output=True, text=True, env=environment, check=True
    )
    assert "backend set by name: reference" in run.stdout.splitlines()[:4]
    assert f"\ncpu, bfloat16, float16, float32\n  reference  serves {', '.join(dispatch.OPS)}\n" in run.stdout


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("G2RL_KERNELS_BACKEND", "one of cuda, triton, native, torch, reference"),
        ("G2RL_KERNELS_CHECK", "skip, force or nothing"),
    ],
)
def test_command_line_of_a_word_that_is_not_known(variable: str, expected: str) -> None:
    environment = os.environ | {variable: "cpu"}
    run = subprocess.run([sys.executable, "-m", "g2rl_kernels"], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"{variable}: expected {expected}, found 'cpu'\n"


def test_public_names() -> None:
    assert len(set(g2rl_kernels.__all__)) == len(g2rl_kernels.__all__)
    assert all(hasattr(g2rl_kernels, name) for name in g2rl_kernels.__all__)
    public = {name for name in vars(g2rl_kernels) if not name.startswith("_") and name not in sys.modules}
    modules = {
        "backends",
        "checks",
        "dispatch",
        "distributed",
        "group_layout",
        "interpreter",
        "ops",
        "plans",
        "products",
        "records",
        "self_check",
        "self_check_run",
        "sums",
        "testing",
        "version",
        "workspace",
    }
    assert public - modules <= set(g2rl_kernels.__all__)
