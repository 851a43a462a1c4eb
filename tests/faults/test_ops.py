"""Ops called with random bad arguments, and with inputs that are hard on numbers, tens of thousands of times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.children import run_tries

BACKENDS = ("reference", "torch", "native")


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend: str, campaign: Any, tmp_path: Path) -> None:
    """An error that names the argument, or the result of float64; no crash, no hang."""
    found = campaign("ops", 20_000, f"calls with random arguments, backend {backend}")
    run_tries(found, {"work": "arguments", "backend": backend}, tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_numbers(backend: str, campaign: Any, tmp_path: Path) -> None:
    """The bounds of the numerics contract; never NaN for finite inputs."""
    found = campaign("numerics", 10_000, f"confident, flat, duplicated and scaled inputs, backend {backend}")
    run_tries(found, {"work": "numbers", "backend": backend}, tmp_path)


def test_triton_in_its_interpreter(campaign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small share: the interpreter takes a second for what a GPU does in a microsecond."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = campaign("ops", 200, "calls with random arguments, backend triton in its interpreter")
    run_tries(found, {"work": "arguments", "backend": "triton"}, tmp_path)
