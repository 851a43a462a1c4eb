"""Faults at a chosen moment of a run, from inside of it: `at` is called by a child process before `g2rl train`."""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = {
    "rollout": ("g2rl.ahead", "collect"),
    "update": ("g2rl.update", "Updater.run"),
    "save": ("g2rl.trainer", "save_checkpoint"),
    "evaluation": ("g2rl.trainer", "evaluate"),
    "log": ("g2rl.log", "RunLog.metrics"),
    "start": ("g2rl.trainer", "RunLog"),
}
"""What a run goes through, as the functions whose calls are counted; the last one continues the log files."""
_FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree")


def at(stage: str, call: int, action: Callable[[], Any]) -> None:
    """Do something as the `call`-th call of a stage begins, counted from 1."""
    module_name, name = STAGES[stage]
    owner: Any = importlib.import_module(module_name)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    whole, calls = getattr(owner, last), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            action()
        return whole(*args, **kwargs)

    setattr(owner, last, counted)


def kill_after(seconds: float) -> None:
    """kill -9 from another process, whatever this one is doing by then."""
    victim = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(victim, signal.SIGKILL)
        os._exit(0)


def kill_at_file_event(count: int) -> None:
    """kill -9 just before the `count`-th file or folder of this thread is opened, renamed, made or removed."""
    thread, events = threading.get_ident(), []

    def hook(event: str, _: Any) -> None:
        if event in _FILE_EVENTS and threading.get_ident() == thread:
            events.append(1)
            if len(events) == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_USER, _PRIVATE = 0x20000, 0x10000000, 1 << 18 | 1 << 14
_CAPABILITIES = 0x20080522  # version 3
_BUT_FILE_PERMISSIONS = 0xFFFFFFFF & ~(1 << 1 | 1 << 2)


def can_mount() -> bool:
    """Whether a process may have file systems of its own here; tried in one, since it has them from then on."""
    child = os.fork()
    if child == 0:
        try:
            small_disk(Path("/mnt"), 1 << 16)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def small_disk(folder: Path, size: int) -> None:
    """Put a file system of `size` bytes, in memory, on a folder, for this process alone.

    Raises:
        OSError: this process may not.
    """
    user, group = os.getuid(), os.getgid()
    _must(_LIBC.unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)))
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    _must(_LIBC.mount(b"none", b"/", None, _PRIVATE, None))
    _must(_LIBC.mount(b"none", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()))


def _must(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def read_only(folder: Path) -> None:
    """Take the right to write below a folder away; also from root, who loses what stands above such rights."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
    held = (ctypes.c_uint32 * 6)()
    _must(_LIBC.capget(header, held))
    for row in (0, 2):  # effective and inheritable
        held[row] &= _BUT_FILE_PERMISSIONS
    _must(_LIBC.capset(header, held))
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o555)


def remove(folder: Path) -> None:
    """Remove a folder under a run that writes to it."""
    shutil.rmtree(folder)
