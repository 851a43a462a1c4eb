"""Files of a run's folder: on disk when a call returns, and the old or the new ones after a crash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


class StorageError(RuntimeError):
    """A run's folder cannot be written: the disk is full, it is read-only, or it is gone."""


def write_durably(path: Path, contents: Iterable[str] | bytes) -> None:
    """Replace `path` in one move by lines or bytes, so that a crash leaves the old file or the new one.

    Raises:
        StorageError: it cannot be written; the old one is still there.
    """
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("wb") as file:
            file.writelines([contents] if isinstance(contents, bytes) else (line.encode() for line in contents))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"{str(path)!r} cannot be written: {error}") from error


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
