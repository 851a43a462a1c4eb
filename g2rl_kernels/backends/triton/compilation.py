"""Compiles kernels for chips that need not be there, and says what they take of them; for tests and benchmarks."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from g2rl_kernels.backends.triton import configs
from g2rl_kernels.backends.triton.configs import Chip, Tile

Constant = int | bool

# Shared memory that one block can have, in bytes; other NVIDIA chips have the least of any since 8.0.
_SHARED: dict[Chip, int] = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, "gfx90a": 64 << 10, "gfx942": 64 << 10}
_LEAST_SHARED = 99 << 10
# Registers of an NVIDIA multiprocessor. On AMD chips the compiler keeps to what the warps leave, and spills the rest.
_REGISTERS = 65536
# Calls of slow paths (fp64 division) save a few registers: not in a loop, not a spill.
_MOST_STACK = 16

# All that a kernel may be asked for under a name of the table of tiles. A bias costs registers in all of them.
_WORK: dict[str, dict[str, Constant]] = {
    "statistics": {"SOFTCAP": False, "KEEP": False},
    "statistics-kept": {"SOFTCAP": False, "KEEP": True},
    "statistics-softcap": {"SOFTCAP": True, "KEEP": True},
    "residuals": {"SOFTCAP": False, "STATISTICS": False, "ONLY_FLAGGED": True},
    "residuals-statistics": {"SOFTCAP": False, "STATISTICS": True, "ONLY_FLAGGED": False},
    "residuals-softcap": {"SOFTCAP": True, "STATISTICS": True, "ONLY_FLAGGED": False},
    "grad_logits": {"SOFTCAP": False, "SCALED": False},
    "grad_logits-scaled": {"SOFTCAP": False, "SCALED": True},
    "grad_logits-softcap": {"SOFTCAP": True, "SCALED": True},
}


class Case(NamedTuple):
    """A kernel with constants for a chip.

    Attributes:
        kernel: "module.kernel" in g2rl_kernels.backends.triton.
        dtype: of hidden and weight.
        tma: whether hidden and weight are descriptors.
    """

    kernel: str
    dtype: str
    chip: Chip
    num_warps: int
    num_stages: int
    constants: tuple[tuple[str, Constant], ...]
    tma: bool = False

    def __str__(self) -> str:
        flags = [name.lower() for name, value in self.constants if value is True]
        sizes = "x".join(str(value) for name, value in self.constants if name.startswith("BLOCK"))
        launch = f"{sizes}-{self.num_warps}w{self.num_stages}s"
        return "-".join((self.kernel.split(".")[0], self.dtype, chip_name(self.chip), launch, *flags))


class Compiled(NamedTuple):
    """What one kernel takes.

    Attributes:
        registers: of a thread.
        stack: bytes of memory of a thread, for registers that were spilled and for calls.
        shared: bytes of shared memory of a block.
        ttir: the compiler's first form of the kernel.
        assembly: PTX or amdgcn.
        cubin: machine code for an NVIDIA chip.
    """

    registers: int
    stack: int
    shared: int
    ttir: str
    assembly: str
    cubin: bytes = b""


def chip_name(chip: Chip) -> str:
    return chip if isinstance(chip, str) else f"sm_{chip}"


def parse_chip(name: str) -> Chip:
    """The chip called sm_90 or gfx942.

    Raises:
        ValueError: neither form.
    """
    if re.fullmatch(r"gfx[0-9a-f]+", name):
        return name
    if match := re.fullmatch(r"sm_?(\d{2,3})", name):
        return int(match[1])
    raise ValueError(f"chip: expected a name such as sm_90 or gfx942, found {name!r}")


def product_case(kernel: str, dtype: str, chip: Chip, tile: Tile) -> Case:
    """A kernel of the table of tiles, with all that it may have to do under that name."""
    name = kernel.partition("-")[0]
    blocks = {key: value for key, value in tile.kwargs().items() if key.startswith("BLOCK")}
    constants: dict[str, Constant] = {"UPCAST": False, "GROUP": configs.GROUP, **blocks}
    if name == "projection":
        constants["SPLIT"] = configs.PROJECTION_SPLIT
    else:
        constants |= {"HAS_BIAS": True, "USE_TMA": tile.USE_TMA, **_WORK[kernel]}
        if name == "statistics":
            constants["SPLIT"] = configs.STATISTICS_SPLIT
    if constants.get("SCALED") and dtype != "fp16":
        # Only fp16 has a range that short.
        constants["SCALED"] = False
    return Case(
        f"{name}._{name}_kernel",
        dtype,
        chip,
        tile.num_warps,
        tile.num_stages,
        tuple(constants.items()),
        tile.USE_TMA and name != "projection",
    )


def misfits(case: Case, compiled: Compiled) -> list[str]:
    """Why a chip would run this kernel slowly or not at all."""
    wrong = []
    if compiled.stack > _MOST_STACK:
        wrong.append(f"spills {compiled.stack} bytes")
    if isinstance(case.chip, int) and compiled.registers * 32 * case.num_warps > _REGISTERS:
        wrong.append(f"takes {compiled.registers} registers in each of {case.num_warps} warps")
    limit = _SHARED.get(case.chip, _LEAST_SHARED)
    if compiled.shared > limit:
        wrong.append(f"takes {compiled.shared} bytes of shared memory of {limit}")
    return wrong


@contextmanager
def compiled_in_parallel(cases: Iterable[Case]) -> Iterator[dict[Case, Future[Compiled]]]:
    """All cases at once, on all cores, in processes that have not loaded triton yet."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield {case: pool.submit(compile_case, case) for case in cases}
        pool.shutdown(cancel_futures=True)


def compile_case(case: Case) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, kernel = case.kernel.split(".")
    function = getattr(importlib.import_module(f"g2rl_kernels.backends.triton.{module}"), kernel)
    constants = dict(case.constants)
    signature = _signature(case, function.arg_names)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and (kind.startswith("*") or _MULTIPLES_OF_16.fullmatch(name))
    }
    compiled = triton.compile(
        ASTSource(function, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("hip", case.chip, 64) if isinstance(case.chip, str) else GPUTarget("cuda", case.chip, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True},
    )
    shared, ttir = compiled.metadata.shared, compiled.asm["ttir"]
    if isinstance(case.chip, str):
        # Scalar registers are spilled to lanes of vector registers, which `vgpr_count` counts, and not to memory.
        registers, stack = _numbers(compiled.asm["amdgcn"], r"\.vgpr_count", r"\.private_segment_fixed_size")
        return Compiled(registers, stack, shared, ttir, compiled.asm["amdgcn"])
    cubin = compiled.asm["cubin"]
    registers, stack, local = _numbers(_dump(cubin, "--dump-resource-usage"), "REG", "STACK", "LOCAL")
    return Compiled(registers, stack + local, shared, ttir, compiled.asm["ptx"], cubin)


def instructions(compiled: Compiled) -> Counter[str]:
    """How often each is in the machine code for an NVIDIA chip; waits for tensor cores as WARPGROUP.DEPBAR."""
    lines = _dump(compiled.cubin, "-sass").splitlines() if compiled.cubin else []
    found = (re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(WARPGROUP\.\w+|[A-Z0-9]+)", line) for line in lines)
    return Counter(match[1] for match in found if match)


def _dump(cubin: bytes, what: str) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def _numbers(text: str, *names: str) -> list[int]:
    return [int(match[1]) for name in names if (match := re.search(rf"{name}:\s*(\d+)", text))]


_POINTERS = {
    "targets": "*i64",
    "cu_seqlens": "*i32",
    "cu_groups": "*i32",
    "flags": "*i32",
    "flagged": "*i32",
    "valid": "*u8",
}
_FLOATS = ("inner_scale", "scale", "logit_scale", "strength", "clip", "min_range")
_OF_MODEL = ("hidden", "weight", "bias", "G", "G_even")
_INTEGERS = re.compile(r"[NVDB]|stride_.*|splits|tiles|elements|first|last|v_start|v_end|m_max")
# Strides and sizes of ordinary models are multiples of 16, on which wide loads depend.
_MULTIPLES_OF_16 = re.compile(r"D|stride_(h|w|kept|f)")


def _signature(case: Case, names: Sequence[str]) -> dict[str, str]:
    """Triton's type of every argument."""
    constants = dict(case.constants)
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("hidden", "weight") and case.tma:
            rows = constants["BLOCK_N" if name == "hidden" else "BLOCK_V"]
            signature[name] = f"tensordesc<{case.dtype}[{rows}, {constants['BLOCK_D']}]>"
        elif name in _OF_MODEL:
            signature[name] = f"*{case.dtype}"
        elif name in _FLOATS:
            signature[name] = "fp32"
        elif _INTEGERS.fullmatch(name):
            signature[name] = "i32"
        else:
            signature[name] = _POINTERS.get(name, "*fp32")
    return signature
