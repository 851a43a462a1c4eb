"""A tiny model that vLLM's kernels for CPUs take: heads of 32 numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.g2rl.conftest import build_model

SMALL = {"max_model_len": 128, "kv_cache_memory_bytes": 16 << 20}
"""Arguments of the engine."""


def engine_model(folder: Path, seed: int = 0) -> Path:
    return build_model(folder, seed, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_model(tmp_path_factory.mktemp("model"))
