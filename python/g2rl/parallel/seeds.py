"""Draws that depend on a response's place in its step, whichever rank samples it, and beside which others."""

from __future__ import annotations

import hashlib


def response_seeds(seed: int, places: range, copies: int) -> list[int]:
    """A seed for each of `copies` responses to the problems at `places`, those of one problem side by side.

    Args:
        seed: of the step.
        places: of the problems among all that the step asks.
    """
    return [_seed(f"{seed} {place} {copy}") for place in places for copy in range(copies)]


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
