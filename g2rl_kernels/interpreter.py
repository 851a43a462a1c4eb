"""Refuses to be imported by any interpreter but the main one: PyTorch's extension modules crash in others, or later."""

import importlib
import sys


def _require_main() -> None:
    try:
        interpreters = importlib.import_module("_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters")
    except ImportError:  # a Python without any other
        return
    if interpreters.get_current() != interpreters.get_main():
        raise ImportError("g2rl_kernels: expected the main interpreter, found another: PyTorch does not serve those")


_require_main()
