"""Runs triton_interpreter_cases.py with Triton's interpreter switched on.

Triton reads the switch when kernels are defined, so the cases have a process of their own: other tests keep the
backends, and the triton, that they would have without.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from g2rl_kernels import use_backend
from g2rl_kernels.backends import triton as backend
from g2rl_kernels.backends.triton import configs
from g2rl_kernels.dispatch import resolve

CASES = Path(__file__).with_name("triton_interpreter_cases.py")
# Side by side, for two cores: each takes minutes.
HALVES = ("plans_and_logits or nan", "not (plans_and_logits or nan)")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_cases_in_the_interpreter() -> None:
    # One thread: the interpreter works on tiles too small to share.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        str(CASES),
    ]
    runs = [
        subprocess.Popen(
            [*command, "-k", words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for words in HALVES
    ]
    outputs = [run.communicate()[0] for run in runs]
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0, output[-8000:]


def test_a_cpu_is_served_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(RuntimeError, match="triton"):
        resolve("token_logprobs", cpu, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("token_logprobs", cpu, torch.float32).__module__ != "g2rl_kernels.backends.triton.head"


def test_what_is_unavailable_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert backend.unavailable(cuda, torch.float64) == "expected bf16, fp16 or fp32, found float64"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.unavailable(cuda, torch.float32) == "Triton is not installed: pip install triton"


def test_amd_chips_are_served_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The architecture, with its features, as ROCm reports it."""
    gpu = torch.device("cuda", 0)

    def unavailable(architecture: str, dtype: torch.dtype) -> str | None:
        properties = SimpleNamespace(gcnArchName=architecture)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return backend.unavailable(gpu, dtype)

    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.7.1+rocm7"))
    assert unavailable("gfx942", torch.bfloat16) == "Triton before 3.8 does not compile fp64 products for gfx942"
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.10.0"))
    assert unavailable("gfx942:sramecc+:xnack-", torch.float16) is None
    assert unavailable("gfx90a:sramecc+:xnack-", torch.bfloat16) is None
    assert unavailable("gfx90a", torch.float16) == "matrix cores of gfx90a take fp16 numbers below 6e-5 for 0"
    assert unavailable("gfx1100", torch.bfloat16) == "expected an AMD GPU of gfx90a, gfx942, gfx950, found gfx1100"
    assert configs.tile_for("statistics", True, configs.chip_of(gpu)) == configs.AMD_TILES["statistics", True]


def test_rows_that_tma_cannot_address() -> None:
    """16 bytes is what bases and strides have to be multiples of; rows may not overlap."""
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    assert configs._tma_addressable(x) and configs._tma_addressable(x[3:, 8:40])
    for rows in (x[:, 1:33], torch.zeros(4, 63, dtype=torch.bfloat16), x[:1].expand(5, 64)):
        assert not configs._tma_addressable(rows)
    assert not configs.tile_for("statistics", True, 90, tma=False).USE_TMA
