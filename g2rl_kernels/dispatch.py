"""The only place that decides which backend runs an op.

A backend is a module with one plain function for each op that it serves, named as the op is, and a function
``unavailable(device, dtype) -> str | None`` that says why it cannot serve here; where it does not hold groups of any
size, also ``most_members(device) -> int``. `resolve` takes the first that can, in the order of `BACKENDS`;
a compiled GPU backend only once it is known to be right on the device: see `self_check`.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from g2rl_kernels import self_check
from g2rl_kernels.checks import short_name
from g2rl_kernels.records import Head
from g2rl_kernels.self_check import Subject, Verdict

ENVIRONMENT_VARIABLE = "G2RL_KERNELS_BACKEND"

OPS = (
    "token_logprobs",
    "sequence_features",
    "logprobs_backward",
    "token_sums",
    "part_features",
    "group_similarity",
    "exploration_scores",
    "shape_rewards",
    "group_advantages",
    "g2rl_advantages",
)


@dataclass(frozen=True)
class Backend:
    """A row of the backend table.

    Attributes:
        name: what `use_backend` takes.
        module: the module that holds its functions; loaded when first asked for.
        automatic: device types on which it is chosen without being named; None stands for all of them.
        checked: whether it serves a GPU without being named only once a measured run or its self-check stands for it.
        generations: of NVIDIA GPUs (the major number of their compute capability) on which it was measured to be faster
            than what follows; None for all. On others it is there on request.
    """

    name: str
    module: str
    automatic: tuple[str, ...] | None = None
    checked: bool = False
    generations: tuple[int, ...] | None = None

    def is_automatic(self, device: torch.device) -> bool:
        if self.automatic is not None and device.type not in self.automatic:
            return False
        return self.generations is None or torch.cuda.get_device_capability(device)[0] in self.generations


# Fastest first.
BACKENDS = (
    Backend("cuda", "g2rl_kernels.backends.cuda", ("cuda",), checked=True, generations=(9,)),
    Backend("triton", "g2rl_kernels.backends.triton", ("cuda",), checked=True),
    Backend("native", "g2rl_kernels.backends.native"),
    Backend("torch", "g2rl_kernels.backends.eager"),
    Backend("reference", "g2rl_kernels.backends.reference", automatic=()),
)

# What GPU backends and the compiled one serve, and `explain` speaks of.
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Choices in force, of which the last one counts. Of the process and not of a context: autograd runs backward passes on
# threads of its own, which must see the same choice.
_choices: list[use_backend] = []
_LACKS_OP = "does not have this op"


def _backend(name: str, argument: str = "backend") -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"{argument}: expected one of {', '.join(b.name for b in BACKENDS)}, found {name!r}")


def _asked_for() -> Backend | None:
    """The backend that was chosen by name, here or from outside."""
    for choice in _choices[-1:]:
        if choice.name is not None:
            return _backend(choice.name)
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _backend(name, ENVIRONMENT_VARIABLE) if name else None


@functools.cache
def _load(backend: Backend) -> ModuleType:
    return importlib.import_module(backend.module)


def _refusal(backend: Backend, op: str, device: torch.device, dtype: torch.dtype, m_max: int = 0) -> str | None:
    """Why `backend` cannot run `op` on tensors of this device and dtype, or groups of `m_max`; None when it can."""
    module = _load(backend)
    reason = module.unavailable(device, dtype)
    if reason is None and not hasattr(module, op):
        reason = _LACKS_OP
    if reason is None and m_max and hasattr(module, "most_members") and m_max > (most := module.most_members(device)):
        reason = f"groups: expected at most {most} responses in a group, found {m_max}"
    return reason


def resolve(op: str, device: torch.device, dtype: torch.dtype, head: Head | None = None, m_max: int = 0) -> Callable:
    """The function that runs `op` on tensors of this device and dtype.

    Args:
        head: of a head op, where its options decide which kernels are to be checked; None for a plain one.
        m_max: of `g2rl_advantages`, responses of the largest group, for which a backend may have no room.

    Raises:
        RuntimeError: a backend was asked for by name and cannot serve; the message says why. One that has not got the
            op at all is passed over.
    """
    forced = _asked_for()
    if forced:
        reason = _refusal(forced, op, device, dtype, m_max)
        if reason is None:
            return getattr(_load(forced), op)
        if reason != _LACKS_OP:
            raise RuntimeError(f"backend {forced.name!r} cannot run {op} on {device.type} {dtype}: {reason}")
    for backend in BACKENDS:
        if not backend.is_automatic(device) or _refusal(backend, op, device, dtype, m_max) is not None:
            continue
        if backend.checked and self_check.refusal(Subject.of(backend.name, op, dtype, head), device) is not None:
            continue
        return getattr(_load(backend), op)
    raise AssertionError(f"{op}: expected a function in g2rl_kernels.backends.eager, which has every op, found none")


def backend_number(run: Callable) -> int:
    """The place in `BACKENDS` of the backend whose function this is."""
    return next(i for i, backend in enumerate(BACKENDS) if f"{run.__module__}.".startswith(f"{backend.module}."))


class use_backend:
    """Choose the backend by name, for the process or for a ``with`` block.

    Names are cuda, triton, native, torch and reference. ``use_backend("reference")`` holds from the call on; as a
    context manager it ends with the block. ``use_backend(None)`` returns to what holds where nobody calls it: the
    backend that the environment variable ``G2RL_KERNELS_BACKEND`` names, else the automatic choice. A compiled function
    runs with the choice that holds when it is called. Choices hold for all threads; if several threads make one, the
    last that has not ended counts. On devices and dtypes that the chosen backend serves, ops that it does not have are
    served by others, as if it were not chosen: `explain` says which.

    Raises:
        RuntimeError: called in a graph under compilation, which could only ignore it; without ``fullgraph=True`` the
            graph ends before it.
        ValueError: no backend of that name.
    """

    def __init__(self, name: str | None) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("use_backend: expected a call outside of what torch.compile compiles")
        if name is not None:
            _backend(name)
        self.name = name
        self._entered = False
        # Without a block to end them all but the last would stay for nothing: this one may be about to enter its own.
        for replaced in [choice for choice in _choices if not choice._entered][:-1]:
            replaced._end()
        _choices.append(self)

    def __enter__(self) -> use_backend:
        _choices.append(self)
        if not self._entered:
            self._end()  # where it stood since it was made
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        with suppress(ValueError):
            _choices.remove(self)


def explain() -> str:
    """Which backend serves which op on this machine, by device and dtype, and why the faster ones do not.

    For backends with a self-check it says what was checked and when; nothing is checked by asking.

    Raises:
        ValueError: an environment variable names no backend, or nothing to do about self-checks.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [torch.device("cpu")] + ([torch.device(accelerator.type, 0)] if accelerator else [])
    lines = [f"torch {torch.__version__}, {torch.get_num_threads()} threads, devices: {', '.join(map(str, devices))}"]
    described, refused = _described()
    lines += described
    forced = _asked_for()
    if forced:
        lines.append(f"backend set by name: {forced.name}")
    if mode := self_check.wanted():
        lines.append(f"self-checks of GPU backends: {mode}")
    for device in devices:
        dtypes: dict[str, list[str]] = {}
        for dtype in _DTYPES:
            text = "\n".join(_explained(device, dtype, forced, refused))
            dtypes.setdefault(text, []).append(short_name(dtype))
        lines += [f"\n{device.type}, {', '.join(names)}\n{text}" for text, names in dtypes.items()]
    return "\n".join(lines)


def refusing() -> set[str]:
    """Backends whose ops raise though they are chosen: for an environment variable that holds no word they know."""
    return _described()[1]


def _described() -> tuple[list[str], set[str]]:
    """What backends say of themselves, and those that are `refusing`."""
    lines, names = [], set()
    for backend in BACKENDS:
        module = _load(backend)
        if hasattr(module, "describe") and _refusal(backend, OPS[0], torch.device("cpu"), torch.float32) is None:
            try:
                lines.append(module.describe())
            except RuntimeError as error:
                names.add(backend.name)
                lines.append(f"{backend.name} kernels refuse to run: {str(error).splitlines()[0]}")
    return lines, names


def _explained(device: torch.device, dtype: torch.dtype, forced: Backend | None, refusing: set[str]) -> list[str]:
    """Lines of one device and dtype."""
    lines = []
    served: dict[str, list[str]] = {}
    reasons: dict[str, list[str]] = {}
    for op in OPS:
        for backend, why_not in _tried(op, device, dtype, forced):
            if why_not is None:
                served.setdefault(backend.name, []).append(op)
            else:
                reasons.setdefault(f"{backend.name}: {why_not}", []).append(op)
    for name, ops in served.items():
        lines.append(f"  {name:10s} {'refuses' if name in refusing else 'serves'} {', '.join(ops)}")
        if _backend(name).checked and _backend(name) != forced:
            lines += [f"  {'':10s} {text}" for text in _checks(name, ops, device, dtype)]
    for why, ops in reasons.items():
        scope = "" if len(ops) == len(OPS) else f" ({', '.join(ops)})"
        lines.append(f"  not {why}{scope}")
    return lines


def _tried(
    op: str, device: torch.device, dtype: torch.dtype, forced: Backend | None
) -> Iterator[tuple[Backend, str | None]]:
    """Backends in turn, each with why it does not serve the op, to the one that does."""
    if forced and _refusal(forced, op, device, dtype) == _LACKS_OP:
        forced = None
    for backend in BACKENDS:
        asked = backend == forced
        # A failed self-check keeps nobody from asking for a backend by name.
        why_not = (_refusal if asked else _known_refusal)(backend, op, device, dtype)
        if why_not is None and not (asked if forced else backend.is_automatic(device)):
            why_not = f"{forced.name} was asked for" if forced else "only on request"
        yield backend, why_not
        if why_not is None:
            return


def _known_refusal(backend: Backend, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """`_refusal`, or how an earlier self-check failed."""
    reason = _refusal(backend, op, device, dtype)
    if reason is None and backend.checked and backend.is_automatic(device):
        found = self_check.known(Subject.of(backend.name, op, dtype, None), device)
        if found is not None and not found.passed:
            return f"self-{found}"
    return reason


def _checks(backend: str, ops: list[str], device: torch.device, dtype: torch.dtype) -> list[str]:
    """What stands for a backend that serves `ops` on this device."""
    lines = []
    unknown = "not checked" if self_check.wanted() == "skip" else "will be checked when first used"
    for subject in dict.fromkeys(Subject.of(backend, op, dtype, None) for op in ops):
        run = self_check.measured(subject, device)
        found = self_check.known(subject, device)
        lines.append(f"{subject.work}: {run or found or unknown}")
    return lines


def check_all(device: torch.device) -> Iterator[tuple[Subject, Verdict]]:
    """Run the self-check of each backend that serves a device unasked, by dtype and kind of head, whatever is known."""
    for backend in BACKENDS:
        if not (backend.checked and backend.is_automatic(device)):
            continue
        subjects = []
        for dtype in _DTYPES:
            if _refusal(backend, "sequence_features", device, dtype) is None:
                plain = Subject.of(backend.name, "sequence_features", dtype, None)
                kinds = ("", "+bias", "+softcap", "+bias+softcap")
                subjects += [replace(plain, work=plain.work + kind) for kind in kinds]
            if _refusal(backend, "g2rl_advantages", device, dtype) is None:
                subjects.append(Subject.of(backend.name, "g2rl_advantages", dtype, None))
        for subject in dict.fromkeys(subjects):
            yield subject, self_check.run(subject, device)
