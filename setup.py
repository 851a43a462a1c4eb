"""Two packages from one tree: `g2rl_kernels` (the ops) and `g2rl` (the trainer, below python/).

The CPU kernels, `g2rl_kernels._native`, are built with CMake where a compiler is at hand. Without one the package still
installs and works on its other backends. G2RL_SKIP_NATIVE=1 does not try; G2RL_REQUIRE_NATIVE=1 makes failure an error.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Tools that pip put beside this Python count, whether or not its folder is on the path.
PATH = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))


def why_not() -> str | None:
    """What is missing to build the kernels; None when everything is there."""
    if os.environ.get("G2RL_SKIP_NATIVE"):
        return "G2RL_SKIP_NATIVE is set"
    if not shutil.which("cmake", path=PATH):
        return "CMake was not found"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")):
        return "no C++ compiler was found"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch cannot be imported while building (install it first, and use --no-build-isolation)"
    return None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        missing = why_not()
        if missing is not None:
            self.give_up(missing)
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DG2RL_OUTPUT_DIR={target}", "-DG2RL_BUILD_TESTS=OFF", "-DCMAKE_BUILD_TYPE=Release"]
        compile_all = ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)]
        try:
            for command in (configure, compile_all):
                subprocess.run(command, check=True, env={**os.environ, "PATH": PATH})
        except subprocess.CalledProcessError as error:
            self.give_up(f"`{' '.join(error.cmd)}` failed")

    def give_up(self, reason: str) -> None:
        message = f"g2rl_kernels: CPU kernels not built: {reason}"
        if os.environ.get("G2RL_REQUIRE_NATIVE"):
            raise RuntimeError(message)
        self.warn(f"{message}. The package works without them, more slowly; `python -m g2rl_kernels` tells.")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """Editable installs: the built module goes beside the sources, if there is one."""
        declared = self.extensions
        built = Path(self.build_lib)
        self.extensions = [e for e in declared if (built / self.get_ext_filename(e.name)).exists()]
        super().copy_extensions_to_source()
        self.extensions = declared


setup(
    packages=[
        *find_packages(include=["g2rl_kernels", "g2rl_kernels.*"]),
        *find_packages("python", include=["g2rl", "g2rl.*"]),
    ],
    package_dir={"g2rl_kernels": "g2rl_kernels", "g2rl": "python/g2rl"},
    package_data={"g2rl_kernels": ["MATH.md", "py.typed"], "g2rl": ["py.typed"]},
    ext_modules=[Extension("g2rl_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
