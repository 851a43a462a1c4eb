"""Backend `torch` on devices that are no CPU and not CUDA's, with and without float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import head_cases
import pytest
import torch
from head_cases import upstream

from g2rl_kernels import LMHead, explain, g2rl_advantages, group_similarity, pad, testing, unpad, use_backend
from g2rl_kernels.products import has_float64
from g2rl_kernels.testing import OPTIONS, HeadSample, Shape
from tests.accelerator import KIND, accelerator, asked_without_kernel, has_kernel, no_other

pytestmark = no_other
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ULP = 2**-23
SHAPE = Shape((67, 0, 64, 1), 40, 337, "responses of many tokens, of one and of none")


@pytest.fixture(params=[False, True], ids=["no float64", "float64"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with accelerator(request.param) as there:
        yield there


def moved(s: HeadSample, device: torch.device) -> HeadSample:
    bias = None if s.head.bias is None else s.head.bias.to(device)
    tensors = {name: getattr(s, name).to(device) for name in ("hidden", "targets", "cu_seqlens", "token_weights")}
    return replace(s, head=replace(s.head, weight=s.head.weight.to(device), bias=bias), **tensors)


def on_cpu(record: tuple) -> tuple:
    return type(record)(*(None if x is None else x.detach().cpu() for x in record))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_head_ops_meet_the_contract(device: torch.device, dtype: torch.dtype, options: str) -> None:
    s = head_cases.sample(SHAPE, dtype, options=OPTIONS[options])
    there = moved(s, device)
    found = head_cases.features(there)
    given = head_cases.features(there, lse=found.lse)
    exact = testing.oracle(s)
    for result in (found, given):
        assert result.features.device.type == KIND
        testing.assert_bounds(on_cpu(result), exact, s.cu_seqlens)
    grads = testing.gradients(there, *(x.to(device) for x in upstream(s)))
    testing.assert_gradients(on_cpu(grads), *testing.oracle_gradients(s, *upstream(s)))


def test_apples_devices_have_what_ops_ask_for(device: torch.device) -> None:
    for dtype in DTYPES:
        there = moved(head_cases.sample(SHAPE, dtype, options=OPTIONS["together"]), device)
        g2rl_advantages(head_cases.features(there).features, torch.ones(4, device=device), 2)
        testing.gradients(there, *(x.to(device) for x in upstream(there)))
    assert asked_without_kernel("MPS") == []
    assert has_kernel("mm", "MPS") and not has_kernel("segment_reduce", "MPS")


def test_groups_are_those_of_a_cpu(device: torch.device) -> None:
    features, rewards = torch.randn(9, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, -1, 1] * 3)
    for groups in (3, torch.tensor([0, 4, 9], dtype=torch.int32)):
        there = groups if isinstance(groups, int) else groups.to(device)
        found = g2rl_advantages(features.to(device), rewards.to(device), there)
        for name, exact in g2rl_advantages(features, rewards, groups)._asdict().items():
            torch.testing.assert_close(getattr(found, name).cpu(), exact, atol=0, rtol=ULP)
    leaf = features.to(device).requires_grad_()
    group_similarity(leaf, 3).square().sum().backward()
    expected = features.clone().requires_grad_()
    group_similarity(expected, 3).square().sum().backward()
    torch.testing.assert_close(leaf.grad.cpu(), expected.grad, atol=0, rtol=ULP)


def test_packing(device: torch.device) -> None:
    padded, mask = torch.randn(3, 5, 2, device=device), torch.tensor([[0, 1, 1, 1, 0]] * 3, device=device).bool()
    values, cu_seqlens = unpad(padded, mask)
    assert cu_seqlens.tolist() == [0, 3, 6, 9]
    assert torch.equal(pad(values, mask).cpu(), (padded * mask[:, :, None]).cpu())


def test_wrong_values_are_named(device: torch.device) -> None:
    s = moved(head_cases.sample(SHAPE, torch.float32), device)
    with pytest.raises(IndexError, match="targets: expected values in"):
        head_cases.features(s, targets=s.targets + SHAPE.V)
    with pytest.raises(ValueError, match="cu_seqlens: expected"):
        head_cases.features(s, cu_seqlens=s.cu_seqlens.flip(0))
    with pytest.raises(ValueError, match="targets: expected"):
        head_cases.features(s, targets=s.targets.cpu())


def test_which_backend_serves_is_told(device: torch.device) -> None:
    said = explain()
    assert f"devices: cpu, {KIND}:0" in said and f"\n{KIND}, bfloat16, float16, float32" in said
    if not has_float64(KIND):
        with use_backend("reference"), pytest.raises(RuntimeError, match="the device has no float64"):
            head = LMHead(torch.randn(5, 4, device=device))
            head_cases.token_logprobs(head.weight, head, torch.zeros(5, dtype=torch.int64, device=device))
