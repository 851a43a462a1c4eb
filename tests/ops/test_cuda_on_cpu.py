"""The cuda backend on CPU tensors: kernels compiled as C++, where every CUDA thread is a fibre, held to the contract.

That is slow, thousands of threads by turns: shapes are small, and each is ragged against the kernels' tiles. Loads and
formats of the kernels, one by one, are tested in csrc/tests; here the launchers, the plans and the op around them.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from head_cases import (
    PLANS,
    WRONG_LSE,
    check,
    check_gradients,
    check_gradients_of_masked_words,
    check_logits_beyond_the_digits_of_fp32,
    check_lse_of_something_else,
    check_masked_parts,
    check_masked_words,
    check_parts,
    check_second_response_first,
    check_sure_tokens,
    features,
    given,
    oracle,
    sample,
    upstream,
)

from g2rl_kernels import LMHead, Shaping, dispatch, g2rl_advantages, testing, token_logprobs, use_backend
from g2rl_kernels.backends import cuda
from g2rl_kernels.backends.cuda import kernels, library
from g2rl_kernels.plans import head
from g2rl_kernels.records import Head, Responses
from g2rl_kernels.testing import OPTIONS, Shape
from tests.live_memory import LiveMemory

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"  # that of setup.py and of `make ctest`
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))

# d = 64 leaves rows of 16-bit numbers aligned, which the kernels for Hopper ask for; with d = 63 the others serve.
ALIGNED = Shape((5, 0, 9, 1), 64, 200, "Hopper: a tile of words and a ragged one, an empty and a one-token response")
RAGGED = Shape((5, 0, 9, 1), 63, 200, "the same for the other kernels, with an odd d")
LONG = Shape((37, 1), 72, 70, "tokens beyond one small tile, d beyond one stage, V less than a tile")
SHAPES = (
    Shape((), 16, 64, "no responses"),
    Shape((0,), 16, 64, "no tokens, one empty response"),
    Shape((3, 2), 1, 1, "a vocabulary of one word: nothing but the target"),
    LONG,
)


@pytest.fixture(scope="module")
def on_cpu():  # noqa: ANN201
    """The module, built where it is not up to date."""
    if sys.platform == "darwin":
        pytest.skip("the kernels are not built for macOS, which has no CUDA")
    if not shutil.which("cmake", path=PATH) or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("needs CMake and a C++ compiler")
    configure = ["cmake", "-S", ROOT, "-B", BUILD, f"-DPython_EXECUTABLE={sys.executable}", "-DG2RL_WITH_CUDA=off"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "on_cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that share the tests would write the same files
        for command in (configure, ["cmake", "--build", BUILD, "--parallel", "2", "--target", "_cuda_on_cpu"]):
            run = subprocess.run(command, env=os.environ | {"PATH": PATH}, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    (file,) = (BUILD / "on_cpu").glob("_cuda_on_cpu.*")
    spec = importlib.util.spec_from_file_location("_cuda_on_cpu", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend(on_cpu, monkeypatch: pytest.MonkeyPatch):  # noqa: ANN001, ANN201
    monkeypatch.setattr(library, "_on_cpu", on_cpu)
    with use_backend("cuda"):
        yield on_cpu


def test_beside_the_kernels_of_a_gpu(on_cpu: ModuleType) -> None:
    """Types of the same names, none of them defined twice."""
    of_gpu = pytest.importorskip("g2rl_kernels._cuda", reason="CUDA kernels are not built here")
    assert of_gpu.Tokens is not on_cpu.Tokens


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize("plan", PLANS)
def test_plans(plan: str, shape: Shape, dtype: torch.dtype, backend, request: pytest.FixtureRequest) -> None:  # noqa: ANN001
    """An lse that is off makes the kernel compute the response again; one that is exact does not."""
    lse = given(plan, sample(shape, dtype, kind="peaked", options=OPTIONS["together"]), request)
    check(shape, dtype, "peaked", OPTIONS["together"], lse=lse)


@pytest.mark.slow
@pytest.mark.parametrize("off", [20.0, -20.0])
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
def test_an_lse_of_another_head(shape: Shape, off: float, backend) -> None:  # noqa: ANN001
    check(shape, torch.float16, lse=oracle(shape, torch.float16, "cpu", "random", OPTIONS["plain"]).lse.float() + off)


@pytest.mark.parametrize("given", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sure_tokens(dtype: torch.dtype, shape: Shape, given: bool, backend) -> None:  # noqa: ANN001
    check_sure_tokens(shape, dtype, given=given)


@pytest.mark.parametrize("wrong", WRONG_LSE[-3:])
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
def test_an_lse_of_something_else(shape: Shape, wrong: float, backend) -> None:  # noqa: ANN001
    check_lse_of_something_else(shape, torch.float16, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_beyond_the_digits_of_fp32(dtype: torch.dtype, backend) -> None:  # noqa: ANN001
    check_logits_beyond_the_digits_of_fp32(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["plain", "together"])
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
def test_parts_of_the_vocabulary(shape: Shape, options: str, backend) -> None:  # noqa: ANN001
    """Rows of a part, too, are aligned where d is: Hopper's kernels serve one of the shapes."""
    check_parts(sample(shape, torch.float16, kind="peaked", options=OPTIONS[options]), (0, 1, 140, 200))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize("plan", PLANS[:3])
def test_masked_words(plan: str, shape: Shape, backend, request: pytest.FixtureRequest) -> None:  # noqa: ANN001
    s = sample(shape, torch.bfloat16, kind="random", options=OPTIONS["bias"])
    check_masked_words(shape, torch.bfloat16, lse=given(plan, s, request))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
def test_gradients_and_parts_of_masked_words(shape: Shape, backend) -> None:  # noqa: ANN001
    check_gradients_of_masked_words(shape, torch.bfloat16)
    check_masked_parts(sample(shape, torch.bfloat16, kind="random", options=OPTIONS["bias"]), (0, 1, 140, 200))


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS[:3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"N{shape.N}-d{shape.d}-V{shape.V}")
def test_shapes(shape: Shape, plan: str, backend, request: pytest.FixtureRequest) -> None:  # noqa: ANN001
    s = sample(shape, torch.float16, kind="random", options=OPTIONS["plain"])
    check(shape, torch.float16, lse=given(plan, s, request))
    testing.assert_bounds(
        token_logprobs(s.hidden, s.head, s.targets), oracle(shape, torch.float16, "cpu", "random", OPTIONS["plain"])
    )


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS[:3])
@pytest.mark.parametrize("d", [64, 63])
def test_responses_of_a_token_with_few_words(d: int, plan: str, backend, request: pytest.FixtureRequest) -> None:  # noqa: ANN001
    shape = Shape((1,) * 12, d, 200, "nothing that errors of logits average over")
    s = sample(shape, torch.bfloat16, kind="spread", options=OPTIONS["plain"])
    check(shape, torch.bfloat16, "spread", lse=given(plan, s, request))


@pytest.mark.slow
@pytest.mark.parametrize("options", ["bias", "softcap"])
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
def test_workspace_cuts_tokens_and_responses(shape: Shape, options: str, backend, kept: None) -> None:  # noqa: ANN001
    check(shape, torch.bfloat16, options=OPTIONS[options], workspace_bytes=7 * shape.V * 6)


@pytest.mark.parametrize("plan", PLANS[:3])
def test_responses_without_tokens_have_none_of_the_memory(
    plan: str,
    backend,  # noqa: ANN001
    poisoned_memory: None,
    request: pytest.FixtureRequest,
) -> None:
    """The workspace takes one response at a time."""
    shape = Shape((0, 2, 0, 0, 3), 16, 40, "empty responses alone and together")
    lse = given(plan, sample(shape, torch.float16, kind="random", options=OPTIONS["plain"]), request)
    found = check(shape, torch.float16, lse=lse, workspace_bytes=1)
    assert not found.features[[0, 2, 3]].any()


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS[:3])
@pytest.mark.parametrize("d", [64, 63])
def test_long_response_of_the_policy_itself(d: int, plan: str, backend, request: pytest.FixtureRequest) -> None:  # noqa: ANN001
    """Over segments, and chunks of tokens where they are kept."""
    shape = Shape((4096, 130), d, 64, "far more tokens than words")
    s = sample(shape, torch.bfloat16, kind="drawn", options=OPTIONS["plain"])
    found = features(s, lse=given(plan, s, request), workspace_bytes=1500 * 4 * 64)
    testing.assert_bounds(found, testing.oracle(s), s.cu_seqlens)


@pytest.mark.slow
def test_responses_are_projected_some_at_a_time(backend, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    s = sample(ALIGNED, torch.bfloat16, kind="random", options=OPTIONS["plain"])
    at_once = features(s).features
    monkeypatch.setattr(head._Batch, "projected", lambda batch, responses: 3)
    assert torch.equal(features(s).features, at_once)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["kept", "given"])
def test_a_call_stays_within_its_workspace(plan: str, backend, request: pytest.FixtureRequest) -> None:  # noqa: ANN001
    """All that is as large as a row of logits, together, and where tokens and responses are cut."""
    shape = Shape((1, 2) * 33, 64, 1000, "R of all responses would take more than the workspace")
    s = sample(shape, torch.bfloat16, kind="random", options=OPTIONS["plain"])
    lse = given(plan, s, request)
    workspace_bytes = 700 * shape.V  # 256 for the 64 responses of one tile of the projection, three terms of each
    with LiveMemory(least=shape.V * 4) as memory:
        cuda.sequence_features(s.hidden, s.record, s.targets, Responses(s.cu_seqlens, None, lse), workspace_bytes)
    assert memory.peak <= workspace_bytes


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS[:3])
@pytest.mark.parametrize("d", [64, 63])
def test_bits_of_a_response_are_its_own(d: int, plan: str, backend, request: pytest.FixtureRequest) -> None:  # noqa: ANN001
    """Twice the same, and the same elsewhere in the batch."""
    s = sample(
        Shape((21, 1), d, 70, "a response that moves by one token"),
        torch.float16,
        kind="random",
        options=OPTIONS["plain"],
    )
    lse = given(plan, s, request)
    limit = 2**28 if plan == "given" else 11 * 70 * 6
    together = features(s, lse=lse, workspace_bytes=limit)
    again = features(s, lse=lse, workspace_bytes=limit)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    check_second_response_first(s, lse=lse, workspace_bytes=limit)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_gradients_of_no_tokens(frozen: bool, backend, poisoned_memory: None) -> None:  # noqa: ANN001
    hidden, weight = torch.zeros(0, 16, requires_grad=True), torch.ones(9, 16, requires_grad=not frozen)
    out = token_logprobs(hidden, LMHead(weight), torch.zeros(0, dtype=torch.int64))
    (out.logps.sum() + out.entropy.sum()).backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 16)
    assert weight.grad is None if frozen else torch.equal(weight.grad, torch.zeros(9, 16))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize(
    ("dtype", "kind", "options", "rows"),
    [
        (torch.float32, "random", "together", 1000),
        (torch.float16, "peaked", "softcap", 1000),
        (torch.float16, "bias+", "together", 9),  # a saturated cap: G is 1e-13 of its bound
        (torch.float16, "random", "bias", 9),
        (torch.bfloat16, "bias+", "plain", 1000),
        (torch.bfloat16, "random", "plain", 0),
    ],
)
def test_gradients(shape: Shape, dtype: torch.dtype, kind: str, options: str, rows: int, backend) -> None:  # noqa: ANN001
    """A workspace that cuts both ways."""
    s = sample(shape, dtype, kind=kind, options=OPTIONS[options])
    check_gradients(s, workspace_bytes=max(1, rows * shape.V * dtype.itemsize))


@pytest.mark.slow
def test_gradients_of_logits_take_the_workspace(backend, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ANN001
    """In fp16 there are two, one for each product."""
    shape = Shape((66,), 16, 1000, "strips of words for all tokens at once")
    s = sample(shape, torch.float16, kind="random", options=OPTIONS["plain"])
    taken = []
    grad_logits = kernels.CudaKernels.grad_logits

    def spy(self: kernels.CudaKernels, *arguments: object) -> None:
        taken.append(sum(x.untyped_storage().nbytes() for x in arguments[5:7]))
        grad_logits(self, *arguments)

    monkeypatch.setattr(kernels.CudaKernels, "grad_logits", spy)
    workspace_bytes = 40000
    testing.gradients(s, *upstream(s), workspace_bytes)
    assert len(taken) > 2 and max(taken) <= workspace_bytes


@pytest.mark.slow
def test_alignment_chooses_the_kernels(backend) -> None:  # noqa: ANN001
    """Rows that TMA cannot read are served too, by the kernels that any chip has."""
    head = Head(torch.randn(70, 64).bfloat16(), None)
    targets = torch.zeros(5, dtype=torch.int64)
    wide = torch.randn(5, 80).bfloat16()
    for hidden, generation in (
        (wide[:, :64], backend.sm90),
        (wide[:, 8:72], backend.sm90),
        (wide[:, 1:65], backend.sm80),  # starts two bytes later
        (torch.randn(5, 67).bfloat16()[:, :64], backend.sm80),  # rows 134 bytes apart
    ):
        assert kernels.CudaKernels.of(hidden, head, targets).generation is generation
    whole = Head(head.weight.float(), None)
    assert kernels.CudaKernels.of(wide[:, :64].float(), whole, targets).generation is backend.sm80


@pytest.mark.slow
def test_group_op(backend) -> None:  # noqa: ANN001
    random = torch.Generator().manual_seed(0)
    cu_groups = torch.tensor([0, 3, 4, 4, 11])
    phi, rewards = torch.randn(11, 37, generator=random), torch.randint(0, 2, (11,), generator=random).float()
    valid = torch.rand(11, generator=random) > 0.2
    for rule in ("scale", "centered", "literal"):
        for mask, normalize in ((None, "std"), (valid, "none")):
            found = g2rl_advantages(phi, rewards, cu_groups, Shaping(0.7, 1.5, rule), mask, normalize=normalize)
            with use_backend("reference"):
                expected = g2rl_advantages(phi, rewards, cu_groups, Shaping(0.7, 1.5, rule), mask, normalize=normalize)
            torch.testing.assert_close(found, expected, rtol=3e-7, atol=3e-7)


@pytest.mark.slow
def test_a_group_beyond_shared_memory_is_refused_by_name(backend) -> None:  # noqa: ANN001
    B = backend.most_members() + 1
    message = f"cannot run g2rl_advantages .*: groups: expected at most {B - 1} responses in a group, found {B}"
    features, rewards = torch.randn(B, 4), torch.randn(B)
    for groups in (B, torch.tensor([0, B])):
        with pytest.raises(RuntimeError, match=message):
            g2rl_advantages(features, rewards, groups, Shaping())


def test_a_cpu_is_not_served_by_accident() -> None:
    with use_backend("cuda"), pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        dispatch.resolve("token_logprobs", torch.device("cpu"), torch.float32)
    assert cuda.unavailable(torch.device("cuda", 0), torch.float64) == "expected bf16, fp16 or fp32, found float64"


@pytest.mark.parametrize(
    ("capability", "architectures", "reason"),
    [
        ((9, 0), "80 90a 100", None),
        ((8, 9), "80 90a 100", None),
        ((12, 0), "80", None),  # from PTX
        ((8, 0), "90a", "compiled for 90a, but the GPU has compute capability 8.0: build with its own"),
        ((7, 5), "80 90a", "needs compute capability 8.0 or higher, found 7.5"),
    ],
)
def test_code_for_another_chip_is_said(capability: tuple[int, int], architectures: str, reason: str | None) -> None:
    assert library.missing_code(capability, architectures) == reason


class FakeModule:
    """A compiled module as `library.refusal` asks it."""

    def __init__(self, architectures: str = "80 90a", error: str = "") -> None:
        self.architectures, self.error = architectures, error

    def driver_error(self) -> str:
        return self.error


@pytest.mark.parametrize(
    ("module", "shared", "reason"),
    [
        (FakeModule(), 232448, None),
        (FakeModule(error="cudaErrorInsufficientDriver: built with CUDA 13.0, and the driver knows CUDA 12.4"), 232448,
         "cannot run here: cudaErrorInsufficientDriver: built with CUDA 13.0, and the driver knows CUDA 12.4"),
        (FakeModule("100"), 232448, "compiled for 100, but the GPU has compute capability 9.0: build with its own"),
        (FakeModule(), 65536, "needs 101376 bytes of shared memory for a block, found 65536"),
    ],
)  # fmt: skip
def test_what_a_device_lacks_is_said_and_others_serve(
    module: FakeModule, shared: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = pretend_gpu(monkeypatch, (9, 0), shared)
    monkeypatch.setattr(library, "_load", lambda: (module, None))
    monkeypatch.setattr(library, "refusal", library.refusal.__wrapped__)
    assert library.refusal(gpu) == reason
    for op in dispatch.OPS[:3]:
        ours = dispatch.resolve(op, gpu, torch.bfloat16).__module__ == "g2rl_kernels.backends.cuda.head"
        assert ours == (reason is None)
        if reason:
            with use_backend("cuda"), pytest.raises(RuntimeError, match=f"cannot run {op} on cuda .*{reason}"):
                dispatch.resolve(op, gpu, torch.bfloat16)


@pytest.mark.parametrize(
    ("capability", "shared", "runs"),
    [((9, 0), 232448, True), ((9, 0), 166912, False), ((8, 0), 232448, False), ((10, 0), 232448, False)],
)
def test_kernels_of_hopper_ask_for_its_shared_memory(
    capability: tuple[int, int], shared: int, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = pretend_gpu(monkeypatch, capability, shared)
    assert library.runs_hopper.__wrapped__(gpu) == runs


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], shared: int) -> torch.device:
    properties = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return torch.device("cuda", 0)


def test_a_module_that_is_absent_or_broken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: ImportError):  # noqa: ANN202
        def load(name: str) -> None:
            raise error

        return load

    monkeypatch.setattr(library.importlib, "import_module", fail(ModuleNotFoundError("_cuda")))
    assert "G2RL_WITH_CUDA=on" in library._load.__wrapped__()[1]
    monkeypatch.setattr(library.importlib, "import_module", fail(ImportError("undefined symbol: x")))
    assert "undefined symbol: x" in library._load.__wrapped__()[1]


def test_mutations_apply() -> None:
    """Trying them takes half an hour and is left to `csrc/tests/mutations.py`; each has its place in the sources."""
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "csrc/tests/mutations.py")
    assert spec is not None and spec.loader is not None
    mutations = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = mutations  # where its records look for their types
    spec.loader.exec_module(mutations)
    for m in mutations.MUTATIONS:
        assert (ROOT / "csrc/cuda" / m.file).read_text().count(m.old) == 1, m.name
