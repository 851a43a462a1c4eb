"""Every Triton kernel, in every launch configuration, compiled to machine code for its chips, without a GPU.

Fails for what no test of values finds: registers spilled to memory, more shared memory than the chip has, products that
do not reach the tensor cores, arithmetic that became fp64.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor

import pytest
from triton_compilation import Case, Compiled, compile_case

from g2rl_kernels.backends.triton import configs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(configs.interpreted(), reason="kernels are not compiled under TRITON_INTERPRET"),
]

CHIPS = (80, 90, 100)
# Shared memory that one block can have, in bytes; registers of a multiprocessor.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS = 65536
# Calls of slow paths (fp64 division) save a few registers: not in a loop, not a spill.
MOST_STACK = 16
# The instruction of each chip's tensor cores.
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

# The most that a kernel does after its product; "+" is heavier, see configs.TILES. A bias costs registers in all.
LIGHT = {
    "statistics": {"SOFTCAP": False, "KEEP": False},
    "residuals": {"SOFTCAP": False, "STATISTICS": False, "ONLY_FLAGGED": True},
    "grad_logits": {"SOFTCAP": False, "SCALED": False},
}
HEAVY = {
    "statistics": {"SOFTCAP": True, "KEEP": True},
    "residuals": {"SOFTCAP": True, "STATISTICS": True, "ONLY_FLAGGED": False},
    "grad_logits": {"SOFTCAP": True, "SCALED": True},
}


def product_cases() -> Iterator[Case]:
    for kernel, half in dict.fromkeys((kernel, half) for kernel, half, _ in configs.TILES):
        # Rows that TMA cannot address take an older chip's tile.
        for chip, tile in dict.fromkeys(
            (chip, configs.tile_for(kernel, half, chip, tma)) for chip in CHIPS for tma in (True, False)
        ):
            yield from cases_of(kernel, half, chip, tile)


def cases_of(kernel: str, half: bool, chip: int, tile: configs.Tile) -> Iterator[Case]:
    name = kernel.removesuffix("+")
    blocks = {key: value for key, value in tile.kwargs().items() if key.startswith("BLOCK")}
    constants = {"UPCAST": False, "GROUP": configs.GROUP, **blocks}
    if name == "projection":
        constants["SPLIT"] = configs.PROJECTION_SPLIT
        dtypes = ("bf16", "fp16") if half else ("fp32",)
    else:
        constants |= {"HAS_BIAS": True, "USE_TMA": tile.USE_TMA, **(HEAVY if kernel.endswith("+") else LIGHT)[name]}
        if name == "statistics":
            constants["SPLIT"] = configs.STATISTICS_SPLIT
        dtypes = ("fp16" if constants.get("SCALED") else "bf16",) if half else ("fp32",)
    for dtype in dtypes:
        shape = (chip, tile.num_warps, tile.num_stages)
        yield Case(
            f"{name}._{name}_kernel", dtype, *shape, tuple(constants.items()), tile.USE_TMA and name != "projection"
        )


def other_cases() -> Iterator[Case]:
    """Kernels without a product of vocabulary size; their tiles do not follow the chip."""
    flags = {"SOFTCAP": True}
    merge = flags | {"GIVEN": False, "FEATURES": True, "BLOCK_N": 32, "BLOCK_SPLITS": 32}
    for kernel, constants in (
        ("merge._merge_kernel", merge),
        ("merge._merge_kernel", merge | {"GIVEN": True}),
        ("responses._responses_kernel", {"BLOCK_N": 256}),
        ("targets._targets_kernel", {"BLOCK_N": 32, "BLOCK_V": 512}),
        ("kept._kept_kernel", flags | {"BLOCK_V": 512}),
        ("projection._join_kernel", {"BLOCK": 1024}),
    ):
        for chip in CHIPS:
            yield Case(kernel, "bf16", chip, 4, 3, tuple(constants.items()))
    for block_m in (16, 128):
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
            yield Case("groups._group_kernel", "fp32", chip, 4 if block_m == 16 else 8, 3, tuple(constants.items()))


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
        if case.capability == 90 and module in ones and case.kernel not in seen and "_join" not in case.kernel:
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
    """All cases at once, on all cores, in processes that have not loaded triton yet."""
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    with pool:
        yield {case: pool.submit(compile_case, case) for case in CASES + SMALLEST}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_fits_the_chip(case: Case, compiled: dict[Case, Future[Compiled]]) -> None:
    result = compiled[case].result()
    assert result.stack <= MOST_STACK, f"{result.stack} bytes of stack: registers are spilled"
    assert result.registers * 32 * case.num_warps <= REGISTERS
    assert result.shared <= SHARED[case.capability]
    if case.kernel != "groups._group_kernel":
        assert ".f64" not in result.ptx
    if case in PRODUCTS and case.dtype != "fp32":
        assert TENSOR_CORE[case.capability] in result.ptx
    if case in PRODUCTS and case.dtype == "fp32":
        assert not any(instruction in result.ptx for instruction in TENSOR_CORE.values()), "fp32 products must be exact"
    if case.tma:
        assert "cp.async.bulk.tensor" in result.ptx


@pytest.mark.parametrize("case", SMALLEST, ids=str)
def test_sizes_of_one_compile(case: Case, compiled: dict[Case, Future[Compiled]]) -> None:
    assert compiled[case].result().registers > 0
