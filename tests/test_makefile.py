"""The Makefile, without running what it runs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """With a blank in its path, sources of each kind, and an environment that is older than none of them."""
    if not (MAKEFILE.is_file() and shutil.which("make")):
        pytest.skip("needs a checkout and make")
    folder = tmp_path / "a b"
    for name in ("csrc/cuda/kernel.cu", "csrc/cuda/CMakeLists.txt", "csrc/cpu/head.cpp", ".venv/.ready"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name in ("CMakeLists.txt", "constraints.txt", "pyproject.toml", "setup.py"):
        (folder / name).touch()
    (folder / ".venv/.ready").touch()
    shutil.copy(MAKEFILE, folder)
    return folder


def commands(checkout: Path, *targets: str) -> list[str]:
    done = subprocess.run(["make", "-n", *targets], cwd=checkout, capture_output=True, text=True, check=True)
    return shlex.split(done.stdout, comments=True)


@pytest.mark.parametrize(
    ("target", "paths"),
    [
        ("ctest", {"-DPython_EXECUTABLE": ".venv/bin/python"}),
        (
            "bf16",
            {
                "-DPython_EXECUTABLE": ".venv/bin/python",
                "-DG2RL_OUTPUT_DIR": "build/bf16",
                "G2RL_TESTED_MODULES": "build/bf16",
            },
        ),
        ("sanitize", {"-DPython_EXECUTABLE": ".venv/bin/python", "-DG2RL_OUTPUT_DIR": "$build"}),
        (
            "sanitize-ops",
            {
                "-DPython_EXECUTABLE": ".venv/bin/python",
                "-DG2RL_OUTPUT_DIR": "build/address",
                "G2RL_FAULTS_SANITIZED": "build/address",
            },
        ),
        ("macos", {"-DCMAKE_CXX_COMPILER": "build/macos/zig/ziglang/zig;c++;-target;aarch64-macos"}),
    ],
)
def test_paths_may_have_blanks(checkout: Path, target: str, paths: dict[str, str]) -> None:
    given = dict(word.split("=", 1) for word in commands(checkout, target) if "=" in word)
    assert {name: given[name] for name in paths} == {name: f"{checkout}/{path}" for name, path in paths.items()}


@pytest.mark.parametrize("source", ["csrc/cuda/kernel.cu", "csrc/cuda/CMakeLists.txt", "csrc/cpu/head.cpp"])
def test_a_changed_source_is_compiled(checkout: Path, source: str) -> None:
    ready = checkout / ".venv/.ready"
    assert "touch" not in commands(checkout, "setup")
    newer = ready.stat().st_mtime_ns + 10**9
    os.utime(checkout / source, ns=(newer, newer))
    assert "touch" in commands(checkout, "setup")


def test_tests_that_targets_run_are_there(checkout: Path) -> None:
    targets = ("test", "ranks", "faults", "planted", "trl", "bf16", "lowest", "sanitize-ops")
    named = {word for word in commands(checkout, *targets) if word.startswith("tests/")}
    assert "tests/g2rl/test_tasks.py" in named
    assert {name for name in named if not (MAKEFILE.parent / name).exists()} == set()
