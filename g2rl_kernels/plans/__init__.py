"""Which kernels a GPU backend runs for the head's ops, on which tokens, responses and words, within the workspace.

A backend hands its kernels in as `Kernels`; nothing here knows what they are written in. N tokens, d hidden, V vocab,
B responses; hidden [N, d] and targets [N] as `inputs.addressable` makes them, weights a [N], cu_seqlens [B + 1].
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from g2rl_kernels.records import Head


class Kernels(Protocol):
    """What plans are made of; each launches on the current stream of hidden's device.

    Attributes:
        log_unit: what exponents of partials are counted in: 1, or ln 2 for powers of 2.
    """

    @property
    def log_unit(self) -> float: ...

    def statistics(self, hidden: Tensor, head: Head, targets: Tensor, kept: Tensor | None = None) -> Tensor:
        """partials [4, splits, N] of each token's sums over the vocabulary; `kept` receives what `add_kept` reads."""

    def statistics_bytes(self, hidden: Tensor, head: Head) -> int:
        """Of those partials, for one token."""

    def kept_bytes(self, head: Head) -> int:
        """Of `kept`, for one token: raw logits in fp32, or less."""

    def room_for_kept(self, hidden: Tensor, head: Head, rows: int) -> Tensor:
        """Memory for `kept` of so many tokens."""

    def merge(
        self, partials: Tensor, head: Head, results: Tensor, a: Tensor | None = None, lse: Tensor | None = None
    ) -> Tensor:
        """Write log p, entropy and lse to results [3, N]; with `a`, return terms for features, else none.

        `lse` is the shift that `partials` were made with, where one was given. Terms [4 or 5, N] are the backend's own
        but for row 3, sums of exponentials.
        """

    def residuals(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        cu_seqlens: Tensor,
        terms: Tensor,
        R: Tensor,
        flagged: Any = None,
    ) -> None:
        """Write R [B, V]; with `flagged` of `inverse_and_flags`, rows of flagged responses alone."""

    def residuals_and_statistics(
        self, hidden: Tensor, head: Head, targets: Tensor, cu_seqlens: Tensor, a: Tensor, lse: Tensor, R: Tensor
    ) -> Tensor:
        """Write R [B, V] by a given lse, but for what `add_targets` adds; return partials for `merge` alone."""

    def residual_statistics_bytes(self, hidden: Tensor, head: Head) -> int:
        """Of those partials, for one token."""

    def inverse_weights(self, cu_seqlens: Tensor, a: Tensor) -> Tensor:
        """1 / sum a [B], 0 without weight."""

    def inverse_and_flags(self, cu_seqlens: Tensor, a: Tensor, S: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Any]:
        """What multiplies R [B]; flags [B] int32 of responses whose lse was off; the same as `residuals` takes it."""

    def add_kept(
        self,
        kept: Tensor,
        head: Head,
        targets: Tensor,
        cu_seqlens: Tensor,
        terms: Tensor,
        R: Tensor,
        carry: tuple[Tensor, Tensor],
        chunk: range,
    ) -> None:
        """Add tokens of a chunk, of which `kept` tells, to R [B, V], 0 at first; rows of terms count from the first.

        Chunks follow each other. `carry` holds sums [V] of a response that a chunk ends inside of: those that the chunk
        before left, and room for what this one leaves.
        """

    def add_targets(self, targets: Tensor, cu_seqlens: Tensor, terms: Tensor, flags: Tensor, R: Tensor) -> None:
        """Add what is missing of targets' residuals to R [B, V] of responses whose flag is 0."""

    def projection_bytes(self, head: Head, responses: int) -> int:
        """Of the memory that `project` takes for so many responses."""

    def project(self, R: Tensor, inverse: Tensor, head: Head, features: Tensor) -> None:
        """Write features [B, d] = logit_scale (R * inverse) W."""

    def grad_logits(
        self,
        hidden: Tensor,
        head: Head,
        targets: Tensor,
        rows_in: Tensor,
        strip: range,
        G: Tensor,
        G_even: Tensor | None = None,
        even_scale: Tensor | None = None,
    ) -> None:
        """Write gradients of raw logits G [N, len(strip)] from rows_in [6, N]: `plans.backward` says which."""
