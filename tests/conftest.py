"""What all tests share: the `gpu` marker, the choice of backend put back after each test, poisoned memory, a plan."""

from __future__ import annotations

import os
from collections.abc import Iterator

# OpenMP threads that spin between small parallel regions make tests twenty times slower on a busy machine. Read when
# torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import g2rl_kernels
from g2rl_kernels import dispatch, self_check, use_backend
from g2rl_kernels.plans import head as plans

# Compiled modules of another build than the one that is installed, as by `make bf16`.
if "G2RL_TESTED_MODULES" in os.environ:
    g2rl_kernels.__path__.insert(0, os.environ["G2RL_TESTED_MODULES"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def automatic_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts from the automatic choice of backend and leaves no other behind.

    Nothing is checked before it serves: that is what tests are for.
    """
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv(self_check.ENVIRONMENT_VARIABLE, "skip")
    use_backend(None)
    yield
    use_backend(None)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote reads as NaN, also where compiled code allocates it: PyTorch's deterministic mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3).bfloat16()).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are kept at any size, not only where that pays."""
    monkeypatch.setattr(plans, "KEEP_FROM_D", 0)
    monkeypatch.setattr(plans, "KEEP_FROM_ROWS", 0)
