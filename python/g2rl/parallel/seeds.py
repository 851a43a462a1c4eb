"""Draws that depend on a response's place in its step, whichever rank samples it, and beside which others."""

from __future__ import annotations

import hashlib


def response_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """The seeds of responses `first` to `first + count - 1` of a call with `seed`, each in [0, 2^63).

    Whoever samples a part of them draws the same numbers for it.
    """
    return [
        int.from_bytes(hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()) >> 1
        for place in range(first, first + count)
    ]
