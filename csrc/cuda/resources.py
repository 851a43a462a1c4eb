"""What compiled CUDA kernels take of a chip, read from their machine code.

Fails if one spills without a reason, if its products on Hopper wait for each other, or if its warpgroups would wait for
ever for registers.

    python csrc/cuda/resources.py g2rl_kernels/_cuda*.so

Needs `cuobjdump`: on PATH, as CUDA has it, or triton's own copy. No GPU.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

# Products by Hopper's tensor cores and by those of other chips; copies by TMA and by cp.async; loads of fragments.
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDSM")
# Loads and stores of a thread's own memory, where spilled registers go.
LOCAL = ("LDL", "STL")

# Kernels that may spill, the bytes of a thread's memory, and why.
SPILLS = (
    ("sm90::statistics_kernel<*>", 8, "a chain, sums and two rows' statistics leave none of 232 registers"),
    ("sm90::grad_logits_kernel<fp16, *>", 32, "a row is rounded twice, by two scales, beside a chain and sums"),
    ("sm90::residuals_kernel<*>", 16, "the warps that write a tile's columns have 40 registers"),
    (
        "sm90::residuals_and_statistics_kernel<*>",
        104,
        "what is left out, in few tiles, beside a chain and sums; and the warps that add, in 40 registers",
    ),
)


@dataclass
class Kernel:
    """What one kernel takes on one chip.

    Attributes:
        registers: of a thread at its launch; warps of sm90:: kernels share them out anew, 232 for those that multiply.
        stack: bytes of memory of a thread.
        shared: bytes of shared memory of a block, without what a launch adds.
        instructions: how often each is in the code.
        awaited: products of warpgroups that are waited for. Of those that are issued together it is the last alone,
            unless the compiler found that it must keep them apart.
        fewer: registers of a thread in the warpgroup that gives some up.
        more: in the other two, which take them.
    """

    architecture: str
    name: str
    registers: int
    stack: int
    shared: int
    instructions: Counter[str] = field(default_factory=Counter)
    awaited: int = 0
    fewer: int = 0
    more: int = 0

    @property
    def serialized(self) -> bool:
        """Whether each of its products waits for the one before. Results are right all the same, only later."""
        return self.instructions["HGMMA"] > 1 and self.awaited == self.instructions["HGMMA"]

    @property
    def starved(self) -> bool:
        """Whether its warpgroups ask for more registers than it was launched with: they wait for them, and hang."""
        return self.fewer + 2 * self.more > 3 * self.registers

    @property
    def reason(self) -> str | None:
        """Why it may spill as much as it does."""
        return next((why for name, most, why in SPILLS if fnmatchcase(self.name, name) and self.stack <= most), None)


def cuobjdump(*arguments: str) -> str:
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    tool = shutil.which("cuobjdump") or (str(bundled) if bundled and bundled.exists() else None)
    if tool is None:
        raise SystemExit("cuobjdump was not found: put it on PATH, or install triton or nvidia-cuda-cuobjdump")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def short_name(mangled: str) -> str:
    """sm90::statistics_kernel<bf16, true>, without the namespaces and arguments that all have."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").replace("g2rl::cuda::", "").removeprefix("void ")
    return name.split("(")[0]


def kernels_of(library: Path) -> list[Kernel]:
    found: dict[tuple[str, str], Kernel] = {}
    architecture = function = ""
    for line in cuobjdump("-res-usage", str(library)).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, match.groups())
            found[architecture, function] = Kernel(architecture, short_name(function), registers, stack, shared)
    for line in cuobjdump("-sass", str(library)).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            function = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", line):
            kernel = found[architecture, function]
            kernel.instructions[match[1]] += 1
            kernel.awaited += match[1] == "HGMMA" and "gsb0" in line
            if match := re.search(r"USETMAXREG\.(TRY_ALLOC|DEALLOC)\S* (?:UP\d, )?0x([0-9a-f]+)", line):
                setattr(kernel, "fewer" if match[1] == "DEALLOC" else "more", int(match[2], 16))
    return sorted(found.values(), key=lambda kernel: (kernel.name, kernel.architecture))


def main() -> int:
    if len(sys.argv) != 2:
        raise SystemExit("expected one compiled module, g2rl_kernels/_cuda*.so")
    kernels = kernels_of(Path(sys.argv[1]))
    print(f"{'kernel':44} {'chip':8} registers  stack  shared  instructions")
    for k in kernels:
        counts = ", ".join(f"{name} {k.instructions[name]}" for name in INSTRUCTIONS + LOCAL if k.instructions[name])
        print(f"{k.name:44} {k.architecture:8} {k.registers:9}  {k.stack:5}  {k.shared:6}  {counts}")

    spilling = [k for k in kernels if any(k.instructions[name] for name in LOCAL)]
    print("\nSpills:")
    for k in spilling:
        print(f"{k.name:44} {k.architecture:8} {k.stack} bytes: {k.reason or 'WITHOUT A REASON'}")
    serialized = [k for k in kernels if k.serialized]
    for k in serialized:
        print(f"{k.name:44} {k.architecture:8} PRODUCTS WAIT FOR EACH OTHER")
    starved = [k for k in kernels if k.starved]
    for k in starved:
        print(f"{k.name:44} {k.architecture:8} {k.fewer} + 2 * {k.more} REGISTERS OF 3 * {k.registers}")
    return int(not kernels or bool(serialized or starved) or any(k.reason is None for k in spilling))


if __name__ == "__main__":
    sys.exit(main())
