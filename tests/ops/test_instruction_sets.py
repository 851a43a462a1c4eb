"""The contract of the head ops on every instruction set that this processor has.

A process chooses one when a kernel first runs, so each gets a process of its own, for a part of test_head.py.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from g2rl_kernels.backends import native

VARIABLE = "G2RL_CPU_ISA"
ARM = platform.machine() in ("aarch64", "arm64")
WORDS = ("neon_bf16", "base") if ARM else ("amx", "avx512_bf16", "avx512", "avx2", "base")
# Every dtype, forward and backward, both plans, and what bits depend on; each instruction set has its own register
# tiles and their remainders.
TESTS = " or ".join(
    ("test_shapes", "test_long_products", "test_kinds_of_logits", "test_any_plan", "test_gradients_of_shapes", "depend")
)
HEAD = Path(__file__).with_name("test_head.py")
CPU = Path(__file__).parents[2] / "csrc" / "cpu"

compiled = native.unavailable(torch.device("cpu"), torch.float32) is None
pytestmark = pytest.mark.skipif(not compiled, reason="needs the compiled CPU kernels")
present = native.instruction_sets() if compiled else []
others = [isa for isa in present if isa != native.instruction_set()] if compiled else []

ONE_CALL = """
import torch
from g2rl_kernels import LMHead, token_logprobs
token_logprobs(torch.ones(2, 3), LMHead(torch.ones(5, 3)), torch.tensor([0, 4]))
"""


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {VARIABLE: isa}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", others)
def test_head_contract(isa: str) -> None:
    result = run(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", f"native and ({TESTS})", str(HEAD))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


def test_files_for_one_instruction_set_share_no_functions_with_others() -> None:
    """Of a template that several files have a linker keeps any, with instructions that a processor may lack."""
    for name in ("rowwise_impl", "dots_impl", "simd", "register_tiles", "amx"):
        used = set(re.findall(r"std::(\w+)", (CPU / f"{name}.h").read_text()))
        assert used <= {"memcpy", "memset"}, name


def test_explain_names_the_instruction_set() -> None:
    assert "native kernels use base;" in run("base", "-m", "g2rl_kernels").stdout


def test_unknown_words_are_refused() -> None:
    result = run("avx513", "-c", ONE_CALL)
    expected = f"RuntimeError: {VARIABLE}: expected one of {', '.join(WORDS)}, found 'avx513'"
    assert result.returncode == 1 and expected in result.stderr
    result = run("avx513", "-m", "g2rl_kernels")
    report = result.stdout
    assert result.returncode == 1
    assert f"native kernels refuse to run: {VARIABLE}: expected one of" in report
    assert "native     refuses token_logprobs, " in report and "native     serves" not in report


@pytest.mark.parametrize("isa", [word for word in WORDS if word not in present])
def test_missing_instruction_sets_are_refused(isa: str) -> None:
    result = run(isa, "-c", ONE_CALL)
    expected = f"RuntimeError: {VARIABLE}: '{isa}' is more than this processor and build have, which is {present[0]}"
    assert result.returncode == 1 and expected in result.stderr


@pytest.mark.parametrize("has", [{}, {"interface": "0" * 64}], ids=["nothing", "another"])
def test_a_module_of_other_sources_does_not_serve(has: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As an editable checkout has it that moved on without being installed again."""
    older = ModuleType("g2rl_kernels._native")
    vars(older).update(has)
    monkeypatch.setattr(native.importlib, "import_module", lambda name: older)
    with pytest.warns(UserWarning, match="_native: compiled from other sources: reinstall .* a slower backend serves"):
        assert native._load.__wrapped__() == (None, "compiled from other sources: reinstall to build it again")


def test_a_module_without_sources_beside_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a wheel."""
    monkeypatch.setattr(native, "_interface", lambda: None)
    assert native._load.__wrapped__()[1] is None
