"""Compiles one Triton kernel for one chip, without having the chip, and reads what it takes of it.

Run in processes of its own by test_triton_compile.py, so that tests in this one decide themselves how triton is loaded.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from typing import NamedTuple

Constant = int | bool


class Case(NamedTuple):
    """A kernel with constants for a chip.

    Attributes:
        kernel: "module.kernel" in g2rl_kernels.backends.triton.
        dtype: of hidden and weight.
        tma: whether hidden and weight are descriptors.
    """

    kernel: str
    dtype: str
    capability: int
    num_warps: int
    num_stages: int
    constants: tuple[tuple[str, Constant], ...]
    tma: bool = False

    def __str__(self) -> str:
        flags = [name.lower() for name, value in self.constants if value is True]
        sizes = "x".join(str(value) for name, value in self.constants if name.startswith("BLOCK"))
        return "-".join((self.kernel.split(".")[0], self.dtype, f"sm{self.capability}", sizes, *flags))


class Compiled(NamedTuple):
    registers: int
    stack: int
    shared: int
    ptx: str


_POINTERS = {"targets": "*i64", "cu_seqlens": "*i32", "cu_groups": "*i32", "flags": "*i32", "valid": "*u8"}
_FLOATS = ("inner_scale", "scale", "logit_scale", "tolerance", "strength", "clip", "min_range")
_OF_MODEL = ("hidden", "weight", "bias", "G", "G_even")
_INTEGERS = re.compile(r"[NVDB]|stride_.*|splits|tiles|elements|first|last|v_start|v_end|m_max")
# Strides and sizes of ordinary models are multiples of 16, on which wide loads depend.
_MULTIPLES_OF_16 = re.compile(r"D|stride_(h|w|kept|f)")


def compile_case(case: Case) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, kernel = case.kernel.split(".")
    function = getattr(importlib.import_module(f"g2rl_kernels.backends.triton.{module}"), kernel)
    constants = dict(case.constants)
    signature = {}
    for name in function.arg_names:
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
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and (kind.startswith("*") or _MULTIPLES_OF_16.fullmatch(name))
    }
    compiled = triton.compile(
        ASTSource(function, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", case.capability, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Compiled(registers, stack + local, compiled.metadata.shared, compiled.asm["ptx"])
