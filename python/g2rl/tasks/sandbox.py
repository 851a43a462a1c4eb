"""What a process that judges model text may do: compute, and read the modules that it needs.

Some judges hand text to `eval`, directly or through sympy's parser, and no check of the text finds every way out of
Python. So the kernel keeps the process: seccomp lets few system calls pass, none that opens a socket, starts a process,
reaches another one or writes a file; landlock (https://docs.kernel.org/userspace-api/landlock.html) hides all files but
those of installed packages; limits bound memory. An audit hook says the same earlier and in words, and is all there is
beside the limits where the kernel has neither. It stops accidents, not attacks.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEMORY = 1 << 30
"""Bytes of address space beyond what the judge itself takes; a runaway power or matrix ends in MemoryError."""
_FILES = 64
_FORBIDDEN = (
    "ctypes.",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.symlink",
    "os.system",
    "os.truncate",
    "pty.",
    "resource.",
    "shutil.",
    "signal.",
    "socket.",
    "subprocess.",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# Numbers of the system calls that pass, and of those that pass for some arguments only.
_PASS = {
    "x86_64": (
        # read write close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
        0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
        # rt_sigreturn pread64 readv writev access select sched_yield mremap madvise nanosleep getpid exit uname fcntl
        15, 17, 19, 20, 21, 23, 24, 25, 28, 35, 39, 60, 63, 72,
        # getcwd readlink gettimeofday getrlimit getrusage sysinfo times getuid getgid geteuid getegid sigaltstack
        79, 89, 96, 97, 98, 99, 100, 102, 104, 107, 108, 131,
        # gettid time futex sched_getaffinity getdents64 set_tid_address restart_syscall clock_gettime
        186, 201, 202, 204, 217, 218, 219, 228,
        # clock_getres clock_nanosleep exit_group newfstatat readlinkat faccessat pselect6 ppoll set_robust_list
        229, 230, 231, 262, 267, 269, 270, 271, 273,
        # getrandom statx rseq faccessat2
        318, 332, 334, 439,
    ),
    "aarch64": (
        # getcwd fcntl faccessat close getdents64 lseek read write readv writev pread64 pselect6 ppoll readlinkat
        17, 25, 48, 57, 61, 62, 63, 64, 65, 66, 67, 72, 73, 78,
        # newfstatat fstat exit exit_group set_tid_address futex set_robust_list nanosleep clock_gettime clock_getres
        79, 80, 93, 94, 96, 98, 99, 101, 113, 114,
        # clock_nanosleep sched_getaffinity sched_yield restart_syscall sigaltstack rt_sigaction rt_sigprocmask
        115, 123, 124, 128, 132, 134, 135,
        # rt_sigreturn times uname getrlimit getrusage gettimeofday getpid getuid geteuid getgid getegid gettid sysinfo
        139, 153, 160, 163, 165, 169, 172, 174, 175, 176, 177, 178, 179,
        # brk munmap mremap mmap mprotect madvise getrandom statx rseq faccessat2
        214, 215, 216, 222, 226, 233, 278, 291, 293, 439,
    ),
}  # fmt: skip
_OPEN = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}  # open and openat, with the place of their flags
_CLONE = {"x86_64": 56, "aarch64": 220}
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
_IOCTL = {"x86_64": 16, "aarch64": 29}
_CLONE3 = 435
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE_THREAD = 0x10000

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3


def restrain() -> str:
    """Give up, for the rest of this process, what judging does not need. To be called once the judge is loaded.

    Returns:
        Why the kernel keeps system calls from this process not, in words; nothing where it does.
    """
    readable = _readable()
    _limit()
    missing = _confine(readable) if sys.platform == "linux" else f"seccomp is Linux's, this is {sys.platform}"
    sys.addaudithook(_refuse)
    return missing


def _limit() -> None:
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: _FILES}
    if sys.platform == "linux":  # elsewhere the address space says little about memory
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + MEMORY
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(_FORBIDDEN) or (event == "open" and arguments[2] & (_WRITING | os.O_APPEND)):
        raise PermissionError(f"{event} in a judging worker")


def _readable() -> list[str]:
    """Installed packages, the standard library, shared libraries, and the folders of packages that are loaded."""
    folders = {path for path in sys.path if path.rstrip("/").endswith("-packages")}
    folders |= {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    loaded = [getattr(module, "__path__", None) for module in list(sys.modules.values())]
    folders |= {path for paths in loaded if isinstance(paths, list) for path in paths}
    folders |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/dev/urandom"}
    return sorted(folder for folder in folders if isinstance(folder, str) and os.path.isabs(folder))


def _confine(readable: Sequence[str]) -> str:
    """Enter landlock, where the kernel has it, and seccomp; return why the latter does not hold."""
    machine = platform.machine()
    if machine not in _PASS:
        return f"no list of system calls for {machine}"
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, filtered, all_threads = 38, 1, 1
    if libc.prctl(no_new_privileges, 1, 0, 0, 0):
        return f"prctl: {os.strerror(ctypes.get_errno())}"
    _hide_files(libc, readable)
    program = _filter(machine)
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    if libc.syscall(_SECCOMP[machine], filtered, all_threads, header):
        return f"seccomp: {os.strerror(ctypes.get_errno())}"
    return ""


def _hide_files(libc: ctypes.CDLL, readable: Sequence[str]) -> None:
    """Refuse all files but those below `readable`, to be read. Does nothing where the kernel has no landlock."""
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)  # how many kinds of access to files it knows
    attributes = struct.pack("QQQ", (1 << rights) - 1, 0b11, 0b11)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = libc.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    for path in readable:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # a folder that is named and not there
            continue
        allowed = _READ_FILE | (_READ_FOLDER if os.path.isdir(path) else 0)
        libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, handle), 0)
        os.close(handle)
    libc.syscall(_LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _filter(machine: str) -> bytes:
    """The program of seccomp, in classic BPF: one 8-byte instruction (operation, jumps if true and false, value) each.

    What is not named fails with EPERM, as if the user had no right to it; other architectures' calls do, too.
    """
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    passed, refused = 0x7FFF0000, 0x00050000
    refuse = (give, 0, 0, refused | errno.EPERM)
    program = [(load, 0, 0, 4), (equal, 1, 0, _ARCHITECTURE[machine]), refuse, (load, 0, 0, 0)]
    for number in _PASS[machine]:
        program += [(equal, 0, 1, number), (give, 0, 0, passed)]
    # glibc falls back from clone3 where the kernel has none; Python takes ENOTTY for an ordinary file.
    for number, error in ((_CLONE3, errno.ENOSYS), (_IOCTL[machine], errno.ENOTTY)):
        program += [(equal, 0, 1, number), (give, 0, 0, refused | error)]
    for number, place in _OPEN[machine]:
        flags = 16 + 8 * place
        program += [(equal, 0, 4, number), (load, 0, 0, flags), (any_bit, 1, 0, _WRITING), (give, 0, 0, passed), refuse]
    # A thread of this process, no process of its own.
    program += [(equal, 0, 4, _CLONE[machine]), (load, 0, 0, 16), (any_bit, 0, 1, _CLONE_THREAD)]
    program += [(give, 0, 0, passed), refuse]
    # Limits may be read: the new ones are a null pointer.
    program += [
        (equal, 0, 6, _PRLIMIT[machine]),
        (load, 0, 0, 32),
        (equal, 0, 3, 0),
        (load, 0, 0, 36),
        (equal, 0, 1, 0),
    ]
    program += [(give, 0, 0, passed), refuse, refuse]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
