"""What a disk may hold after a power failure, without one: files and folders as they were last synced, or later.

`Disk.watch` notes the contents of every file and the names in every folder at each `os.fsync`; everything that this
package promises goes by it. An image has, for each folder and file by itself, what was last synced, what there is
now, or of a file part of it, since a kernel writes back what it likes in any order.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from random import Random
from typing import Any

_sync = os.fsync


class Disk:
    """Everything below a folder as the disk has it, from `watch` on.

    Args:
        root: the folder, which is there and empty.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, set[str]] = {}
        self._open: dict[int, int] = {}

    def watch(self) -> None:
        """From now on `os.fsync` tells this disk, too."""

        def synced(descriptor: Any) -> None:
            _sync(descriptor)
            self.synced(descriptor if isinstance(descriptor, int) else descriptor.fileno())

        os.fsync = synced

    def synced(self, descriptor: int) -> None:
        """Take over what is behind an open descriptor."""
        found = os.fstat(descriptor)
        if found.st_ino not in self._open:  # held, so that no other file gets its number
            self._open[found.st_ino] = os.dup(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if stat.S_ISDIR(found.st_mode):
            self._folders[found.st_ino] = {f"{entry.inode()} {entry.name}" for entry in os.scandir(path)}
        elif os.path.exists(path):
            self._files[found.st_ino] = Path(path).read_bytes()

    def image(self, folder: Path, draw: Random) -> None:
        """Write what may be left to a new folder. Synced names that have gone since have the contents of then."""
        now: dict[int, Path] = {path.stat().st_ino: path for path in self.root.rglob("*")}
        self._write(self.root.stat().st_ino, self.root, folder, now, draw)

    def _write(self, number: int, source: Path | None, folder: Path, now: dict[int, Path], draw: Random) -> None:
        folder.mkdir()
        current = set()
        if source is not None:
            current = {f"{entry.inode()} {entry.name}" for entry in os.scandir(source)}
        kept = self._folders.get(number, set())
        for entry in sorted(current if source is not None and draw.random() < 0.5 else kept):
            inode, _, name = entry.partition(" ")
            path = now.get(int(inode))
            if (path is not None and path.is_dir()) or int(inode) in self._folders:
                if not (folder / name).exists():
                    self._write(int(inode), path, folder / name, now, draw)
            elif not (folder / name).is_dir():
                (folder / name).write_bytes(self._contents(int(inode), path, draw))

    def _contents(self, number: int, path: Path | None, draw: Random) -> bytes:
        synced = self._files.get(number, b"")
        later = synced if path is None else path.read_bytes()
        held = len(synced) if later.startswith(synced) else 0  # what was added to is not cut off
        return draw.choice((synced, later, later[: draw.randint(held, len(later))]))
