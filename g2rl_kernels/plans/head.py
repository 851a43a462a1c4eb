"""Plans of the head's forward ops: which kernels run, on which tokens and responses, within the workspace.

    token_logprobs      statistics -> merge
    sequence_features   kept exponents:     for each chunk of tokens, statistics that keep z -> merge -> add_kept
                        lse given:          residuals_and_statistics -> merge -> residuals where lse was off -> targets,
                                            and `recomputed` for responses whose lse was of something else
                        recomputed:         statistics -> merge -> residuals
                        and always:         responses -> project
    token_sums          statistics -> a part's splits joined to one; the caller gathers those of all parts
    part_features       merge of all parts -> residuals -> responses -> project

What is kept costs 4 to 8 bytes of traffic for each token and word, to compute it again a second product of 2 d
operations: the first wins from small d on if chunks are large enough to fill the chip, where it was measured even if
lse is known. Plans differ in rounding alone. Which one runs depends on what a response shares with its batch (d, V,
workspace, whether a graph is being captured), never on N or B: a response's bits are its own.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from g2rl_kernels.checks import LateValues
from g2rl_kernels.plans import Kernels
from g2rl_kernels.plans.inputs import on_device_of
from g2rl_kernels.records import Head, Responses, SequenceFeatures, TokenLogprobs
from g2rl_kernels.sums import moved_to
from g2rl_kernels.workspace import workspace_or_default

# From here on 4 bytes of traffic cost less than 2 d operations: at 2.4 TB/s and 600 TFLOP/s where d = 500. Kept takes
# 1.3 ms at d = 576 (V = 49152, N = 8192), a second product 1.9.
KEEP_FROM_D = 512
# Fewer rows of logits than this do not fill a chip with programs.
KEEP_FROM_ROWS = 256
# Sums that a given lse may leave. Beyond, too few of their digits are the entropy's, and soon none.
_LEAST_SUM, _MOST_SUM = math.exp(-20), math.exp(20)
_FP32 = 4
_ROWS = 128


def token_logprobs(
    kernels: Kernels, hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int
) -> TokenLogprobs:
    batch = _Batch(kernels, hidden, head, targets, workspace_bytes)
    with on_device_of(hidden):
        _merged_statistics(batch, None)
    return TokenLogprobs(*batch.separate_results())


def sequence_features(
    kernels: Kernels, hidden: Tensor, head: Head, targets: Tensor, responses: Responses, workspace_bytes: int
) -> SequenceFeatures:
    batch, lse = _Batch(kernels, hidden, head, targets, workspace_bytes), responses.lse

    def plan(cu_seqlens: Tensor, a: Tensor) -> Plan:
        # Plans that cut tokens may read offsets on the host, which a graph under capture cannot.
        capturing = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
        if hidden.shape[1] >= KEEP_FROM_D and batch.kept_rows >= KEEP_FROM_ROWS and not capturing:
            return _from_kept(batch, cu_seqlens, a)
        if lse is not None and not capturing:
            return _from_lse(batch, cu_seqlens, a, lse.float().contiguous())
        return _from_recomputed(batch, cu_seqlens, a)

    return _features(batch, responses, plan)


def _features(batch: _Batch, responses: Responses, plan: Callable[[Tensor, Tensor], Plan]) -> SequenceFeatures:
    """By the plan that `plan` makes of cu_seqlens and a, which also leaves the batch its results."""
    hidden, weights = batch.hidden, responses.token_weights
    cu_seqlens = responses.cu_seqlens.to(torch.int32).contiguous()
    a = batch.empty(hidden.shape[0]).fill_(1) if weights is None else weights.float().contiguous()
    features = batch.empty(cu_seqlens.shape[0] - 1, hidden.shape[1]).zero_()
    if hidden.shape[0]:
        with on_device_of(hidden):
            for of_chunk in plan(cu_seqlens, a):
                _project(batch, *of_chunk, features)
                del of_chunk  # before there is another R
    return SequenceFeatures(features, *batch.separate_results())


class _Batch:
    """Tokens of one call, what limits its plans, and results [3, N]: log p, entropy, lse."""

    def __init__(self, kernels: Kernels, hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int) -> None:
        self.kernels = kernels
        self.hidden, self.head, self.targets = hidden, head, targets
        # A quarter is for R. Logits that are kept make better use of the rest: more rows fill the chip.
        self.workspace_bytes = workspace_or_default(workspace_bytes, hidden.device)
        self.limit = self.workspace_bytes - self.workspace_bytes // 4
        self.results = self.empty(3, hidden.shape[0])

    def part(self, tokens: slice) -> _Batch:
        """Some of the tokens, whose results go where theirs are."""
        part = _Batch(self.kernels, self.hidden[tokens], self.head, self.targets[tokens], self.workspace_bytes)
        part.results = self.results[:, tokens]
        return part

    def empty(self, *shape: int) -> Tensor:
        """fp32."""
        return torch.empty(shape, dtype=torch.float32, device=self.hidden.device)

    @property
    def responses(self) -> int:
        """Responses whose R takes a quarter of the workspace."""
        return max(1, self.workspace_bytes // 4 // (_FP32 * self.head.V))

    @property
    def kept_rows(self) -> int:
        """Tokens for which `kept` is within the limit; from `_ROWS` on, a multiple of that."""
        return _multiple(self.limit // self.kernels.kept_bytes(self.head))

    @property
    def statistics_rows(self) -> int:
        """Tokens whose sums in splits of the vocabulary are within the limit."""
        return max(_ROWS, _multiple(self.limit // self.kernels.statistics_bytes(self.hidden, self.head)))

    def projected(self, responses: int) -> int:
        """Of so many responses, how many may be projected at once for that to be within the limit."""
        while responses > 1 and self.kernels.projection_bytes(self.head, responses) > self.limit:
            responses = (responses + 1) // 2
        return responses

    def separate_results(self) -> tuple[Tensor, ...]:
        """log p, entropy and lse as tensors of their own: an op's outputs may not share memory."""
        return tuple(x.clone() for x in self.results.unbind())


def _project(batch: _Batch, first: int, R: Tensor, inverse: Tensor, features: Tensor) -> None:
    """Write features of the responses from `first` on."""
    n = R.shape[0]
    step = batch.projected(n)
    for i in range(0, n, step):
        j = min(i + step, n)
        batch.kernels.project(R[i:j], inverse[i:j], batch.head, features[first + i : first + j])


def _multiple(rows: int) -> int:
    return rows // _ROWS * _ROWS if rows >= _ROWS else max(1, rows)


def _merged_statistics(batch: _Batch, a: Tensor | None) -> Tensor:
    """Pass 1 for all tokens; with weights a [N], returns terms [4, N], else [4, 0]."""
    N = batch.hidden.shape[0]
    terms = batch.empty(4, 0 if a is None else N)
    for first in range(0, N, batch.statistics_rows):
        rows = slice(first, first + batch.statistics_rows)
        partials = batch.kernels.statistics(batch.hidden[rows], batch.head, batch.targets[rows])
        of_rows = batch.kernels.merge(partials, batch.head, batch.results[:, rows], None if a is None else a[rows])
        terms[:, rows] = of_rows
    return terms


# First response, R [n, V] and 1 / sum a [n] of n responses; what comes again replaces what came before. A plan has no
# other R by then.
Plan = Iterator[tuple[int, Tensor, Tensor]]


def _from_recomputed(batch: _Batch, cu_seqlens: Tensor, a: Tensor) -> Plan:
    """Two products; needs no values on the host."""
    yield from _from_terms(batch, cu_seqlens, a, _merged_statistics(batch, a))


def _from_terms(batch: _Batch, cu_seqlens: Tensor, a: Tensor, terms: Tensor) -> Plan:
    B = cu_seqlens.shape[0] - 1
    for first in range(0, B, batch.responses):
        yield first, *_from_terms_at_once(batch, cu_seqlens[first : first + batch.responses + 1], a, terms)


def _from_terms_at_once(batch: _Batch, cu_seqlens: Tensor, a: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
    R = batch.empty(cu_seqlens.shape[0] - 1, batch.head.V)
    batch.kernels.residuals(batch.hidden, batch.head, batch.targets, cu_seqlens, terms, R)
    return R, batch.kernels.inverse_weights(cu_seqlens, a)


def _from_lse(batch: _Batch, cu_seqlens: Tensor, a: Tensor, lse: Tensor) -> Plan:
    """One product; a second one only for responses whose lse turns out to be too far off to stand for log S."""
    B = cu_seqlens.shape[0] - 1
    most_tokens = batch.limit // batch.kernels.residual_statistics_bytes(batch.hidden, batch.head)
    if B <= batch.responses and batch.hidden.shape[0] <= most_tokens:
        yield from _from_lse_at_once(batch, 0, cu_seqlens, a, lse)
        return
    offsets, first = cu_seqlens.tolist(), 0
    while first < B:
        last = first + 1
        while last < B and last - first < batch.responses and offsets[last + 1] - offsets[first] <= most_tokens:
            last += 1
        tokens = slice(offsets[first], offsets[last])
        part = batch.part(tokens)
        of_part = cu_seqlens[first : last + 1] - offsets[first]
        if offsets[first] == offsets[last]:
            yield first, batch.empty(last - first, batch.head.V).zero_(), batch.empty(last - first).zero_()
        elif offsets[last] - offsets[first] > most_tokens:
            # One response too long for sums by token and tile; the choice is its own.
            for _, R, inverse in _from_recomputed(part, of_part, a[tokens]):
                yield first, R, inverse
        else:
            yield from _from_lse_at_once(part, first, of_part, a[tokens], lse[tokens])
        first = last


def _from_lse_at_once(batch: _Batch, first: int, cu_seqlens: Tensor, a: Tensor, lse: Tensor) -> Plan:
    kernels = batch.kernels
    inputs = (batch.hidden, batch.head, batch.targets, cu_seqlens)
    R = batch.empty(cu_seqlens.shape[0] - 1, batch.head.V)
    partials = kernels.residuals_and_statistics(*inputs, a, lse, R)
    terms = kernels.merge(partials, batch.head, batch.results, a, lse)
    inverse, flags, flagged = kernels.inverse_and_flags(cu_seqlens, a, terms[3], lse)
    kernels.residuals(*inputs, terms, R, flagged)
    kernels.add_targets(batch.targets, cu_seqlens, terms, flags, R)
    # Far sums hardly ever come. The host waits for them once it has launched the projection.
    extremes = LateValues(torch.stack(terms[3].aminmax()))
    yield first, R, inverse
    least, most = extremes.tolist()
    if not (_LEAST_SUM < least and most < _MOST_SUM):
        far = torch.logical_not((terms[3] > _LEAST_SUM) & (terms[3] < _MOST_SUM))
        yield from _again_without_lse(batch, first, cu_seqlens, a, far)


def _again_without_lse(batch: _Batch, first: int, cu_seqlens: Tensor, a: Tensor, far: Tensor) -> Plan:
    """Responses, and results, of tokens [N] whose lse was of something else or no number."""
    offsets = cu_seqlens.tolist()
    for b in sorted({bisect_right(offsets, token) - 1 for token in far.nonzero().flatten().tolist()}):
        tokens, of_part = slice(offsets[b], offsets[b + 1]), cu_seqlens[b : b + 2] - offsets[b]
        part, given = batch.part(tokens), batch.results[:, tokens].clone()
        for _, R, inverse in _from_recomputed(part, of_part, a[tokens]):
            yield first + b, R, inverse
        # A token's bits do not depend on the lse of its neighbours.
        part.results.copy_(torch.where(far[tokens], part.results, given))


def _from_kept(batch: _Batch, cu_seqlens: Tensor, a: Tensor) -> Plan:
    """One product and two passes over the logits of a chunk of tokens."""
    B = cu_seqlens.shape[0] - 1
    # Offsets on the host, for which it must wait, only where R of all responses does not fit.
    offsets = None if B <= batch.responses else cu_seqlens.tolist()
    for start in range(0, B, batch.responses):
        yield start, *_from_kept_at_once(batch, cu_seqlens, offsets, a, start, min(start + batch.responses, B))


def _from_kept_at_once(
    batch: _Batch, cu_seqlens: Tensor, offsets: list[int] | None, a: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """R and 1 / sum a of responses start to stop."""
    kernels, head, rows = batch.kernels, batch.head, batch.kept_rows
    begin, end = (0, batch.hidden.shape[0]) if offsets is None else (offsets[start], offsets[stop])
    R = batch.empty(stop - start, head.V).zero_()
    kept = kernels.room_for_kept(batch.hidden, head, min(rows, end - begin))
    carry = (batch.empty(head.V), batch.empty(head.V))
    for first in range(begin, end, rows):
        last = min(first + rows, end)
        tokens = slice(first, last)
        partials = kernels.statistics(batch.hidden[tokens], head, batch.targets[tokens], kept)
        terms = kernels.merge(partials, head, batch.results[:, tokens], a[tokens])
        # Programs only for the responses that have tokens in the chunk, where that is known.
        b0, b1 = start, stop
        if offsets is not None:
            b0, b1 = bisect_right(offsets, first) - 1, bisect_left(offsets, last)
        of_chunk = R[b0 - start : b1 - start]
        kernels.add_kept(kept, head, batch.targets, cu_seqlens[b0 : b1 + 1], terms, of_chunk, carry, range(first, last))
        carry = carry[::-1]
    return R, kernels.inverse_weights(cu_seqlens[start : stop + 1], a)


def token_sums(kernels: Kernels, hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int) -> Tensor:
    batch = _Batch(kernels, hidden, head, targets, workspace_bytes)
    sums = batch.empty(4, hidden.shape[0])
    with on_device_of(hidden):
        for first in range(0, hidden.shape[0], batch.statistics_rows):
            rows = slice(first, first + batch.statistics_rows)
            partials = kernels.statistics(batch.hidden[rows], batch.head, batch.targets[rows])
            sums[:, rows] = _one_split(partials, kernels.log_unit)
    return sums


def _one_split(partials: Tensor, log_unit: float) -> Tensor:
    """Partials [4, splits, N] as those of one split [4, N]."""
    m_of, S_of, X_of, z_y = partials
    m = m_of.amax(0)
    return torch.stack((m, *moved_to(m, m_of, S_of, X_of, log_unit), z_y.sum(0)))


def part_features(
    kernels: Kernels,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    responses: Responses,
    sums: Tensor,
    workspace_bytes: int,
) -> SequenceFeatures:
    batch = _Batch(kernels, hidden, head, targets, workspace_bytes)

    def plan(cu_seqlens: Tensor, a: Tensor) -> Plan:
        return _from_terms(batch, cu_seqlens, a, kernels.merge(sums.contiguous(), batch.head, batch.results, a))

    return _features(batch, responses, plan)
