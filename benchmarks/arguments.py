"""What programs of this folder ask of their arguments, refused before anything is measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks.cases.registry import Shape, parse_shape

_NO_GPU = "expected a GPU that torch sees, found none"


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `least` on."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of {least} or more, found {text!r}")
        return value

    return whole


def above_zero(text: str) -> float:
    """The type of an argument that is a number, which may be infinite."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def gpu_shape(text: str) -> Shape:
    """The type of `--shape` for programs that need a GPU."""
    try:
        return parse_shape(text, "cuda")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device_here(text: str) -> str:
    """The type of `--device`."""
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(_NO_GPU)
    return text


def need_gpu(parser: argparse.ArgumentParser) -> None:
    """For programs that run nowhere else."""
    if not torch.cuda.is_available():
        parser.error(_NO_GPU)
