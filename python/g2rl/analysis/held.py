"""Records on disk, one for each problem: what a study that was killed had found is not computed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from g2rl.files import write_durably, writing


class Held:
    """A folder of numbered records, each of them whole or not there.

    Args:
        folder: created with the first record.
        made_by: what has to be equal for a record to be of use, such as a digest of the model's weights.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, Any]) -> None:
        self.folder = folder
        self._made_by = dict(made_by)

    def read(self, number: int, of: Any) -> dict[str, Any] | None:
        """The record with a number, None where there is no whole one that was made by the same and of the same."""
        try:
            record = json.loads(self._path(number).read_bytes())
            return record["found"] if record["key"] == self._key(of) else None
        except (OSError, ValueError, LookupError, TypeError):  # absent or damaged: it is computed again
            return None

    def write(self, number: int, of: Any, found: Mapping[str, Any]) -> None:
        """Keep a record, in place of an older one; raises `StorageError` where it cannot be written."""
        path = self._path(number)
        with writing(repr(str(self.folder))):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, [json.dumps({"key": self._key(of), "found": dict(found)})])

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04d}.json"

    def _key(self, of: Any) -> str:
        return hashlib.sha256(json.dumps([self._made_by, of]).encode()).hexdigest()
