"""Every op of the table: registered, correct by PyTorch's own checks, differentiable, and compiled without a break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from backend_cases import DEVICES, every_device
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from g2rl_kernels import (
    LMHead,
    Shaping,
    dispatch,
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
from g2rl_kernels.testing import OPTIONS, HeadSample, Shape, available_backends, head_sample

SHAPE = Shape((3, 0, 4), 5, 11, "small: gradcheck asks for a forward pass for each input value")
compiles_code = pytest.mark.skipif(" " in torch.__file__, reason="inductor links with torch in no folder with a space")
# Ahead-of-time tracing with the cut into forward and backward that inductor makes, without its code.
PARTITIONED = "aot_eager_decomp_partition"
HEAD_OPS = ("token_logprobs", "sequence_features", "logprobs_backward", "token_sums", "part_features")
EVERY_OP = (*dispatch.OPS, "similarity_gradient")  # the last of no backend


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def head_inputs(s: HeadSample) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    bias = None if s.head.bias is None else leaf(s.head.bias)
    return leaf(s.hidden), leaf(s.head.weight), bias, s.targets


def samples(device: str, dtype: torch.dtype = torch.float32) -> dict[str, list[tuple]]:
    """Arguments of each op, as PyTorch sees it: for float inputs in several layouts, with and without optional ones."""
    plain = head_sample(SHAPE, dtype, device)
    full = head_sample(SHAPE, dtype, device, options=OPTIONS["together"])
    transposed = [x.detach().T.contiguous().T.requires_grad_() for x in (plain.hidden, plain.head.weight)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    per_token = [torch.randn(SHAPE.N, generator=torch.Generator().manual_seed(i)).to(device, wide) for i in range(4)]
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(9)).to(device, wide)
    rewards = torch.tensor([1.0, -1, 1, 1, -1, -1], device=device, dtype=wide)
    scores = torch.tensor([0.2, 0.4, 0.6, 0.3, 0.9, 0.5], device=device, dtype=wide)
    valid = torch.tensor([True, True, False, True, True, True], device=device)
    ragged = torch.tensor([0, 1, 1, 6], device=device)
    equal = torch.tensor([0, 3, 6], device=device)
    similarity, of_ragged = group_similarity(features, equal), group_similarity(features, ragged)
    shaping = (1.0, 3.0, "scale", 1e-2, "shape")
    cu = plain.cu_seqlens
    # Of three parts of the vocabulary; the words after the second token's target are in another part.
    sums = torch.randn(4, 3, SHAPE.N, generator=torch.Generator().manual_seed(8)).abs().to(device, wide)
    local = plain.targets.where(plain.targets <= plain.targets[1], -1)
    return {
        "token_logprobs": [
            (*head_inputs(plain), False, *plain.options, 1 << 20),
            (*head_inputs(full), True, *full.options, 1),
            (*transposed, None, plain.targets, False, *plain.options, 1 << 20),
        ],
        "sequence_features": [
            (*head_inputs(plain), cu, None, None, False, *plain.options, 1 << 20),
            (*head_inputs(full), cu.long(), full.token_weights, per_token[0], True, *full.options, 1),
            (*transposed, None, plain.targets, cu, None, None, False, *plain.options, 1 << 20),
        ],
        "logprobs_backward": [
            (
                *per_token[:2],
                plain.hidden,
                plain.head.weight,
                None,
                plain.targets,
                *per_token[1:],
                *plain.options,
                1 << 20,
            )
            + ([True, False, False],),
            (*per_token[:2], full.hidden.T.contiguous().T, full.head.weight.T.contiguous().T, full.head.bias)
            + (full.targets, *per_token[1:], *full.options, 1, [True, True, True]),
        ],
        "token_sums": [
            (plain.hidden, plain.head.weight, None, plain.targets + 5, 5, 16, False, *plain.options, 1 << 20),
            (full.hidden.T.contiguous().T, full.head.weight, full.head.bias, full.targets, 1, 12)
            + (True, *full.options, 1),
        ],
        "part_features": [
            (*head_inputs(plain)[:3], local, cu, None, sums, "", *plain.options, 1 << 20),
            (*head_inputs(full)[:3], local, cu.long(), full.token_weights, sums, "", *full.options, 1),
            (*transposed, None, local, None, None, sums, "", *plain.options, 1 << 20),
        ],
        "group_similarity": [(leaf(features), equal, 3), (leaf(features), ragged, None)],
        "similarity_gradient": [(similarity, features, equal), (of_ragged, features.T.contiguous().T, ragged)],
        "exploration_scores": [(similarity, rewards, equal, None), (similarity, rewards, equal, valid)],
        "shape_rewards": [(rewards, scores, equal, None, *shaping), (rewards, scores, ragged, valid, *shaping)],
        "group_advantages": [(rewards, equal, "std"), (rewards, ragged, "none")],
        "g2rl_advantages": [
            (leaf(features), rewards, equal, 3, None, *shaping, "std"),
            (features, rewards, ragged, None, valid, *shaping, "none"),
        ],
    }


def test_every_op_of_the_table_is_registered_and_sampled() -> None:
    registered = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("g2rl::")
    }
    assert registered == set(EVERY_OP) == set(samples("cpu"))


@pytest.mark.parametrize(
    ("op", "backend", "device"),
    [
        pytest.param(op, backend, device, marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device in DEVICES
        for op in EVERY_OP
        for backend in (available_backends(device, torch.float32, (op,)) if op in dispatch.OPS else ("torch",))
    ],
)
def test_opcheck(op: str, backend: str, device: str) -> None:
    """Schema, autograd registration, shapes and strides of the fake, and the compiler's two traces."""
    for dtype in (torch.float32, torch.bfloat16) if op in HEAD_OPS else (torch.float32,):
        for args in samples(device, dtype)[op]:
            with use_backend(backend):
                torch.library.opcheck(getattr(torch.ops.g2rl, op).default, args)


@every_device
@pytest.mark.parametrize("op", EVERY_OP)
def test_fake_results_match_real_ones(op: str, device: str) -> None:
    """Shape, dtype, device and strides, without data."""
    for dtype in (torch.bfloat16, torch.float64):
        for args in samples(device, dtype)[op]:
            function = getattr(torch.ops.g2rl, op)
            real = function(*args)
            with FakeTensorMode(shape_env=ShapeEnv()) as mode:
                fake = function(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args))
            for found, expected in zip(as_tuple(fake), as_tuple(real), strict=True):
                assert (found.dtype, found.device) == (expected.dtype, expected.device)
                assert found.requires_grad == expected.requires_grad
                # The size of the largest of ragged groups is known at run time alone.
                sizes = list(zip(found.shape, expected.shape, strict=True))
                assert all(size == want for size, want in sizes if isinstance(size, int))
                if all(isinstance(size, int) for size, _ in sizes):
                    assert found.stride() == expected.stride()


def test_meta_tensors_have_shapes() -> None:
    hidden, weight = torch.empty(7, 5, device="meta"), torch.empty(11, 5, device="meta")
    targets, cu = torch.empty(7, dtype=torch.int64, device="meta"), torch.empty(4, dtype=torch.int32, device="meta")
    out = sequence_features(hidden, weight, targets, cu)
    assert [list(x.shape) for x in out] == [[3, 5], [7], [7], [7]]
    assert all(x.device.type == "meta" and x.dtype == torch.float32 for x in out)
    features, rewards = torch.empty(6, 5, device="meta"), torch.empty(6, device="meta")
    result = g2rl_advantages(features, rewards, 3)
    assert [list(x.shape) for x in result] == [[6], [6], [6], [2, 3, 3]]


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck_of_the_head(name: str) -> None:
    """logps and entropy in hidden, weight and bias, against finite differences in float64."""
    s = head_sample(SHAPE, torch.float64, options=OPTIONS[name])
    inputs = [leaf(s.hidden), leaf(s.head.weight)] + ([] if s.head.bias is None else [leaf(s.head.bias.double())])

    def head(weight: Tensor, bias: Tensor | None = None) -> LMHead:
        return LMHead(weight, bias, s.head.temperature, s.head.logit_scale, s.head.softcap)

    def logprobs(hidden: Tensor, *of_head: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(hidden, head(*of_head), s.targets)[:2]

    def with_features(hidden: Tensor, *of_head: Tensor) -> tuple[Tensor, Tensor]:
        return sequence_features(hidden, head(*of_head), s.targets, s.cu_seqlens)[1:3]

    assert torch.autograd.gradcheck(logprobs, inputs)
    assert torch.autograd.gradcheck(with_features, inputs)


@pytest.mark.parametrize("groups", [3, torch.tensor([0, 1, 1, 6])], ids=["equal", "ragged"])
def test_gradcheck_of_similarity(groups: int | Tensor) -> None:
    features = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: group_similarity(x, groups), leaf(features))


# Compilation.


def loss_with_head_inside(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    head = LMHead(weight, bias, temperature=0.7, softcap=20.0)
    out = sequence_features(hidden * 2, head, targets, cu_seqlens)
    return (out.logps * out.lse.exp().log()).mean() - 0.1 * out.entropy.sum(), out.features


def loss_of_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    out = token_logprobs(hidden * 2, LMHead(weight, bias), targets)
    return out.logps.sum() + out.entropy.square().sum(), out.lse


def compare_compiled(function: Callable, s: HeadSample, backend: str) -> None:
    eager, compiled = (head_inputs(s) for _ in range(2))
    expected = function(*eager, s.cu_seqlens)
    expected[0].backward()
    # Inductor's cache of graphs does not tell instruction sets apart: what another ATEN_CPU_CAPABILITY left there does
    # not compile, or gives wrong sums.
    with torch._inductor.config.patch(fx_graph_cache=False):
        found = torch.compile(function, fullgraph=True, backend=backend)(*compiled, s.cu_seqlens)
        found[0].backward()
    # The op itself is the same; what surrounds it is a handful of fp32 roundings, in another order.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for x, y in zip(compiled[:3], eager[:3], strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6)


@every_device
@pytest.mark.parametrize(
    ("function", "backend"),
    [
        (loss_with_head_inside, PARTITIONED),
        (loss_of_logprobs, PARTITIONED),
        # One compilation to machine code is enough: the graphs hold the ops as they are.
        pytest.param(loss_with_head_inside, "inductor", marks=compiles_code),
    ],
)
def test_compiled_head_equals_eager(function: Callable, backend: str, device: str) -> None:
    compare_compiled(function, head_sample(SHAPE, torch.float32, device, options=OPTIONS["bias"]), backend)


@every_device
def test_compiled_head_from_outside(device: str) -> None:
    """As in a trainer: the head belongs to the model, the step is compiled."""
    s = head_sample(SHAPE, torch.float32, device, options=OPTIONS["together"])
    head = LMHead(leaf(s.head.weight), leaf(s.head.bias), *s.options)

    def step(hidden: Tensor) -> Tensor:
        out = sequence_features(hidden, head, s.targets, s.cu_seqlens, s.token_weights)
        return out.logps.sum() + out.entropy.sum() + out.features.sum()

    gradients = []
    for run in (step, torch.compile(step, fullgraph=True, backend=PARTITIONED)):
        hidden = leaf(s.hidden)
        head.weight.grad = head.bias.grad = None
        loss = run(hidden)
        loss.backward()
        gradients.append((loss.detach(), hidden.grad, head.weight.grad, head.bias.grad))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_one_compilation_serves_every_batch() -> None:
    """N and B change from batch to batch; recompiling for each would be the end of it."""
    counter = CompileCounterWithBackend(PARTITIONED)
    compiled = torch.compile(loss_with_head_inside, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for lengths in ((3, 4), (9, 2, 6), (5, 5, 5, 8), (31, 2)):
        s = head_sample(Shape(lengths, 5, 11, ""), options=OPTIONS["bias"])
        inputs, plain = head_inputs(s), head_inputs(s)
        found, expected = compiled(*inputs, s.cu_seqlens), loss_with_head_inside(*plain, s.cu_seqlens)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        found[0].backward()
        expected[0].backward()
        torch.testing.assert_close(inputs[0].grad, plain[0].grad, rtol=1e-5, atol=1e-6)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 4  # PyTorch 2.11 tries twice for the first


def test_similarity_compiles_to_machine_code() -> None:
    """Also where the size of the largest group is known at run time alone, forward and backward."""
    groups = torch.tensor([0, 1, 1, 6])
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    eager, compiled = leaf(features), leaf(features)
    for x, run in (
        (eager, group_similarity),
        (compiled, torch.compile(group_similarity, fullgraph=True, backend="inductor")),
    ):
        with torch._inductor.config.patch(fx_graph_cache=False):
            run(x, groups).backward(torch.ones(3, 5, 5))
    assert torch.equal(compiled.grad, eager.grad)


@pytest.mark.parametrize("groups", [3, torch.tensor([0, 1, 1, 6])], ids=["equal", "ragged"])
def test_compiled_groups_equal_eager(groups: int | Tensor) -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, generator=random)
    rewards = torch.tensor([1.0, -1, 1, -1, 1, -1])

    def one_op(features: Tensor, rewards: Tensor) -> tuple[Tensor, ...]:
        return tuple(g2rl_advantages(features, rewards, groups, Shaping(rule="centered")))

    def composition(features: Tensor, rewards: Tensor) -> tuple[Tensor, ...]:
        S = group_similarity(features, groups)
        nu = exploration_scores(S, rewards, groups)
        shaped = shape_rewards(rewards, nu, groups, Shaping(strength=0.5))
        return group_advantages(shaped, groups), shaped, nu, S

    for function in (one_op, composition):
        eager, compiled = leaf(features), leaf(features)
        expected = function(eager, rewards)
        found = torch.compile(function, fullgraph=True, backend=PARTITIONED)(compiled, rewards)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # The composition's similarity is differentiable, compiled or not.
    (expected[3] ** 2).sum().backward()
    (found[3] ** 2).sum().backward()
    # In float64, whose sums differ in order alone, and rounded once: at most one unit in fp32's last place apart. The
    # floor is what float64 sums leave of entries near 1 that cancel.
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=2.0**-23, atol=1e-14)


@compiles_code
def test_a_whole_step_is_one_graph() -> None:
    """From padded hidden states to the loss, as the README has it, for batches of any size."""
    weight = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))

    def step(states: Tensor, weight: Tensor, ids: Tensor, response_mask: Tensor, rewards: Tensor) -> Tensor:
        scored = response_mask[:, 1:].bool()
        hidden, cu_seqlens = unpad(states[:, :-1], scored)
        out = sequence_features(hidden, LMHead(weight), ids[:, 1:][scored], cu_seqlens)
        result = g2rl_advantages(out.features, rewards, groups=4)
        return (out.logps * result.advantages.repeat_interleave(cu_seqlens.diff())).sum() / len(ids)

    # Inductor, too, has to know that there are as many targets as hidden states.
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="inductor")
    with torch._inductor.config.patch(fx_graph_cache=False):
        for B, L in ((4, 7), (8, 5)):
            random = torch.Generator().manual_seed(B)
            states, rewards = torch.randn(B, L, 5, generator=random), torch.randn(B, generator=random)
            ids = torch.randint(11, (B, L), generator=random)
            response_mask = torch.randint(2, (B, L), generator=random)
            eager, found = leaf(weight), leaf(weight)
            expected = step(states, eager, ids, response_mask, rewards)
            expected.backward()
            loss = compiled(states, found, ids, response_mask, rewards)
            loss.backward()
            # The ops are the same; what surrounds them is a sum of 32 terms below 4 at most, rounded in another order.
            torch.testing.assert_close(loss, expected, rtol=0, atol=32 * 4 * 2**-23)
            torch.testing.assert_close(found.grad, eager.grad, rtol=1e-5, atol=1e-6)


def test_compiled_packing_equals_eager() -> None:
    padded = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])

    def round_trip(padded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        packed, cu_seqlens = unpad(padded, mask)
        return pad(packed * 2, mask), cu_seqlens

    # How many tokens a mask marks is known only at run time.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(round_trip, fullgraph=True, backend=PARTITIONED)(padded, mask)
    torch.testing.assert_close(found, round_trip(padded, mask), rtol=0, atol=0)


def test_compiled_padding_counts_tokens() -> None:
    """One token would be repeated at every marked position."""
    mask = torch.tensor([[0, 1, 0], [0, 1, 1]])
    compiled = torch.compile(pad, fullgraph=True, backend=PARTITIONED)
    assert compiled(torch.tensor([1.0, 2, 3]), mask).tolist() == [[0, 1, 0], [0, 2, 3]]
    for wrong in (1, 2):
        with pytest.raises(RuntimeError):
            compiled(torch.ones(wrong), mask)
    assert compiled(torch.tensor([4.0]), mask * mask.new_tensor([[1], [0]])).tolist() == [[0, 4, 0], [0, 0, 0]]


def test_compiled_programs_check_values_too() -> None:
    s = head_sample(SHAPE)
    compiled = torch.compile(lambda targets: token_logprobs(s.hidden, s.head, targets).logps, backend=PARTITIONED)
    with pytest.raises(IndexError, match=r"targets: expected values in \[0, 11\), found 11"):
        compiled(torch.full_like(s.targets, 11))


@pytest.mark.parametrize("function", [token_logprobs, sequence_features])
def test_compiled_programs_check_that_hidden_is_finite(function: Callable) -> None:
    s = head_sample(SHAPE)
    responses = (s.cu_seqlens,) if function is sequence_features else ()

    @torch.compile(fullgraph=True, backend=PARTITIONED)
    def compiled(hidden: Tensor) -> Tensor:
        return function(hidden, s.head, s.targets, *responses, check_finite=True).logps

    hidden = leaf(s.hidden)
    compiled(hidden).sum().backward()
    eager = leaf(s.hidden)
    function(eager, s.head, s.targets, *responses).logps.sum().backward()
    assert torch.equal(hidden.grad, eager.grad)
    spoilt = s.hidden.clone()
    spoilt[4, 1] = -torch.inf
    with pytest.raises(ValueError, match="hidden: expected finite values, found NaN or inf in row 4"):
        compiled(spoilt)
