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

import pytest
import torch

from g2rl_kernels import use_backend
from g2rl_kernels.backends import triton as backend
from g2rl_kernels.dispatch import resolve

CASES = Path(__file__).with_name("triton_interpreter_cases.py")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_cases_in_the_interpreter() -> None:
    # One thread: the interpreter works on tiles too small to share.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", str(CASES)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


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
