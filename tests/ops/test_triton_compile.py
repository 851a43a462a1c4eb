"""Every Triton kernel, in every launch configuration, compiled to machine code for its chips, without a GPU.

Fails for what no test of values finds: registers spilled to memory, more shared memory than the chip has, products that
do not reach the tensor cores, arithmetic that became fp64.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from g2rl_kernels.backends import triton
from g2rl_kernels.backends.triton import configs, triton_version
from g2rl_kernels.backends.triton.candidates import candidates
from g2rl_kernels.backends.triton.compilation import Case, Compiled, compiled_in_parallel, misfits, product_case
from g2rl_kernels.backends.triton.configs import Chip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(configs.interpreted(), reason="kernels are not compiled under TRITON_INTERPRET"),
]

CHIPS: tuple[Chip, ...] = (80, 90, 100, "gfx90a", "gfx942")
# The instruction of each chip's tensor or matrix cores.
TENSOR_CORE = {
    80: "mma.sync",
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
    "gfx90a": "v_mfma_f32_",
    "gfx942": "v_mfma_f32_",
}


def dtypes(kernel: str, half: bool) -> tuple[str, ...]:
    """The one that asks most of a kernel; the projection takes R apart in different ways."""
    if half:
        asks_most = {"projection": ("bf16", "fp16"), "grad_logits-scaled": ("fp16",), "grad_logits-softcap": ("fp16",)}
        return asks_most.get(kernel, ("bf16",))
    return ("fp32",)


def product_cases() -> Iterator[Case]:
    for kernel, half in configs.AMD_TILES:
        for chip in CHIPS:
            # Rows that TMA cannot address take an older chip's tile. Candidates stand for AMD chips of one kind.
            tiles = dict.fromkeys(configs.tile_for(kernel, half, chip, tma) for tma in (True, False))
            if chip != "gfx90a":
                tiles |= dict.fromkeys(candidates(kernel, half, chip))
            for tile, dtype in itertools.product(tiles, dtypes(kernel, half)):
                yield product_case(kernel, dtype, chip, tile)


def other_cases() -> Iterator[Case]:
    """Kernels without a product of vocabulary size; their tiles do not follow the chip."""
    flags = {"SOFTCAP": True}
    merge = flags | {"GIVEN": False, "FEATURES": True, "BLOCK_N": 32, "BLOCK_SPLITS": 32}
    for kernel, constants in (
        ("merge._merge_kernel", merge),
        ("merge._merge_kernel", merge | {"GIVEN": True}),
        ("responses._responses_kernel", {"GIVEN": True, "BLOCK_N": 256}),
        ("responses._flagged_kernel", {"BLOCK_B": 1024}),
        ("targets._targets_kernel", {"BLOCK_N": 32, "BLOCK_V": 512}),
        ("kept._kept_kernel", flags | {"BLOCK_V": 512, "TOKENS": 4, "SEGMENT": 512}),
        ("projection._join_kernel", {"BLOCK": 1024}),
    ):
        for chip in CHIPS:
            yield Case(kernel, "bf16", chip, 4, 3, tuple(constants.items()))
    for block_m, warps in ((16, 4), (triton._MOST, 8)):
        constants = {
            "HAS_VALID": True,
            "RULE": 2,
            "DROP_UNIFORM": True,
            "DIVIDE_BY_STD": True,
            "BLOCK_M": block_m,
            "BLOCK_ROWS": 16,
            "BLOCK_D": 32,
        }
        for chip in CHIPS:
            yield Case("groups._group_kernel", "fp32", chip, warps, 3, tuple(constants.items()))


def smallest_cases() -> Iterator[Case]:
    """A vocabulary or hidden size of 1: the compiler takes integers that are 1 for constants, which have no methods."""
    ones = {
        "statistics": ("V", "D", "stride_h", "stride_w"),
        "residuals": ("V", "D", "stride_h", "stride_w"),
        "grad_logits": ("D", "v_end", "stride_h", "stride_w", "stride_rows", "stride_g"),
        "projection": ("V", "D", "stride_w"),
        "merge": ("splits", "stride_results"),
        "kept": ("V", "tiles", "stride_kept", "stride_terms"),
        "targets": ("V", "tiles"),
        "groups": ("D", "m_max", "stride_f"),
    }
    seen = set()
    for case in [*product_cases(), *other_cases()]:
        module = case.kernel.split(".")[0]
        if case.chip == 90 and module in ones and case.kernel not in seen and "_join" not in case.kernel:
            seen.add(case.kernel)
            constants = (*case.constants, *((name, 1) for name in ones[module]))
            # Rows of one element cannot be addressed by TMA.
            constants = tuple((name, False if name == "USE_TMA" else value) for name, value in constants)
            yield case._replace(constants=constants, tma=False)


PRODUCTS = list(product_cases())
CASES = [*PRODUCTS, *other_cases()]
SMALLEST = list(smallest_cases())


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[Case, Future[Compiled]]]:
    with compiled_in_parallel(CASES + SMALLEST) as futures:
        yield futures


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_fits_the_chip(case: Case, compiled: dict[Case, Future[Compiled]]) -> None:
    if case.kernel == "groups._group_kernel" and case.chip == "gfx942" and triton_version() < (3, 8):
        pytest.skip("this Triton does not compile fp64 products for gfx942")
    result = compiled[case].result()
    assert not misfits(case, result)
    if case.kernel in ("residuals._residuals_kernel", "targets._targets_kernel"):  # long sums, and nothing but sums
        assert not re.search(r"(mul|fma|div|exp?2?)[\w.]*[._]f64", result.assembly)
    elif case.kernel != "groups._group_kernel":
        assert not re.search(r"[._]f64", result.assembly)
    if case.tma:
        assert "cp.async.bulk.tensor" in result.assembly


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products_reach_the_right_units(case: Case, compiled: dict[Case, Future[Compiled]]) -> None:
    result = compiled[case].result()
    if case.dtype != "fp32":
        assert TENSOR_CORE[case.chip] in result.assembly
    elif isinstance(case.chip, int):
        assert not any(unit in result.assembly for unit in TENSOR_CORE.values()), "fp32 products must be exact"
    else:
        # AMD's matrix cores have exact fp32 products, beside some of 10 bits and of three bf16 terms.
        units = set(re.findall(r"v_mfma_\w+", result.assembly))
        assert units and all(re.fullmatch(r"v_mfma_f32_\d+x\d+x\d+_?f32", unit) for unit in units)


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_each_tile_is_summed_from_zero(case: Case, compiled: dict[Case, Future[Compiled]]) -> None:
    """A chain of thousands of products loses too much, most of all in tensor cores: see `tiles.dot_rows`."""
    sums = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", compiled[case].result().ttir)
    # The projection adds three terms of a tile before it starts anew.
    assert sums and sum(not start.startswith("%cst") for start in sums) <= 2 * case.kernel.startswith("projection")


@pytest.mark.parametrize("case", SMALLEST, ids=str)
def test_sizes_of_one_compile(case: Case, compiled: dict[Case, Future[Compiled]]) -> None:
    assert compiled[case].result().registers > 0
