"""Two packages from one tree: `g2rl_kernels` (the ops) and `g2rl` (the trainer, below python/).

The CPU kernels, `g2rl_kernels._native`, are built with CMake where a compiler is at hand. Without one the package still
installs and works on its other backends. G2RL_SKIP_NATIVE=1 does not try; G2RL_REQUIRE_NATIVE=1 makes failure an error.

The CUDA kernels, `g2rl_kernels._cuda`, are built where nvcc is found, and torch has CUDA or, for a build that does not
see torch, there is a GPU (G2RL_WITH_CUDA=auto), always (on) or never (off), whatever is said of the CPU kernels.
G2RL_CUDA_ARCHITECTURES names the GPUs. Unless set, they are those that are here, or all where there are none or one of
another generation: "80;90a;100" (100 from nvcc 12.8 on). Each takes minutes.

MAX_JOBS or CMAKE_BUILD_PARALLEL_LEVEL says how many sources are compiled at once, each of up to 1.6 GB; CMAKE_ARGS is
handed to CMake.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Tools that pip put beside this Python count, whether or not its folder is on the path.
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


def choice(name: str, *values: str) -> str:
    """What an environment variable says, the first of `values` where it says nothing."""
    found = os.environ.get(name, "").lower() or values[0]
    if found not in values:
        raise SystemExit(f"{name}: expected {', '.join(values[:-1])} or {values[-1]}, found {found!r}")
    return found


# Before anything is built.
SKIP_NATIVE, REQUIRE_NATIVE = (choice(f"G2RL_{what}_NATIVE", "0", "1") == "1" for what in ("SKIP", "REQUIRE"))
WITH_CUDA = choice("G2RL_WITH_CUDA", "auto", "on", "off")


def why_not(cuda: bool) -> str | None:
    """What keeps the CUDA or the CPU kernels from being built; None when everything is there."""
    if SKIP_NATIVE and not cuda:
        return "G2RL_SKIP_NATIVE is set"
    if WITH_CUDA == "off" and cuda:
        return "G2RL_WITH_CUDA is off"
    if not shutil.which("cmake", path=PATH):
        return "CMake was not found"
    if not any(shutil.which(name) for name in (*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++")):
        return "no C++ compiler was found"
    return why_no_cuda() if cuda else None


def why_no_cuda() -> str | None:
    """What the CUDA kernels need besides; None when it is there, or when CMake has to say."""
    if WITH_CUDA == "on":
        return None
    try:
        import torch
    except ImportError:  # not seen from an isolated build
        if not capabilities():
            return "no NVIDIA GPU was found (G2RL_WITH_CUDA=on builds them nevertheless)"
    else:
        if torch.version.cuda is None:
            return "this torch has no CUDA (G2RL_WITH_CUDA=on builds them nevertheless)"
    if not (os.environ.get("CUDACXX") or shutil.which("nvcc", path=PATH)):
        return "nvcc was not found (put it on PATH, or name it in CUDACXX)"
    return None


def capabilities() -> set[int]:
    """Major compute capabilities of the GPUs that are here."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        return {int(line.partition(".")[0]) for line in lines}
    except (OSError, subprocess.SubprocessError, ValueError):  # no driver, or one too old to know
        return set()


def architectures() -> str:
    """Of the GPUs to build for; empty for all."""
    if named := os.environ.get("G2RL_CUDA_ARCHITECTURES"):
        return named
    here, known = capabilities(), {8: "80", 9: "90a", 10: "100"}
    return ";".join(known[major] for major in sorted(here)) if here <= known.keys() else ""


def jobs() -> str:
    """How many sources are compiled at once."""
    said = os.environ.get("MAX_JOBS") or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
    return said or str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def remove_moved(build: Path) -> None:
    """Remove a build folder that came with a moved or copied checkout: CMake refuses one made for another folder."""
    cache = build / "CMakeCache.txt"
    made_for = f"\nCMAKE_HOME_DIRECTORY:INTERNAL={ROOT.as_posix()}\n"
    if cache.is_file() and made_for not in cache.read_text(encoding="utf-8", errors="surrogateescape"):
        shutil.rmtree(build)


class CMakeBuild(build_ext):
    failed: tuple[str, ...] = ()

    def build_extension(self, ext: Extension) -> None:
        cuda = ext.name.endswith("._cuda")
        required = WITH_CUDA == "on" if cuda else REQUIRE_NATIVE
        # A module of an earlier build is of other sources.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        reason = why_not(cuda)
        if reason is None:
            reason = self.build_with_cmake(ext, cuda)
            if reason is None:
                return
            self.failed += (ext.name,)
        message = f"g2rl_kernels: {'CUDA' if cuda else 'CPU'} kernels not built: {reason}"
        if required:
            raise RuntimeError(message)
        self.warn(f"{message}. The package works without them; `python -m g2rl_kernels` tells what it uses.")

    def build_with_cmake(self, ext: Extension, cuda: bool) -> str | None:
        """Builds one module; returns what failed."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Folders of their own: CUDA kernels that fail to build do not stop the others.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{'-cuda' if cuda else ''}"
        remove_moved(build)
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DG2RL_OUTPUT_DIR={target}", "-DG2RL_BUILD_TESTS=OFF", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DG2RL_BUILD_NATIVE={'OFF' if cuda else 'ON'}", f"-DG2RL_WITH_CUDA={'on' if cuda else 'off'}"]
        if cuda:  # -U: not those of an earlier build
            configure += [f"-DG2RL_CUDA_ARCHITECTURES={of}" if (of := architectures()) else "-UG2RL_CUDA_ARCHITECTURES"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        compile_all = ["cmake", "--build", str(build), "--parallel", jobs()]
        try:
            for command in (configure, compile_all):
                subprocess.run(command, check=True, env={**os.environ, "PATH": PATH})
        except subprocess.CalledProcessError as error:
            return f"`{' '.join(error.cmd)}` failed"
        return None

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """Editable installs: built modules go beside the sources, and older ones go that these failed to replace."""
        declared = self.extensions
        built = Path(self.build_lib)
        self.extensions = [e for e in declared if (built / self.get_ext_filename(e.name)).exists()]
        super().copy_extensions_to_source()
        self.extensions = declared
        for name in self.failed:
            (ROOT / self.get_ext_filename(name)).unlink(missing_ok=True)


setup(
    packages=[
        *find_packages(include=["g2rl_kernels", "g2rl_kernels.*"]),
        *find_packages("python", include=["g2rl", "g2rl.*"]),
    ],
    package_dir={"g2rl_kernels": "g2rl_kernels", "g2rl": "python/g2rl"},
    package_data={"g2rl_kernels": ["MATH.md", "py.typed"], "g2rl": ["py.typed", "methods/*.yaml"]},
    ext_modules=[Extension("g2rl_kernels._native", sources=[]), Extension("g2rl_kernels._cuda", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
