"""Draw tokens from logits: each response by its own stream of random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor
from transformers.generation.logits_process import TopPLogitsWarper

_BLOCK = 256


def response_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """The seeds of responses `first` to `first + count - 1` of a call with `seed`, each in [0, 2^63).

    Whoever samples a part of them draws the same numbers for it.
    """
    return [
        int.from_bytes(hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()) >> 1
        for place in range(first, first + count)
    ]


def uniforms(seeds: Sequence[int], length: int) -> torch.Tensor:
    """[B, length] fp32 in [0, 1): row i from a stream of its own, and the same whatever the length."""
    rows = [torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.empty(0, length)


def draw(
    logits: torch.Tensor, u: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] int64, and their log-probabilities [B] under the distribution that they are drawn from.

    The inverse of the cumulated probabilities at `u`, found among blocks of tokens and then inside one: on a CPU,
    `torch.multinomial` over a vocabulary costs as much as a small model's decoding step, and cumulating the whole of it
    a tenth of that.

    Args:
        logits: [B, V].
        u: [B] fp32 in [0, 1).
        temperature, top_p: as in `Sampler.sample`; the temperature above 0.

    Of logits with NaN, some token of the vocabulary, with NaN.
    """
    if temperature != 1:
        logits = logits.float() / temperature
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    p = logits.softmax(-1, dtype=torch.float32)
    padded = torch.nn.functional.pad(p, (0, -p.shape[1] % _BLOCK)) if p.shape[1] % _BLOCK else p
    blocks = padded.view(p.shape[0], -1, _BLOCK)
    block, u = _invert(blocks.sum(-1), u)
    inside, _ = _invert(blocks[torch.arange(p.shape[0], device=p.device), block], u)
    token = (block * _BLOCK + inside).clamp_(max=p.shape[1] - 1)
    return token, p.gather(1, token[:, None]).squeeze(1).log()


def _invert(p: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of each row [B, n] whose cumulated value exceeds u times the sum, and where in it that lies, in [0, 1).

    The product is below the sum for every u below 1, so the value found is above 0.
    """
    cdf = p.cumsum(-1)
    target = u.to(p)[:, None] * cdf[:, -1:]
    found = torch.searchsorted(cdf, target, right=True).clamp_(max=p.shape[1] - 1)
    below = torch.where(found > 0, cdf.gather(1, (found - 1).clamp(min=0)), 0)
    share = (target - below) / p.gather(1, found)
    return found.squeeze(1), share.squeeze(1).clamp(0, 1 - 2**-24)


class Draws(LogitsProcessor):
    """`draw` for transformers' generate, decoding greedily: leaves nothing but the drawn token.

    Args:
        u: [B, T], of T steps at most.
        temperature: 0 leaves the logits as they are.
    """

    def __init__(self, u: torch.Tensor, temperature: float, top_p: float) -> None:
        self.u = u
        self.temperature = temperature
        self.top_p = top_p
        self.logps: list[torch.Tensor] = []
        """[B] log-probabilities of the drawn tokens, one tensor a step; at a temperature of 0 greatest logits."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            self.logps.append(scores.amax(-1))
            return scores
        token, logps = draw(scores, self.u[:, len(self.logps)], self.temperature, self.top_p)
        self.logps.append(logps)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)
