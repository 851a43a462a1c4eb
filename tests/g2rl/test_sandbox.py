"""The sandbox of the judging workers: what the kernel refuses, with the audit hook that speaks first out of the way."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from g2rl.tasks.judges import _ESCAPE
from g2rl.tasks.pool import JudgePool, PoolError, _score_in
from g2rl.tasks.sandbox import _SECCOMP, _readable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp and landlock are Linux's")

PROGRAM = """
import ctypes, json, os, resource, socket, subprocess, sys, threading, time
from g2rl.tasks import sandbox
readable = sandbox._readable()
sandbox._limit()
missing = sandbox._confine(readable)
attempts = json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)
def held(code):
    try:
        exec(code, globals())
    except Exception as error:
        return type(error).__name__
    return "passed"
print(json.dumps([missing, [held(code) for code in attempts]]))
"""


def confined(attempts: list[str]) -> list[str]:
    """How each statement ends in a process that the kernel confines: the name of its error, or `passed`."""
    code = f"import sys; sys.path[:] = {sys.path!r}\n{PROGRAM}"
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(attempts), capture_output=True, text=True, timeout=60, check=True
    )
    missing, ends = json.loads(done.stdout)
    assert missing == ""
    return list(ends)


def raw(*arguments: str) -> str:
    """A system call without Python's own wrapper; raises OSError where it fails."""
    return f"if libc.syscall({', '.join(arguments)}) < 0: raise OSError(ctypes.get_errno(), 'refused')"


def test_the_kernel_refuses_files_network_and_processes(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("kept")
    made = str(tmp_path / "made")
    refused = [
        f"open({made!r}, 'w')",
        f"os.open({made!r}, os.O_CREAT | os.O_RDONLY)",
        f"os.open({str(tmp_path)!r}, os.O_TMPFILE | os.O_RDWR)",
        f"os.remove({str(secret)!r})",
        f"os.rename({str(secret)!r}, {made!r})",
        f"os.mkdir({made!r})",
        f"os.chmod({str(secret)!r}, 0)",
        f"os.symlink({str(secret)!r}, {made!r})",
        "socket.socket()",
        "socket.socketpair()",
        "socket.socket(socket.AF_UNIX)",
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "subprocess.run(['true'])",
        "os.kill(os.getppid(), 0)",
        "os.memfd_create('x')",
        "os.pipe()",
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        raw("425", "1", "ctypes.create_string_buffer(256)") + "  # io_uring_setup",
        raw("437", "-100", "b'/etc/passwd'", "bytes(24)", "24") + "  # openat2",
        raw("435", "bytes(88)", "88") + "  # clone3",
        raw(str(_SECCOMP[platform.machine()]), "1", "0", "0") + "  # another filter",
        "bytearray(1 << 31)",
    ]
    # ValueError is how `resource` says that a limit may not be raised.
    assert set(confined(refused)) <= {"PermissionError", "OSError", "ValueError", "MemoryError"}
    assert not Path(made).exists()
    assert secret.read_text() == "kept"


def test_what_judging_needs_passes() -> None:
    needed = [
        "import xml.dom.minidom, markdown_it",  # modules are read when they are first needed
        "sys.stdout.flush()",
        "t = threading.Thread(target=int); t.start(); t.join()",
        "time.sleep(0.01)",
        "os.urandom(4)",
        "bytearray(1 << 28)",
        "resource.getrlimit(resource.RLIMIT_AS)",
    ]
    assert confined(needed) == ["passed"] * len(needed)


def has_landlock() -> bool:
    code = "import ctypes; print(ctypes.CDLL(None).syscall(444, None, 0, 1))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) > 0


@pytest.mark.skipif(not has_landlock(), reason="this kernel has no landlock")
def test_files_outside_of_packages_are_hidden(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("kept")
    hidden = [
        f"open({str(secret)!r})",
        f"os.listdir({str(tmp_path)!r})",
        "open('/etc/passwd')",
        "open('/proc/1/environ')",
    ]
    assert confined(hidden) == ["PermissionError"] * len(hidden)
    folders = {Path(folder).resolve() for folder in _readable()}
    assert not folders & {Path("/"), Path.cwd(), Path.home(), Path(sys.prefix).resolve()}


def test_a_confined_pool_refuses_to_start_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        JudgePool(refuser, confined=True) as pool,
        pytest.raises(PoolError, match="no sandbox here: no list"),
    ):
        pool.start()
    with JudgePool(refuser) as pool:
        assert pool.scores([("3",)]) == [3.0]


def refuser():  # type: ignore[no-untyped-def]
    """A judge on a machine for which there is no list of system calls."""
    import platform

    platform.machine = lambda: "abacus"
    return float


@pytest.mark.parametrize(
    "reply, score",
    [
        (b"7 0.5\n", 0.5),
        (b"7 1e-05\n", 1e-05),
        (b"6 1.0\n", None),  # what an answer before this one has written
        (b"1.0\n", None),
        (b"7 1.0", None),  # cut off
        (b"7 nan\n", None),
        (b"", None),
        (b"\xff\n", None),
    ],
)
def test_a_reply_belongs_to_its_request(reply: bytes, score: float | None) -> None:
    assert _score_in(reply, 7) == score


def test_a_worker_that_writes_replies_of_its_own_is_replaced() -> None:
    write = "__import__('os').write({}, b'9 1.0\\n' * {}) and 0"
    with JudgePool(evaluator, workers=1) as pool:
        forged = [(write.format(handle, 1),) for handle in range(3, 9)]
        assert pool.scores([*forged, ("5",)])[-1] == 5.0
        assert pool.scores([(write.format(3, 10_000_000),), ("6",)])[-1] == 6.0


def evaluator():  # type: ignore[no-untyped-def]
    return eval


def test_the_text_of_an_escape() -> None:
    assert all(_ESCAPE.search(text) for text in ("().__class__", "open('x')", "getattr (x, 'y')"))
    assert not any(_ESCAPE.search(text) for text in ("[1, 2]", "opened (3)", "x**2 + 1"))
