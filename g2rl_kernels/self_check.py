"""Whether a compiled GPU backend may serve here unasked: a check in a process of its own, once, and its result.

Kernels that were right on one chip can be wrong on the next: another compiler, another memory model. So where no
measured run of these very sources stands for a device, the first use of a backend runs `g2rl_kernels.self_check_run` in
a subprocess, for an illegal access would end this one's context:

    passed                                   the backend serves
    wrong, crashed, or longer than a minute  the next backend serves; one warning says which check, and where to report

What passed or was wrong is kept on disk; a crash, a lack of time or memory, or no start at all may not happen again.

A result holds for a chip, driver, versions of torch, triton and this package's files, dtype and kind of head. Nothing
here touches random state, grad mode or autocast, and nothing is run while a CUDA graph is captured.

The variable G2RL_KERNELS_CHECK skips the check ("skip": backends serve unchecked) or forces it ("force": whatever is
known).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from g2rl_kernels.checks import short_name
from g2rl_kernels.records import Head
from g2rl_kernels.version import __version__

ENVIRONMENT_VARIABLE = "G2RL_KERNELS_CHECK"
LIMIT_S = 60.0

# Backend, chip as PyTorch names it, and revision -> where the run is recorded in which all GPU tests passed there:
# `benchmarks/gpu.sh` prints its line. It does not stand for what was changed since.
MEASURED: dict[tuple[str, str, str], str] = {}

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Subject:
    """What is checked: kernels are compiled anew for each of these.

    Attributes:
        backend: its name in `dispatch.BACKENDS`.
        dtype: of hidden and weight: "bfloat16". Features of groups are fp32.
        work: "head", "head+bias", "head+softcap", "head+bias+softcap" or "groups".
    """

    backend: str
    dtype: str
    work: str

    @classmethod
    def of(cls, backend: str, op: str, dtype: torch.dtype, head: Head | None) -> Subject:
        if op not in ("token_logprobs", "sequence_features", "logprobs_backward", "token_sums", "part_features"):
            return cls(backend, "float32", "groups")
        work = "head"
        if head is not None:
            work += "+bias" * (head.bias is not None) + "+softcap" * (head.softcap > 0)
        return cls(backend, short_name(dtype), work)

    def __str__(self) -> str:
        return f"{self.backend}, {self.dtype}, {self.work}"


@dataclass(frozen=True)
class Verdict:
    """How a check ended.

    Attributes:
        passed: all of it.
        check: the part that failed, or during which the process ended; "" if none.
        detail: what was wrong, in a line.
        when: date and time in UTC.
        seconds: that it took.
        lasting: whether it is known for good. A crash, or a lack of time or memory, may not happen again.
    """

    passed: bool
    check: str = ""
    detail: str = ""
    when: str = ""
    seconds: float = 0.0
    lasting: bool = True

    def __str__(self) -> str:
        if self.passed:
            return f"checked on {self.when}: passed"
        return f"checked on {self.when}: failed at {self.check}: {self.detail}"


_verdicts: dict[tuple[Subject, str], Verdict] = {}
_lock = threading.Lock()


def _in_forked_child() -> None:
    """Another thread, which the child has not, may hold the lock."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_in_forked_child)


def refusal(subject: Subject, device: torch.device) -> str | None:
    """Why the backend may not serve unasked, None if it may. Runs the check if nothing is known yet."""
    mode = wanted()
    if mode == "skip" or (mode != "force" and measured(subject, device)):
        return None
    with _lock:
        found = _verdicts.get((subject, chip(device)))
        if found is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return "not checked yet, and a CUDA graph is being captured"
            found = _agreed(subject, device, mode == "force")
            _verdicts[subject, chip(device)] = found
            if not found.passed:
                _warn(subject, device, found)
    return None if found.passed else f"its self-check failed at {found.check}: {found.detail}"


def known(subject: Subject, device: torch.device) -> Verdict | None:
    """What was found earlier, in this process or another; nothing is run."""
    return _verdicts.get((subject, chip(device))) or _read(_file(subject, device))


def measured(subject: Subject, device: torch.device) -> str | None:
    """The record of the run that stands for this backend on such a device."""
    return MEASURED.get((subject.backend, chip(device), revision(subject.backend)))


@functools.cache
def revision(backend: str) -> str:
    """A number for the sources of a backend and of what it uses of the package, and for the kernels' compiler."""
    folders = (_PACKAGE / "backends" / backend, _PACKAGE / "plans")
    used = (_PACKAGE / f"{name}.py" for name in ("checks", "products", "records", "sums", "workspace"))
    digest = _digest([*used, *(path for folder in folders for path in folder.rglob("*.py"))])
    compiled = importlib.import_module("g2rl_kernels._cuda").sources if backend == "cuda" else _version("triton")
    digest.update(compiled.encode())
    return digest.hexdigest()[:12]


def run(subject: Subject, device: torch.device) -> Verdict:
    """Check now, in a subprocess, and keep the result."""
    found = _run(command(subject, device), LIMIT_S)
    if found.lasting:
        _write(_file(subject, device), subject, device, found)
    return found


def command(subject: Subject, device: torch.device) -> list[str]:
    arguments = [subject.backend, str(device), subject.dtype, subject.work]
    # -P: the folder that the user works in may have a queue.py of its own.
    return [sys.executable or "", "-P", "-m", "g2rl_kernels.self_check_run", *arguments]


def wanted() -> str:
    """What the environment variable says of the check: "skip", "force", or "" for nothing.

    Raises:
        ValueError: another word.
    """
    mode = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if mode not in ("", "skip", "force"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected skip, force or nothing, found {mode!r}")
    return mode


def _warn(subject: Subject, device: torch.device, verdict: Verdict) -> None:
    warnings.warn(
        f"g2rl_kernels: the {subject.backend} backend does not serve {subject.dtype} ({subject.work}) on "
        f"{chip(device)}: its self-check failed at {verdict.check}: {verdict.detail}. A slower backend does. Please "
        "report what `python -m g2rl_kernels --check` prints in an issue of the project.",
        RuntimeWarning,
        stacklevel=2,
    )


# ---- the subprocess --------------------------------------------------------------------------------------------------


def _run(command: list[str], limit_s: float) -> Verdict:
    """Its lines name checks as they begin; the last one is the result in JSON, if the process ends well."""
    path = os.pathsep.join(filter(None, (str(_PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {ENVIRONMENT_VARIABLE: "skip", "PYTHONPATH": path}
    environment.pop("PYTHONOPTIMIZE", None)  # it would leave out the assertions that checks are made of
    began, when = time.perf_counter(), datetime.now(UTC).strftime("%Y-%m-%d %H:%M")

    def ended(passed: bool, check: str, detail: str, lasting: bool) -> Verdict:
        return Verdict(passed, check, detail, when, round(time.perf_counter() - began, 1), lasting)

    # To files: a process that this one leaves behind could keep a pipe open. Compilers write in any encoding.
    file = functools.partial(tempfile.TemporaryFile, "w+", errors="replace")
    with file() as out, file() as errors:
        try:
            process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment, start_new_session=True)
        except OSError as error:  # a program that embeds Python may not know its interpreter
            return ended(False, "its start", f"cannot start {command[0]!r}: {error.strerror}", False)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        errors.seek(0)
        lines, complaint = out.read().splitlines(), errors.read().splitlines()
    begun = next((line.removeprefix("check: ") for line in reversed(lines) if line.startswith("check: ")), "its start")
    if status is None:
        return ended(False, begun, f"took longer than {limit_s:.0f} s", False)
    if status < 0:
        return ended(False, begun, f"ended by {signal.Signals(-status).name}", False)
    if status or not lines or not lines[-1].startswith("{"):
        return ended(False, begun, f"ended with status {status}: {complaint[-1] if complaint else 'no message'}", False)
    result = json.loads(lines[-1])
    return ended(result["passed"], result["check"], result["detail"], True)


# ---- the same result on all ranks ------------------------------------------------------------------------------------


def _agreed(subject: Subject, device: torch.device, force: bool) -> Verdict:
    """The verdict of this process, or of the rank that asked first: ranks with other kernels would have other bits."""

    def own() -> Verdict:
        return (None if force else _read(_file(subject, device))) or run(subject, device)

    store = _store()
    return own() if store is None else agree(store, f"g2rl_kernels/{_key(subject, device)}", own)


def agree(store: Any, key: str, own: Any) -> Verdict:
    """The first process to come makes the verdict and the others wait for it; no collective, which not all may join."""
    if store.add(f"{key}/asked", 1) == 1:
        found = Verdict(False, "its start", "the rank that ran it was interrupted", lasting=False)
        try:
            found = own()
        finally:
            store.set(key, json.dumps(asdict(found)))
        return found
    return Verdict(**json.loads(store.get(key)))


def _store() -> Any:
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return torch.distributed.distributed_c10d._get_default_store()
    return None


# ---- what is known ---------------------------------------------------------------------------------------------------


def chip(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _facts(subject: Subject, device: torch.device) -> dict[str, str]:
    """What a result holds for."""
    return {
        "chip": chip(device),
        "driver": _driver() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "package": f"{__version__} {_files_of_package()}",
        "subject": str(subject),
    }


def _driver() -> str:
    """Of CUDA, as a number; a build for AMD has none."""
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(version()) if version else str(torch.version.hip)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _files_of_package() -> str:
    """A number for all that could change what a kernel does."""
    return _digest([*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("*.so")]).hexdigest()[:12]


def _digest(paths: Iterable[Path]) -> hashlib._Hash:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest


def _key(subject: Subject, device: torch.device) -> str:
    return hashlib.sha256(json.dumps(_facts(subject, device)).encode()).hexdigest()[:24]


def _file(subject: Subject, device: torch.device) -> Path | None:
    """None where there is no place for it: a user without a home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return cache / "g2rl_kernels" / f"check-{_key(subject, device)}.json"


def _read(file: Path | None) -> Verdict | None:
    if file is None:
        return None
    try:
        return Verdict(**json.loads(file.read_text())["verdict"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or not of this version
        return None


def _write(file: Path | None, subject: Subject, device: torch.device, verdict: Verdict) -> None:
    """In one step, so that no process reads half of it; no folder that can be written costs a check a process."""
    if file is None:
        return
    text = json.dumps({"facts": _facts(subject, device), "verdict": asdict(verdict)}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        part.replace(file)
    except OSError:
        pass
