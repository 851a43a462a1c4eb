"""Head ops in chunks of tokens, with residuals summed in vocabulary space.

    R[b] = sum_{t in b} a_t (e_y - p_t) dz/dz_raw      [B, V], responses and not tokens
    Phi  = logit_scale R @ W / sum a                   [B, d]

so that features cost one product of B rows on top of the one that log-probabilities need. Sums over the vocabulary
leave the target out: S_rest = sum_{v != y} e_v gives 1 - p_y = S_rest / S and log p_y = -log1p(S_rest / e_y) without
cancellation for confident tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from g2rl_kernels.backends.eager.products import mm_fp32_left, mm_in_blocks, mm_in_chains
from g2rl_kernels.products import exact_products, mm
from g2rl_kernels.records import Gradients, Head, Needs, Responses, SequenceFeatures, TokenLogprobs
from g2rl_kernels.sums import join_parts, logprobs_of_sums
from g2rl_kernels.workspace import workspace_or_default

# Rows are handled in slices of this size after the product: on a CPU a slice stays in cache over its passes.
_SLICE_BYTES = {"cpu": 4 << 20}
_SLICE_BYTES_DEFAULT = 32 << 20
# Rows of every product. Products and reductions always see the same shapes, so that their bits do not depend on how
# many tokens or responses come along; 64 rows (of cached weight tiles) cost a CPU little against as many as fit.
_PRODUCT_ROWS = {"cpu": 64}
_PRODUCT_ROWS_DEFAULT = 256
_SMALLEST_TILE = 64


@dataclass(frozen=True, eq=False)
class _Blocks:
    """How many rows of logits and of weight fit the workspace, and logits of so many rows."""

    head: Head
    workspace_bytes: int

    @classmethod
    def of(cls, head: Head, workspace_bytes: int) -> _Blocks:
        return cls(head, workspace_or_default(workspace_bytes, head.weight.device))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.head.weight.dtype == torch.float64 else torch.float32

    @property
    def token_rows(self) -> int:
        """Tokens whose logits take half of the workspace: a power of two, or a multiple of `_PRODUCT_ROWS`."""
        rows = max(1, self.workspace_bytes // 2 // (self.dtype.itemsize * self.head.V))
        most = _PRODUCT_ROWS.get(self.head.weight.device.type, _PRODUCT_ROWS_DEFAULT)
        return rows // most * most if rows >= most else _power_of_two(rows)

    @property
    def product_rows(self) -> int:
        return min(self.token_rows, _PRODUCT_ROWS.get(self.head.weight.device.type, _PRODUCT_ROWS_DEFAULT))

    @property
    def response_rows(self) -> int:
        """Responses whose R takes a quarter of the workspace."""
        return max(1, self.workspace_bytes // 4 // (self.dtype.itemsize * self.head.V))

    def vocab_tiles(self) -> Iterator[slice]:
        """Vocabulary in tiles whose weight in fp32 takes an eighth of the workspace; on a CPU, no more than a slice."""
        limit = min(self.workspace_bytes // 8, _SLICE_BYTES.get(self.head.weight.device.type, self.workspace_bytes))
        rows = max(_SMALLEST_TILE, limit // (self.dtype.itemsize * self.head.weight.shape[1]))
        for start in range(0, self.head.V, rows):
            yield slice(start, min(start + rows, self.head.V))

    def block(self, start: int, end: int) -> Tensor:
        """Indices of tokens `start` to `end`, the last one repeated up to a multiple of `product_rows`."""
        padding = (start - end) % self.product_rows
        return torch.arange(start, end + padding, device=self.head.weight.device).clamp(max=end - 1)

    def slices(self, rows: int) -> Iterator[slice]:
        limit = _SLICE_BYTES.get(self.head.weight.device.type, _SLICE_BYTES_DEFAULT)
        step = min(self.product_rows, _power_of_two(max(1, limit // (self.dtype.itemsize * self.head.V))))
        for start in range(0, rows, step):
            yield slice(start, start + step)

    def raw_logits(self, hidden: Tensor) -> Tensor:
        """W h [n, V] without bias and options, n a multiple of `product_rows`."""
        z = torch.empty(hidden.shape[0], self.head.V, dtype=self.dtype, device=hidden.device)
        for tile in self.vocab_tiles():
            z[:, tile] = mm_in_chains(hidden, self.head.weight[tile].T, self.product_rows)
        return z

    def apply_options(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """u = z / T in place of raw logits, and the slope of the soft cap (None: one everywhere)."""
        head = self.head
        if head.bias is not None:
            z += head.bias.to(self.dtype)
        if head.softcap > 0:
            x = z.mul_(head.inner_scale)
            # 1 / cosh^2 and not 1 - tanh^2, which has no digits left where the cap saturates.
            slope = x.cosh().square_().reciprocal_()
            return x.tanh_().mul_(head.scale), slope
        return (z if head.scale == 1 else z.mul_(head.scale)), None


def _power_of_two(n: int) -> int:
    """The largest that is no more than n."""
    return 1 << (n.bit_length() - 1)


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int) -> TokenLogprobs:
    blocks = _Blocks.of(head, workspace_bytes)

    def results(z: Tensor, y: Tensor) -> Tensor:
        return torch.stack(_exponentials(blocks.apply_options(z)[0], y)[1][:3])

    return TokenLogprobs(*(x.clone() for x in _of_tokens(blocks, hidden, targets, 3, results).unbind()))


def token_sums(hidden: Tensor, head: Head, targets: Tensor, workspace_bytes: int) -> Tensor:
    blocks = _Blocks.of(head, workspace_bytes)

    def sums(z: Tensor, y: Tensor) -> Tensor:
        z_y = _at(z, y) if head.bias is None else _at(z, y) + head.bias[y.clamp(min=0)].to(blocks.dtype)
        u, _ = blocks.apply_options(z)
        m = u.amax(1)
        _, _, _, S_rest, X_rest = _exponentials_without(u, y, m)
        return torch.stack((m, S_rest, X_rest, torch.where(y >= 0, z_y, 0)))

    return _of_tokens(blocks, hidden, targets, 4, sums)


def _of_tokens(
    blocks: _Blocks, hidden: Tensor, targets: Tensor, numbers: int, of_slice: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """[numbers, N]: what `of_slice` makes of a few tokens' raw logits, which it may overwrite, and targets."""
    N = hidden.shape[0]
    found = torch.empty(numbers, N, dtype=blocks.dtype, device=hidden.device)
    with exact_products(blocks.head.weight):
        for start in range(0, N, blocks.token_rows):
            end = min(start + blocks.token_rows, N)
            tokens = blocks.block(start, end)
            z = blocks.raw_logits(hidden[tokens])
            parts = [of_slice(z[rows], targets[tokens[rows]]) for rows in blocks.slices(z.shape[0])]
            found[:, start:end] = torch.cat(parts, 1)[:, : end - start]
            del z  # before there are others: here and below
    return found


def sequence_features(
    hidden: Tensor, head: Head, targets: Tensor, responses: Responses, workspace_bytes: int
) -> SequenceFeatures:
    blocks = _Blocks.of(head, workspace_bytes)
    a = _token_weights(hidden, responses, blocks.dtype)
    results = torch.empty(3, hidden.shape[0], dtype=blocks.dtype, device=hidden.device)

    def residuals(z: Tensor, at: Tensor, real: slice) -> Tensor:
        u, slope = blocks.apply_options(z)
        e, statistics = _exponentials(u, targets[at])
        results[:, real] = torch.stack(statistics[:3])[:, : real.stop - real.start]
        return _weighted_residuals(e, targets[at], slope, a[at], *statistics[3:])

    features = _features(blocks, hidden, a, responses, residuals)
    return SequenceFeatures(features, *(x.clone() for x in results.unbind()))


def part_features(
    hidden: Tensor, head: Head, targets: Tensor, responses: Responses, sums: Tensor, workspace_bytes: int
) -> SequenceFeatures:
    blocks = _Blocks.of(head, workspace_bytes)
    joined, a = join_parts(sums, head), _token_weights(hidden, responses, blocks.dtype)
    logps, entropy, lse = (x.to(blocks.dtype) for x in joined.results)
    # What rounding took from lse goes into the weights: residuals must add up to 0.
    inverse_S, rest_share = (lse - joined.results.lse).exp().to(blocks.dtype), joined.rest_share.to(blocks.dtype)

    def residuals(z: Tensor, at: Tensor, real: slice) -> Tensor:
        u, slope = blocks.apply_options(z)
        e = _exponentials_without(u, targets[at], lse[at])[0]
        return _weighted_residuals(e, targets[at], slope, a[at], rest_share[at], inverse_S[at])

    return SequenceFeatures(_features(blocks, hidden, a, responses, residuals), logps, entropy, lse)


def _token_weights(hidden: Tensor, responses: Responses, dtype: torch.dtype) -> Tensor:
    weights = responses.token_weights
    return hidden.new_ones(hidden.shape[0], dtype=dtype) if weights is None else weights.to(dtype)


def _features(
    blocks: _Blocks,
    hidden: Tensor,
    a: Tensor,
    responses: Responses,
    residuals: Callable[[Tensor, Tensor, slice], Tensor],
) -> Tensor:
    """Phi [B, d]; `residuals` turns raw logits of a few tokens, of whom it gets the indices, into weighted residuals.

    The last token may come more than once: `real` are those without repetition.
    """
    head, d, V, device = blocks.head, hidden.shape[1], blocks.head.V, hidden.device
    offsets = responses.cu_seqlens.tolist()
    features = torch.zeros(len(offsets) - 1, d, dtype=blocks.dtype, device=device)
    with exact_products(head.weight):
        for of_R, parts_of_tokens in _plan(offsets, blocks.token_rows, blocks.response_rows):
            R = torch.zeros(len(of_R), V, dtype=blocks.dtype, device=device)
            for start, end, segments in parts_of_tokens:
                tokens = blocks.block(start, end)
                z = blocks.raw_logits(hidden[tokens])
                for rows in blocks.slices(z.shape[0]):
                    real = slice(*(min(start + row, end) for row in (rows.start, rows.stop)))
                    z[rows] = residuals(z[rows], tokens[rows], real)
                for b, s, t in segments:
                    R[b - of_R.start] += z[s - start : t - start].sum(0)
                del z
            for tile in blocks.vocab_tiles():
                features[of_R.start : of_R.stop] += mm_fp32_left(R[:, tile], head.weight[tile], blocks.product_rows)
            del R

    totals = torch.stack([a[s:t].sum() for s, t in zip(offsets[:-1], offsets[1:], strict=True)] or [a.new_zeros(())])
    totals = totals[: len(offsets) - 1]
    # Selected and not multiplied by 0: a response of no weight has no feature, whatever the head holds.
    return torch.where(totals[:, None] > 0, features * (head.logit_scale / totals[:, None]), 0)


def _exponentials(u: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """e = exp(u - max u) [n, V], e_y set to 0 (u is overwritten), and (logps, entropy, lse, S_rest / S, 1 / S) [n].

    A given lse would spare the search for the maximum, but a wrong one would overflow.
    """
    shift = u.amax(1)
    e, x_y, e_y, S_rest, X_rest = _exponentials_without(u, y, shift)
    S = S_rest + e_y
    logps, entropy, log_S = logprobs_of_sums(x_y, e_y, S_rest, X_rest)
    return e, (logps, entropy, shift + log_S, S_rest / S, S.reciprocal())


def _exponentials_without(u: Tensor, y: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """e = exp(u - shift) [n, V] with e_y set to 0 (u is overwritten), and x_y, e_y, S_rest, X_rest of `sums` [n]."""
    x = u.sub_(shift[:, None])
    x_y = _at(x, y)
    e = x.exp()
    e_y = _at(e, y)
    _set(e, y, torch.zeros_like(e_y))
    return e, x_y, e_y, e.sum(1), x.mul_(e).sum(1)


def _at(x: Tensor, y: Tensor) -> Tensor:
    """x[n, y_n]; some other number where y is -1."""
    return x.gather(1, y.clamp(min=0)[:, None])[:, 0]


def _set(x: Tensor, y: Tensor, values: Tensor) -> Tensor:
    """x[n, y_n] = values_n, in place; rows where y is -1, whose target is in another part, stay as they are."""
    return x.scatter_(1, y.clamp(min=0)[:, None], torch.where(y >= 0, values, _at(x, y))[:, None])


def _weighted_residuals(
    e: Tensor, y: Tensor, slope: Tensor | None, a: Tensor, rest_share: Tensor, inverse_S: Tensor
) -> Tensor:
    """a_t (e_y - p_t) dz/dz_raw [n, V], from exponentials without the target's; in place."""
    residuals = _set(e.mul_((-a * inverse_S)[:, None]), y, a * rest_share)
    return residuals if slope is None else residuals.mul_(slope)


Segment = tuple[int, int, int]
Block = tuple[int, int, list[Segment]]


def _plan(offsets: list[int], token_rows: int, response_rows: int) -> Iterator[tuple[range, list[Block]]]:
    """Group responses whose R fits the workspace, and their tokens into blocks (start, end, segments).

    A segment (b, s, t) says that tokens s to t belong to response b. Only a response of more than `token_rows` tokens
    is split, counted from its own start, so that its sums do not depend on its neighbours.
    """
    for first in range(0, len(offsets) - 1, response_rows):
        responses = range(first, min(first + response_rows, len(offsets) - 1))
        blocks: list[Block] = []
        for b in responses:
            for s in range(offsets[b], offsets[b + 1], token_rows):
                t = min(s + token_rows, offsets[b + 1])
                if blocks and t - blocks[-1][0] <= token_rows and s == offsets[b]:
                    start, _, segments = blocks[-1]
                    blocks[-1] = (start, t, [*segments, (b, s, t)])
                else:
                    blocks.append((s, t, [(b, s, t)]))
        yield responses, blocks


def logprobs_backward(
    grad_logps: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    saved: TokenLogprobs,
    needs: Needs,
    workspace_bytes: int,
) -> Gradients:
    """Recompute logits block by block; the gradient of z is rounded once to the model's dtype, sums are fp32."""
    blocks = _Blocks.of(head, workspace_bytes)
    weight, dtype, device = head.weight, blocks.dtype, hidden.device
    N = hidden.shape[0]
    need_bias = needs.bias and head.bias is not None
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=device) if needs.hidden else None
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=device) if needs.weight else None
    grad_bias = torch.zeros(head.V, dtype=dtype, device=device) if need_bias else None
    # fp16 holds no gradients: 1e-8 and 1e5 are both beyond it. They stay fp32, and so do their products.
    operand = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    with exact_products(weight):
        for start in range(0, N, blocks.token_rows):
            end = min(start + blocks.token_rows, N)
            tokens = blocks.block(start, end)
            z = blocks.raw_logits(hidden[tokens])
            for rows in blocks.slices(z.shape[0]):
                at = tokens[rows]
                u, slope = blocks.apply_options(z[rows])
                of_rows = TokenLogprobs(*(x[at] for x in saved))
                grad = _grad_logits(u, targets[at], grad_logps[at], grad_entropy[at], of_rows)
                grad.mul_(head.logit_scale / head.temperature)
                z[rows] = grad if slope is None else grad.mul_(slope)
            if grad_bias is not None:
                grad_bias += z[: end - start].sum(0)
            g, h = z.to(operand), hidden[start:end].to(operand)
            grad_h = torch.zeros(z.shape[0], hidden.shape[1], dtype=dtype, device=device)
            for tile in blocks.vocab_tiles():
                if grad_hidden is not None:
                    grad_h += mm_in_blocks(g[:, tile], weight[tile].to(operand), blocks.product_rows)
                if grad_weight is not None:
                    grad_weight[tile] += mm(g[: end - start, tile].T, h)
            if grad_hidden is not None:
                grad_hidden[start:end] = grad_h[: end - start]
            del z, u, grad, g
    return Gradients(
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or head.bias is None else grad_bias.to(head.bias.dtype),
    )


def _grad_logits(u: Tensor, y: Tensor, grad_logps: Tensor, grad_entropy: Tensor, saved: TokenLogprobs) -> Tensor:
    """g_logp (e_y - p) - g_H p (log p + H) [n, V]; u is overwritten.

    The target's 1 - p_y is -expm1(log p_y), exact where log p_y is.
    """
    logps, entropy, lse = saved
    log_p = u.sub_(lse[:, None])
    p = log_p.exp()
    p_y = logps.exp()
    grad_y = grad_logps * -torch.expm1(logps) - grad_entropy * p_y * (logps + entropy)
    factor = log_p.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_logps[:, None])
    return _set(p.mul_(factor).neg_(), y, grad_y)
