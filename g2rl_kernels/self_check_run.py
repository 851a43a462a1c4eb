"""The self-check itself: ``python -m g2rl_kernels.self_check_run BACKEND DEVICE DTYPE WORK``, run by `self_check`.

Prints "check: NAME" as each check begins, and at last one line of JSON: {"passed", "check", "detail"}. It stops at the
first that fails. Where the device has no memory to spare, or is taken, stderr says so, with exit status 1: that says
nothing of kernels.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from g2rl_kernels import testing
from g2rl_kernels.dispatch import use_backend
from g2rl_kernels.ops.groups import g2rl_advantages
from g2rl_kernels.ops.head import sequence_features, token_logprobs
from g2rl_kernels.records import SequenceFeatures, Shaping
from g2rl_kernels.self_check import LIMIT_S
from g2rl_kernels.testing import HeadSample, Options, Shape

LAUNCHES = 20
# Lengths around tiles of 128 tokens; d of a multiple of 8, which TMA can address, and not; V beyond two tiles' edge.
LENGTHS = (1, 0, 130, 129, 37)
SIZES = ((1032, 4176), (1031, 1105))
# A response of more than two segments of 512 tokens, which end inside it.
LONG = (70, 1100, 3)


@dataclass(frozen=True)
class Setting:
    """What the command line asks for.

    Attributes:
        bias, softcap: whether the head has them. Other options are numbers to kernels, and are all set.
        sizes: (d, V) of the head problems.
    """

    device: torch.device
    dtype: torch.dtype
    bias: bool
    softcap: bool
    sizes: tuple[tuple[int, int], ...] = SIZES

    @property
    def options(self) -> Options:
        # Both shrink logits: scaled up, those of right kernels would have errors at the bounds, for this d.
        bias = "float32" if self.bias else None
        return Options(bias, temperature=1.3, logit_scale=0.8, softcap=8.0 if self.softcap else None)

    @functools.cached_property
    def samples(self) -> list[HeadSample]:
        return [
            testing.head_sample(Shape(LENGTHS, d, V, ""), self.dtype, self.device, kind=kind, options=self.options)
            for (d, V), kind in zip(self.sizes, ("peaked", "random"), strict=True)
        ]

    @functools.cached_property
    def expected(self) -> list[SequenceFeatures]:
        return [testing.oracle(s) for s in self.samples]


def plans(s: HeadSample, expected: SequenceFeatures) -> Iterator[tuple[str, dict[str, object]]]:
    """Every way in which a backend may compute features: arguments that lead to it."""
    row = 4 * s.head.weight.shape[0]
    small: dict[str, object] = {"workspace_bytes": 60 * row}  # in which nothing can be kept
    lse = expected.lse.float()
    third = torch.arange(lse.shape[0], device=lse.device) % 3
    yield "as it comes", {}
    yield "in a workspace of 60 rows of logits", small
    yield "lse given", {"lse": lse}
    yield "lse given, in that workspace", {"lse": lse, **small}
    yield "lse given, too far off, in that workspace", {"lse": lse + 1e-4 * third, **small}
    yield "lse given, no number, in that workspace", {"lse": torch.where(third == 1, torch.nan, lse), **small}
    yield "in a workspace of 400 rows of logits", {"workspace_bytes": 400 * row}  # 256 rows at a time, or more roots


def features(s: HeadSample, **arguments: object) -> SequenceFeatures:
    return sequence_features(s.hidden, s.head, s.targets, s.cu_seqlens, s.token_weights, **arguments)  # type: ignore[arg-type]


def check_bounds(setting: Setting) -> None:
    """Of log p, entropy and features against float64."""
    for s, expected in zip(setting.samples, setting.expected, strict=True):
        testing.assert_bounds(token_logprobs(s.hidden, s.head, s.targets), expected)
        _assert_bounds_of_plans(s, expected)


def check_long(setting: Setting) -> None:
    """Bounds where a response has several segments, and lies in several chunks of tokens, alone and beside others."""
    (d, V), *_ = setting.sizes
    s = testing.head_sample(Shape(LONG, d, V, ""), setting.dtype, setting.device, kind="drawn", options=setting.options)
    _assert_bounds_of_plans(s, testing.oracle(s))


def _assert_bounds_of_plans(s: HeadSample, expected: SequenceFeatures) -> None:
    for plan, arguments in plans(s, expected):
        with _named(plan):
            testing.assert_bounds(features(s, **arguments), expected, s.cu_seqlens)


def check_gradients(setting: Setting) -> None:
    for s in setting.samples:
        random = torch.Generator().manual_seed(1)
        upstream = torch.randn(2, s.hidden.shape[0], generator=random).to(setting.device)
        found = testing.gradients(s, upstream[0], upstream[1])
        testing.assert_gradients(found, *testing.oracle_gradients(s, *upstream))


def check_repeated(setting: Setting) -> None:
    """The same bits in each of many launches."""
    s, expected = setting.samples[0], setting.expected[0]
    for plan, arguments in plans(s, expected):
        first = features(s, **arguments)
        for _ in range(LAUNCHES - 1):
            with _named(plan):
                _same_bits(features(s, **arguments), first)


def check_batch(setting: Setting) -> None:
    """Of a response, whatever else is in its batch: all of them in another order, then one alone."""
    s, expected = setting.samples[0], setting.expected[0]
    responses = [range(*s.cu_seqlens[b : b + 2].tolist()) for b in range(len(LENGTHS))]
    for plan, arguments in plans(s, expected):
        together = features(s, **arguments)
        for order in ((4, 2, 3, 1, 0), (3,)):
            tokens = torch.tensor([t for b in order for t in responses[b]], device=setting.device)
            cu_seqlens = torch.tensor([0, *(len(responses[b]) for b in order)], device=setting.device).cumsum(0)
            moved = HeadSample(s.hidden[tokens], s.head, s.targets[tokens], cu_seqlens, s.token_weights[tokens])
            lse = arguments.get("lse")
            of_moved = arguments | ({"lse": lse[tokens]} if isinstance(lse, Tensor) else {})
            with _named(plan):
                expect = SequenceFeatures(together.features[list(order)], *(x[tokens] for x in together[1:]))
                _same_bits(features(moved, **of_moved), expect)


def check_nan(setting: Setting) -> None:
    """A NaN shows in its token and response, and nowhere else."""
    for s, expected in zip(setting.samples, setting.expected, strict=True):
        first = int(s.cu_seqlens[3])
        hidden = s.hidden.clone()
        hidden[first] = torch.nan
        others = torch.tensor([0, 1, 2, 4], device=setting.device)
        rest = torch.arange(hidden.shape[0], device=setting.device) != first
        for plan, arguments in plans(s, expected):
            clean = features(s, **arguments)
            found = features(replace(s, hidden=hidden), **arguments)
            with _named(plan):
                assert found.logps[first].isnan() and found.features[3].isnan().any(), "a NaN of hidden does not show"
                _same_bits(
                    SequenceFeatures(found.features[others], *(x[rest] for x in found[1:])),
                    SequenceFeatures(clean.features[others], *(x[rest] for x in clean[1:])),
                )


def check_groups(setting: Setting) -> None:
    """The group op against the reference, and its bits in many launches."""
    random = torch.Generator().manual_seed(2)
    cu_groups = torch.tensor([0, 16, 17, 17, 40], device=setting.device)
    phi = torch.randn(40, 1032, generator=random).to(setting.device)
    phi[5] = 0
    rewards = torch.where(torch.rand(40, generator=random) > 0.5, 1.0, -1.0).to(setting.device)
    for shaping in (Shaping(), Shaping(0.5, 1.2, "centered", 1e-2, "drop"), Shaping(rule="literal")):
        with use_backend("reference"):
            expected = g2rl_advantages(phi, rewards, cu_groups, shaping)
        found = g2rl_advantages(phi, rewards, cu_groups, shaping)
        for name, got, want in zip(found._fields, found, expected, strict=True):
            error = float((got - want).abs().max())
            # Both are float64 rounded to fp32; strength and clip reach a kernel as fp32.
            assert error <= 1e-6, f"{name} is off by {error:.3g} > 1e-6"
        for _ in range(LAUNCHES - 1):
            again = g2rl_advantages(phi, rewards, cu_groups, shaping)
            assert all(torch.equal(x, y) for x, y in zip(again, found, strict=True)), "other bits in another launch"


HEAD_CHECKS: dict[str, Callable[[Setting], None]] = {
    "bounds": check_bounds,
    "bounds of long responses": check_long,
    "gradients": check_gradients,
    "the same bits in each launch": check_repeated,
    "independence of the batch": check_batch,
    "a NaN in one response": check_nan,
}
GROUP_CHECKS: dict[str, Callable[[Setting], None]] = {"groups": check_groups}


@contextmanager
def _named(plan: str) -> Iterator[None]:
    """Puts the plan before the message of what fails inside."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{plan}: {error}") from error


def _same_bits(found: SequenceFeatures, expected: SequenceFeatures) -> None:
    for name, got, want in zip(found._fields, found, expected, strict=True):
        assert torch.equal(got, want), f"{name} has other bits in {int((got != want).sum())} of {got.numel()} places"


def run(backend: str, setting: Setting, checks: dict[str, Callable[[Setting], None]]) -> dict[str, object]:
    """Result of the checks, each announced on stdout.

    Raises:
        RuntimeError: assertions, which checks are made of, are left out of this process.
        SystemExit: the device had no memory to spare, or was taken.
    """
    if not __debug__:
        raise RuntimeError("checks are assertions, which python -O and PYTHONOPTIMIZE leave out")
    torch.manual_seed(0)
    with use_backend(backend):
        for name, check in checks.items():
            print(f"check: {name}", flush=True)
            try:
                check(setting)
            except (AssertionError, RuntimeError) as error:
                detail = str(error).strip().splitlines()[0]
                if _says_nothing_of_kernels(error):
                    sys.exit(detail)
                return {"passed": False, "check": name, "detail": detail}
    return {"passed": True, "check": "", "detail": ""}


def _says_nothing_of_kernels(error: Exception) -> bool:
    """Whether the device was merely full or taken: by PyTorch's own error, CUDA's, cuBLAS' or the host's."""
    lacks = ("out of memory", "busy or unavailable", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(lack in str(error) for lack in lacks)
    )


def main(arguments: list[str]) -> int:
    if hasattr(signal, "alarm"):  # Windows has none
        # Who waits for the result ends this process earlier, but may have been killed.
        signal.alarm(int(LIMIT_S) + 5)
    backend, device, dtype, work = arguments
    setting = Setting(torch.device(device), getattr(torch, dtype), "bias" in work, "softcap" in work)
    print(json.dumps(run(backend, setting, GROUP_CHECKS if work == "groups" else HEAD_CHECKS)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
