"""Files of a run's folder: on disk when a call returns, and the old or the new ones after a crash."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class StorageError(RuntimeError):
    """A run's folder cannot be written: the disk is full, it is read-only, or it is gone."""


@contextmanager
def writing(what: str, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Errors of a block that writes `what` as `StorageError`."""
    try:
        yield
    except errors as error:
        # Of a folder that is copied each file has an error.
        said = error.args[0][0][-1] if isinstance(error, shutil.Error) else error
        raise StorageError(f"{what} cannot be written: {said}") from error


def write_durably(path: Path, contents: Iterable[str] | bytes) -> None:
    """Replace `path` in one move by lines or bytes, so that a crash leaves the old file or the new one.

    Raises:
        StorageError: it cannot be written; the old one is still there.
    """
    draft = path.with_name(path.name + ".part")
    with writing(repr(str(path))):
        with draft.open("wb") as file:
            file.writelines([contents] if isinstance(contents, bytes) else (line.encode() for line in contents))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync(path.parent)


def let_go(folder: Path) -> None:
    """Remove a folder that `hold` made and this process holds, if nothing else has been written there."""
    lock = folder / ".lock"
    if folder.is_dir() and list(folder.iterdir()) == [lock] and hold(folder) is not None:
        lock.unlink()
        folder.rmdir()


def hold(folder: Path) -> int | None:
    """Hold a run's folder, which is created when missing, for this process alone, which may hold it more than once.

    Returns:
        A descriptor: closing any one of them, or the end of the process, lets go of the folder. None where another
        process holds it. Where the file system has no locks, nobody is kept out.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor


def new_file_mode(folder: Path) -> int:
    """Permissions that a new file in a folder gets, by this process's umask and the folder's own rules."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return stat.S_IMODE(mode)


def sync(path: Path) -> None:
    """Have the disk hold a file's contents, or a folder's names, as they are now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The digest of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
