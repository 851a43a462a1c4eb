"""What setup.py makes of its variables, and of modules that an earlier build left."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
from setuptools.dist import Distribution

SETUP = Path(__file__).parents[1] / "setup.py"
VARIABLES = (
    "G2RL_SKIP_NATIVE",
    "G2RL_REQUIRE_NATIVE",
    "G2RL_WITH_CUDA",
    "G2RL_CUDA_ARCHITECTURES",
    "CXX",
    "CUDACXX",
    "MAX_JOBS",
    "CMAKE_BUILD_PARALLEL_LEVEL",
)

Load = Callable[..., ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """setup.py as a module, where CMake and compilers are there, with these variables."""
    if not SETUP.is_file():
        pytest.skip("no checkout")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None if name == "nvcc" else f"/bin/{name}")

    def loaded(**variables: str) -> ModuleType:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        spec = importlib.util.spec_from_file_location("g2rl_setup", SETUP)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return loaded


@pytest.mark.parametrize(
    ("variables", "cpu", "cuda"),
    [
        ({}, None, "nvcc was not found|this torch has no CUDA"),
        ({"G2RL_SKIP_NATIVE": "0", "G2RL_WITH_CUDA": "ON"}, None, None),
        ({"G2RL_SKIP_NATIVE": "1", "G2RL_WITH_CUDA": "on"}, "G2RL_SKIP_NATIVE is set", None),
        ({"G2RL_SKIP_NATIVE": "", "G2RL_WITH_CUDA": "off"}, None, "G2RL_WITH_CUDA is off"),
        ({"CXX": ""}, None, "."),
        ({"CXX": " "}, None, "."),
        ({"CXX": "ccache g++"}, None, "."),
    ],
)
def test_what_is_built(load: Load, variables: dict[str, str], cpu: str | None, cuda: str | None) -> None:
    """A variable speaks of its own kernels alone, and 0 or nothing asks for nothing."""
    setup = load(**variables)
    assert setup.why_not(cuda=False) == cpu
    assert re.match(str(cuda), str(setup.why_not(cuda=True)))


def test_how_many_sources_are_compiled_at_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert load().jobs() == "3"
    assert load(CMAKE_BUILD_PARALLEL_LEVEL="2").jobs() == "2"
    assert load(CMAKE_BUILD_PARALLEL_LEVEL="2", MAX_JOBS="1").jobs() == "1"


@pytest.mark.parametrize(("value", "required"), [("", False), ("0", False), ("1", True)])
def test_kernels_are_required(load: Load, value: str, required: bool) -> None:
    assert load(G2RL_REQUIRE_NATIVE=value).REQUIRE_NATIVE is required


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("G2RL_WITH_CUDA", "1", "auto, on or off"),
        ("G2RL_WITH_CUDA", "false", "auto, on or off"),
        ("G2RL_SKIP_NATIVE", "yes", "0 or 1"),
        ("G2RL_REQUIRE_NATIVE", "off", "0 or 1"),
    ],
)
def test_other_words_are_refused(load: Load, name: str, value: str, expected: str) -> None:
    with pytest.raises(SystemExit, match=f"^{name}: expected {expected}, found '{value}'$"):
        load(**{name: value})


@pytest.mark.parametrize(
    ("editable", "fails", "left"),
    [
        (False, True, ["beside the sources"]),
        (False, False, ["beside the sources"]),
        (True, True, []),
        (True, False, ["beside the sources"]),
    ],
    ids=["fails", "is left out", "editable fails", "editable is left out"],
)
def test_no_build_ships_the_modules_of_another(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, editable: bool, fails: bool, left: list[str]
) -> None:
    """What was built earlier is of other sources. One beside them stays where nothing was tried: others use it."""
    setup = load(G2RL_WITH_CUDA="off", G2RL_SKIP_NATIVE="0" if fails else "1")

    def cannot(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(setup.subprocess, "run", cannot)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    extension = setuptools.Extension("g2rl_kernels._native", sources=[])
    build = setup.CMakeBuild(Distribution({"packages": ["g2rl_kernels"], "ext_modules": [extension]}))
    build.build_lib, build.build_temp, build.editable_mode = "build/lib", "build/temp", editable
    build.ensure_finalized()
    modules = {"beside the sources": tmp_path, "to be packed": tmp_path / "build" / "lib"}
    for name, folder in modules.items():
        modules[name] = folder / build.get_ext_filename(extension.name)
        modules[name].parent.mkdir(parents=True)
        modules[name].write_text("of an earlier build")
    build.run()
    assert [name for name, path in modules.items() if path.exists()] == left


@pytest.mark.parametrize(("made_for", "kept"), [("here", True), ("here, before it was moved", False)])
def test_a_build_folder_of_a_moved_checkout_goes(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_for: str, kept: bool
) -> None:
    """CMake would refuse it; one of this checkout keeps what is compiled."""
    setup = load()
    root = tmp_path / "here"
    build = root / "build" / f"cmake-{sys.implementation.cache_tag}"
    build.mkdir(parents=True)
    (build / "CMakeCache.txt").write_text(f"//...\nCMAKE_HOME_DIRECTORY:INTERNAL={tmp_path / made_for}\n")
    (build / "kernel.o").write_text("")
    ran = []
    monkeypatch.setattr(setup.subprocess, "run", lambda command, **_: ran.append((build / "kernel.o").exists()))
    monkeypatch.setattr(setup, "ROOT", root)
    extension = setuptools.Extension("g2rl_kernels._native", sources=[])
    command = setup.CMakeBuild(Distribution({"packages": ["g2rl_kernels"], "ext_modules": [extension]}))
    command.ensure_finalized()
    assert command.build_with_cmake(extension, cuda=False) is None
    assert ran == [kept, kept]  # to configure and to compile


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Sets what nvidia-smi says of compute capabilities; None where there is none."""

    def are(listed: str | None) -> None:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            assert command[0] == "nvidia-smi"
            if listed is None:
                raise FileNotFoundError("nvidia-smi")
            return subprocess.CompletedProcess(command, 0, stdout=listed)

        monkeypatch.setattr(subprocess, "run", run)

    return are


@pytest.mark.parametrize(
    ("variables", "listed", "expected"),
    [
        ({}, None, ""),
        ({}, "", ""),
        ({}, "9.0\n9.0\n", "90a"),
        ({}, "9.0\n8.6\n", "80;90a"),
        ({}, "9.0\n12.0\n", ""),  # a chip that is not known may run code made of PTX
        ({}, 'Field "compute_cap" is not a valid field to query.\n', ""),
        ({"G2RL_CUDA_ARCHITECTURES": "100"}, "9.0\n", "100"),
    ],
)
def test_gpus_built_for(
    load: Load, gpus: Callable[[str | None], None], variables: dict[str, str], listed: str | None, expected: str
) -> None:
    gpus(listed)
    assert load(**variables).architectures() == expected


@pytest.mark.parametrize(
    ("listed", "reason"), [(None, "no NVIDIA GPU was"), ("", "no NVIDIA GPU was"), ("9.0\n", "nvcc was not found")]
)
def test_an_isolated_build_looks_for_gpus_itself(
    load: Load, gpus: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch, listed: str | None, reason: str
) -> None:
    """It does not see the torch that the kernels will serve; those for CPUs need none."""
    gpus(listed)
    monkeypatch.setitem(sys.modules, "torch", None)
    setup = load()
    assert setup.why_not(cuda=False) is None
    assert str(setup.why_not(cuda=True)).startswith(reason)
