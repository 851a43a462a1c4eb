"""Where tensors lie: on another stream or device, at any address, in any number; and tensors of two devices.

What needs no GPU is tested on a CPU as well, so that a test is known to work before a GPU runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import head_cases
import pytest
import torch
from backend_cases import every_device, over_backends
from filelock import FileLock
from head_cases import PLANS, sample, upstream
from torch import Tensor

from g2rl_kernels import (
    LMHead,
    SequenceFeatures,
    exploration_scores,
    g2rl_advantages,
    group_advantages,
    group_similarity,
    sequence_features,
    shape_rewards,
    testing,
    token_logprobs,
    use_backend,
)
from g2rl_kernels.testing import OPTIONS, HeadSample, Shape, available_backends

HEAD_OPS = ("token_logprobs", "sequence_features", "logprobs_backward")
FUSED_OPS = (*HEAD_OPS, "g2rl_advantages")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
over_fused_backends = over_backends(*FUSED_OPS, dtypes=DTYPES)

# Rows of d = 136 numbers are aligned to 16 bytes in every dtype: what TMA and wide loads ask for.
ALIGNED = Shape((67, 0, 64, 1), 136, 1105, "responses on and off tile edges of 64, several tiles, ragged V")
Results = dict[str, Tensor]


def results(s: HeadSample) -> Results:
    """Of every plan for features, of the backward pass and of the group op."""
    found = head_cases.features(s)
    given = head_cases.features(s, lse=found.lse)
    grads = testing.gradients(s, *upstream(s))
    rewards = torch.tensor([1.0, -1.0, -1.0, 1.0], device=s.hidden.device)
    advantages = g2rl_advantages(found.features, rewards, 4)
    named = {"": found, "lse given: ": given, "gradient of ": grads, "group op: ": advantages}
    return {
        prefix + name: x.detach().clone()
        for prefix, record in named.items()
        for name, x in record._asdict().items()
        if x is not None
    }


def assert_same_bits(found: Results, expected: Results) -> None:
    other = [name for name, x in found.items() if not torch.equal(x.cpu(), expected[name].cpu())]
    assert not other, f"other bits: {', '.join(other)}"


# Streams.


def on_another_stream(device: str, run: Callable[[], Results]) -> Results:
    """What `run` returns on a stream of its own, taken while the default stream is still busy with something else.

    What is launched on the default stream instead comes too late: its memory holds whatever it held before.
    """
    if device == "cpu":
        return run()
    stream, slept = torch.cuda.Stream(), torch.cuda.Event()
    # Sets memory of this stream aside and compiles, for which the whole device may have to wait.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    # Half a second first; more where other processes use the GPU too.
    for cycles in (10**9, 8 * 10**9, 64 * 10**9):
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        slept.record()
        with torch.cuda.stream(stream):
            found = run()
        stream.synchronize()
        if not slept.query():
            torch.cuda.synchronize()
            return found
    pytest.fail("the default stream was idle again before the other one had ended: waits for it, or a busy machine")


@over_fused_backends
def test_another_stream(backend: str | None, device: str, dtype: torch.dtype, poisoned_memory: None) -> None:
    s = sample(ALIGNED, dtype, device, kind="peaked", options=OPTIONS["together"])
    with use_backend(backend):
        expected = results(s)
        assert not any(bool(x.isnan().any()) for x in expected.values())
        assert_same_bits(on_another_stream(device, lambda: results(s)), expected)


# Devices.

SECOND = [
    "cpu",
    pytest.param(
        "cuda:1", marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", SECOND)
def test_another_device_than_the_current_one(device: str, dtype: torch.dtype) -> None:
    first = device.replace("1", "0")
    s, there = (sample(ALIGNED, dtype, at, kind="random", options=OPTIONS["bias"]) for at in (first, device))
    exact = head_cases.oracle(ALIGNED, dtype, device, "random", OPTIONS["bias"])
    g = upstream(there)
    for backend in available_backends(device, dtype, FUSED_OPS):
        with use_backend(backend):
            found = results(there)
            testing.assert_bounds(SequenceFeatures(*list(found.values())[:4]), exact, there.cu_seqlens)
            testing.assert_gradients(testing.gradients(there, *g), *testing.oracle_gradients(there, *g))
            if device == "cpu" or torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
                assert_same_bits(found, results(s))
    assert all(x.device == torch.device(device) for x in found.values())
    assert device == "cpu" or torch.cuda.current_device() == 0


def head_arguments(device: str) -> dict[str, Tensor | LMHead]:
    return {
        "hidden": torch.zeros(6, 4, device=device),
        "head": LMHead(torch.zeros(9, 4, device=device)),
        "targets": torch.zeros(6, dtype=torch.int64, device=device),
        "cu_seqlens": torch.tensor([0, 2, 6], device=device),
        "token_weights": torch.ones(6, device=device),
        "lse": torch.zeros(6, device=device),
    }


def group_arguments(device: str) -> dict[str, Tensor]:
    return {
        "features": torch.ones(6, 4, device=device),
        "similarity": torch.ones(2, 3, 3, device=device),
        "scores": torch.zeros(6, device=device),
        "rewards": torch.tensor([1.0, -1, 1, -1, 1, -1], device=device),
        "groups": torch.tensor([0, 3, 6], device=device),
        "valid": torch.ones(6, dtype=torch.bool, device=device),
    }


# What moves to another device is the argument named, on the device of the first.
@every_device
@pytest.mark.parametrize(
    ("function", "arguments", "names"),
    [
        (token_logprobs, head_arguments, ("head", "hidden", "targets")),
        (
            sequence_features,
            head_arguments,
            ("head", "hidden", "targets", "cu_seqlens", "token_weights", "lse"),
        ),
        (group_similarity, group_arguments, ("features", "groups")),
        (exploration_scores, group_arguments, ("rewards", "similarity", "groups", "valid")),
        (shape_rewards, group_arguments, ("scores", "rewards", "groups", "valid")),
        (group_advantages, group_arguments, ("rewards", "groups")),
        (g2rl_advantages, group_arguments, ("features", "rewards", "groups", "valid")),
    ],
)
def test_tensors_of_two_devices_are_refused_by_name(
    device: str, function: Callable, arguments: Callable[[str], dict], names: tuple[str, ...]
) -> None:
    given = {name: arguments(device)[name] for name in names}
    home, other = given[names[-1]].device, torch.device("meta" if device == "cpu" else "cpu")
    function(**given)
    for name in names[1:]:
        with pytest.raises(ValueError) as raised:
            function(**(given | {name: given[name].to(other)}))
        assert str(raised.value) == f"{name}: expected device {home}, found {other}"


@every_device
def test_a_bias_on_another_device_is_refused_by_name(device: str) -> None:
    weight, other = torch.zeros(9, 4, device=device), "meta" if device == "cpu" else "cpu"
    with pytest.raises(ValueError, match=f"^head.bias: expected device {weight.device}, found {other}$"):
        LMHead(weight, torch.zeros(9, device=other))


# Addresses.


def one_further(x: Tensor) -> Tensor:
    """The same values, contiguous, but one element past an aligned address."""
    room = x.new_empty(x.numel() + 1)
    room[1:] = x.flatten()
    return room[1:].view(x.shape)


def with_one_further(s: HeadSample, *names: str) -> HeadSample:
    weight, bias = (one_further(x) if name in names else x for name, x in vars(s.head).items() if name in "weight bias")
    moved = {name: one_further(getattr(s, name)) for name in names if name not in ("weight", "bias")}
    return replace(s, head=replace(s.head, weight=weight, bias=bias), **moved)


@over_fused_backends
@pytest.mark.parametrize("d", [64, 65, 136])
@pytest.mark.parametrize(
    "names",
    [("hidden",), ("weight",), ("hidden", "weight", "bias", "targets", "cu_seqlens", "token_weights")],
    ids=lambda names: names[0] if len(names) == 1 else "all",
)
def test_unaligned_memory(backend: str | None, device: str, dtype: torch.dtype, d: int, names: tuple[str, ...]) -> None:
    shape = Shape((67, 3), d, 1105, "more tokens than a tile of 64 has; d of aligned rows, and an odd one")
    s = with_one_further(sample(shape, dtype, device, kind="random", options=OPTIONS["bias"]), *names)
    assert all(x.is_contiguous() for x in (s.hidden, s.head.weight))
    exact = head_cases.oracle(shape, dtype, device, "random", OPTIONS["bias"])
    g = upstream(s)
    with use_backend(backend):
        found = head_cases.features(s)
        testing.assert_bounds(found, exact, s.cu_seqlens)
        testing.assert_bounds(head_cases.features(s, lse=one_further(found.lse)), exact, s.cu_seqlens)
        testing.assert_gradients(testing.gradients(s, *map(one_further, g)), *testing.oracle_gradients(s, *g))


@over_backends("g2rl_advantages", dtypes=(torch.float32,))
@pytest.mark.parametrize("d", [64, 65])
def test_unaligned_memory_of_the_group_op(backend: str | None, device: str, dtype: torch.dtype, d: int) -> None:
    random = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(7, d, generator=random).to(device),
        torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0], device=device),
        torch.tensor([0, 4, 7], device=device),
        torch.tensor([True, True, False, True, True, True, True], device=device),
    )
    with use_backend(backend):
        aligned, moved = (
            g2rl_advantages(*given[:3], valid=given[3]) for given in (inputs, [one_further(x) for x in inputs])
        )
    # Sums in float64, perhaps in another order, and roundings of numbers of order one.
    torch.testing.assert_close(tuple(moved), tuple(aligned), rtol=1e-6, atol=1e-6)


# Sizes.


@over_backends(*HEAD_OPS, dtypes=(torch.bfloat16, torch.float32), but=("torch", "reference"))
@pytest.mark.parametrize("d", [16384, 16391])
@pytest.mark.parametrize("plan", PLANS[:3])
def test_no_plan_holds_only_so_many_hidden_units(
    backend: str | None, device: str, dtype: torch.dtype, d: int, plan: str, request: pytest.FixtureRequest
) -> None:
    shape = Shape((3, 2), d, 300, "rows longer than any shared memory")
    s = sample(shape, dtype, device, kind="random", options=OPTIONS["plain"])
    lse = head_cases.given(plan, s, request)
    exact = head_cases.oracle(shape, dtype, device, "random", OPTIONS["plain"])
    g = upstream(s)
    with use_backend(backend):
        found = head_cases.features(s, lse=lse)
        testing.assert_bounds(found, exact, s.cu_seqlens, testing.accumulation_error(s))
        testing.assert_gradients(testing.gradients(s, *g), *testing.oracle_gradients(s, *g))


# The response that holds token 2^31 / V of the large shape is the one of index 256, from token 16353 on.
TOKENS = (33, *(64,) * 257, 3)
LARGE = 1 << 17
SMALLER = 1105


@pytest.fixture
def memory_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One at a time of the tests that take gigabytes of a GPU; none of it stays reserved."""
    # The parent is what the processes of one run share.
    with FileLock(tmp_path_factory.getbasetemp().parent / "large-shapes.lock"):
        yield
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def of_responses(s: HeadSample, first: int, last: int) -> tuple[HeadSample, slice]:
    """Responses first to last - 1 by themselves, in memory of their own, and which tokens they are."""
    start, end = int(s.cu_seqlens[first]), int(s.cu_seqlens[last])
    rows = slice(start, end)
    hidden, targets, weights = (x[rows].clone() for x in (s.hidden, s.targets, s.token_weights))
    return HeadSample(hidden, s.head, targets, s.cu_seqlens[first : last + 1] - start, weights), rows


@over_backends(*HEAD_OPS, dtypes=(torch.bfloat16, torch.float32), but=("reference",))
@pytest.mark.parametrize("d", [16, 15])
@pytest.mark.parametrize("plan", PLANS[:3])
def test_more_logits_than_32_bits_count(
    backend: str | None,
    device: str,
    dtype: torch.dtype,
    d: int,
    plan: str,
    memory_of_its_own: None,
    request: pytest.FixtureRequest,
) -> None:
    """Tokens on both sides of the 2^31st logit against float64, and alone: the same bits. On a CPU in small."""
    V = LARGE if device == "cuda" else SMALLER
    shape = Shape(TOKENS, d, V, "token 16384 of 16484 begins at logit 2^31")
    workspace_bytes = 6 * shape.N * V if plan == "kept" and backend != "torch" else None
    if device == "cuda" and torch.cuda.mem_get_info()[0] < (workspace_bytes or 0) + (4 << 30):
        pytest.skip(f"needs {((workspace_bytes or 0) >> 30) + 4} GiB of free memory")
    s = sample(shape, dtype, device, kind="random", options=OPTIONS["plain"])
    with use_backend(backend):
        lse = None
        if plan == "given":
            lse = token_logprobs(s.hidden, s.head, s.targets).lse
        elif plan == "kept":
            request.getfixturevalue("kept")
        found = head_cases.features(s, lse=lse, workspace_bytes=workspace_bytes)
        for b in (0, 128, 255, 256, 257, 258):
            part, rows = of_responses(s, b, b + 1)
            here = SequenceFeatures(found.features[b : b + 1], *(x[rows] for x in found[1:]))
            testing.assert_bounds(here, testing.oracle(part))
            lse_of_part = None if lse is None else lse[rows].clone()
            alone = head_cases.features(part, lse=lse_of_part, workspace_bytes=workspace_bytes)
            if backend == "torch" and device == "cuda":  # whose products are the library's, with bits of their batch
                testing.assert_bounds(alone, testing.oracle(part))
            else:
                assert_same_bits(alone._asdict(), here._asdict())


@over_backends(*HEAD_OPS, dtypes=(torch.bfloat16, torch.float32), but=("torch", "reference"))
@pytest.mark.parametrize("d", [16, 15])
def test_gradients_of_more_logits_than_32_bits_count(
    backend: str | None, device: str, dtype: torch.dtype, d: int, memory_of_its_own: None
) -> None:
    """All gradients of logits at one time, and in strips."""
    V = LARGE if device == "cuda" else SMALLER
    shape = Shape(TOKENS, d, V, "token 16384 of 16484 begins at logit 2^31")
    workspace_bytes = shape.N * V * dtype.itemsize
    if device == "cuda" and torch.cuda.mem_get_info()[0] < workspace_bytes + (4 << 30):
        pytest.skip(f"needs {(workspace_bytes >> 30) + 4} GiB of free memory")
    s = sample(shape, dtype, device, kind="random", options=OPTIONS["plain"])
    g = upstream(s)
    with use_backend(backend):
        at_once = testing.gradients(s, *g, workspace_bytes)
        in_strips = testing.gradients(s, *g, workspace_bytes // 8)
    for b in (0, 256, 258):
        part, rows = of_responses(s, b, b + 1)
        exact, allowed = testing.oracle_gradients(part, *(x[rows] for x in g))
        of_hidden = testing.Gradients(at_once.hidden[rows], None, None)
        testing.assert_gradients(of_hidden, exact, allowed)
    # Sums over tokens: the same numbers, in another order and then rounded.
    difference = (at_once.weight.double() - in_strips.weight.double()).norm() / in_strips.weight.double().norm()
    assert float(difference) <= 2 * testing.ROUNDOFF[dtype] + 1e-5
