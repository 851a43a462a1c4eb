"""Which files a checkpoint consists of, and their SHA-256: how a damaged one is told from a whole one.

Every byte is hashed once when it is saved, by the ranks in parallel, and once when it is read.
"""

from __future__ import annotations

import json
from pathlib import Path

from g2rl.config import ConfigError
from g2rl.files import sha256, write_durably
from g2rl.parallel.ranks import Ranks

MANIFEST = "manifest.json"
VERSION = 1


def write_manifest(folder: Path, ranks: Ranks) -> None:
    """Write ``manifest.json`` of all files that are there. Every rank has to call this."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    own = [names[i] for i in ranks.share(len(names))]
    digests = dict(ranks.gathered([(name, sha256(folder / name)) for name in own]))
    if ranks.first:
        (folder / MANIFEST).write_text(json.dumps({"version": VERSION, "sha256": digests}, indent=2) + "\n")


def renew_digest(folder: Path, name: str) -> None:
    """Take a file that was replaced for what was saved. The others keep their digests: damage to them still shows."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest["sha256"][name] = sha256(folder / name)
    write_durably(path, [json.dumps(manifest, indent=2) + "\n"])


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None where nothing is.

    Raises:
        ConfigError: a later version has written it.
    """
    for name in ("trainer.pt", MANIFEST):
        if not (folder / name).is_file():
            return f"{name} is missing"
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        version, digests = manifest["version"], dict(manifest["sha256"])
    except (ValueError, TypeError, KeyError):
        return f"{MANIFEST} cannot be read"
    if version != VERSION:
        raise ConfigError(
            f"checkpoint: expected one of version {VERSION}, found version {version!r} in {str(folder)!r}; a later "
            "g2rl-kernels has written it"
        )
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} is not what was saved"
    return None if "trainer.pt" in digests else f"{MANIFEST} has no trainer.pt"
