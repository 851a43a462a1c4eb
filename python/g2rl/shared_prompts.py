"""Attention over packed groups: one copy of each prompt, and responses that attend to it and to themselves.

Responses to one prompt need its keys and values, and nothing else of it but the hidden state of its last token. So a
prompt passes the model once for its group, and the pass has P + m R tokens where padded copies have m (P + R). See
Prefix Grouper (https://arxiv.org/abs/2506.05433); tokens lie in one row here, so that padding costs no product either.

Attention is reached through the names that `transformers.AttentionInterface` lets others register. On a CPU it is made
of matrix products, in which a group's responses meet its prompt at once, without copies of keys and values
(`_by_products`). Where that is no option it is transformers' own, called once for the prompts and once for the
responses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from g2rl.types import Batch
from g2rl_kernels import unpad

PREFIX = "g2rl_"
MOST_SCORES = 16
"""That `_by_products` keeps for each number of the queries: about as much as a layer keeps otherwise."""
ATTENTIONS = ("sdpa", "eager")
"""Implementations of transformers that take a mask of any form."""


@dataclass(frozen=True, eq=False)
class PackedGroups:
    """A batch's groups as one row of T tokens: all prompts, one a group, then all responses without their last tokens.

    G groups, B responses, m = B / G, P = longest prompt, R = longest response - 1. Inside attention, prompts are
    [G, P] and responses [B, R], padded on the right: S = G P + B R slots.

    Attributes:
        input_ids, positions: [1, T] int64.
        slots: [S] int64, the token that each slot holds; any in padding.
        padding: [S, 1, 1] bool, True where a slot holds none.
        order: [T] int64, the slot of each token.
        sizes: G, P, B, R.
        prompt_mask, response_mask: as the implementation takes them: [1, 1, P, P], None for its own causal mask, and
            [B, 1, R, P + R].
        predicts: [N] int64, the token whose hidden state predicts each response token; a prompt's last one, m times.
        targets: [N] int64, the response tokens.
        cu_seqlens: [B + 1] int32.
    """

    input_ids: Tensor
    positions: Tensor
    slots: Tensor
    padding: Tensor
    order: Tensor
    sizes: tuple[int, int, int, int]
    prompt_mask: Tensor | None
    response_mask: Tensor
    predicts: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    _head_rows: dict[tuple[int, int], HeadRows] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        """Pairs of tokens that one head of one layer scores."""
        return attention_pairs(*self.sizes)

    def spread(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Heads [1, h, T, k] of the packed row as those of prompts [G, h, P, k] and responses [B, h, R, k]."""
        g, p, b, r = self.sizes
        rows = _Gather.apply(states[0].transpose(0, 1), self.slots, self.order, None)
        prompts, responses = rows.split([g * p, b * r])
        return prompts.unflatten(0, (g, p)).transpose(1, 2), responses.unflatten(0, (b, r)).transpose(1, 2)

    def pack(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """[1, T, h, k] of [G, P, h, k] and [B, R, h, k]."""
        rows = torch.cat([prompts.flatten(0, 1), responses.flatten(0, 1)])
        return _Gather.apply(rows, self.order, self.slots, self.padding)[None]

    def head_rows(self, key_heads: int, copies: int) -> HeadRows:
        """Where rows of each of `key_heads` x `copies` heads lie; made once for all layers."""
        if (key_heads, copies) not in self._head_rows:
            self._head_rows[key_heads, copies] = HeadRows.of(self, key_heads, copies)
        return self._head_rows[key_heads, copies]


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Rows of single heads in the order of `_by_products`: prompts [G, j, i, P], then responses [G, j, m, i, R].

    j is a head of keys, and i counts the heads of queries that share it. Row t h + j' of [T h, k] is the head j' of
    token t; a slot without a token holds any, and `padding` [n, 1] marks it (None: there is none).
    """

    there: Tensor
    back: Tensor
    padding: Tensor | None

    @classmethod
    def of(cls, packed: PackedGroups, key_heads: int, copies: int) -> HeadRows:
        g, p, b, r = packed.sizes
        heads = torch.arange(key_heads * copies, device=packed.slots.device).view(key_heads, copies)

        def in_order(slots: Tensor) -> Tensor:
            """Of [S, heads] values."""
            prompts, responses = slots.split([g * p, b * r])
            prompts = prompts.view(g, p, key_heads, copies).permute(0, 2, 3, 1)
            responses = responses.view(g, b // g, r, key_heads, copies).permute(0, 3, 1, 4, 2)
            return torch.cat([prompts.flatten(), responses.flatten()])

        there = in_order(packed.slots[:, None] * heads.numel() + heads.flatten())
        padding = in_order(packed.padding[:, :, 0].expand(-1, heads.numel()))
        rows = torch.arange(there.shape[0], device=there.device)
        back = torch.empty_like(rows[: packed.order.shape[0] * heads.numel()])
        back[there[~padding]] = rows[~padding]
        return cls(there, back, padding[:, None] if bool(padding.any()) else None)

    def spread(self, states: Tensor) -> Tensor:
        """Heads [1, h, T, k] of the packed row in this order, [n, k]."""
        return _Gather.apply(states[0].transpose(0, 1).flatten(0, 1), self.there, self.back, None)

    def pack(self, rows: Tensor) -> Tensor:
        """[T h, k] of [n, k]."""
        return _Gather.apply(rows, self.back, self.there, self.padding)


class _Gather(torch.autograd.Function):
    """Rows [n, ...] by index where each row goes to one place at most: the gradient is a gather, too, without a race.

    `back` is where each row went, any place where `unread` [n, 1, 1] marks it as gone nowhere.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Tensor, back: Tensor, unread: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, unread)
        return rows.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        back, unread = ctx.saved_tensors
        gradient = gradient.index_select(0, back)
        return gradient if unread is None else gradient.masked_fill_(unread, 0), None, None, None


def attention_pairs(groups: int, prompt: int, responses: int, length: int) -> int:
    """Of tokens that one head of one layer scores: of prompts, and of responses with their prompt and themselves."""
    return groups * prompt**2 + responses * length * (prompt + length)


def pack_groups(batch: Batch, additive: torch.dtype | None = None) -> PackedGroups:
    """Lay a batch's groups out with one copy of each prompt.

    Args:
        batch: whole groups.
        additive: type of the masks that are added to scores (`eager`); None makes them bool (`sdpa`).

    Raises:
        ValueError: responses of one group have different prompts.
    """
    m, device = batch.group_size, batch.input_ids.device
    ids, attended, response = (x.cpu() for x in (batch.input_ids, batch.attention_mask.bool(), batch.response_mask))
    prompt, fed = attended & ~response, response[:, :-1]
    _require_one_prompt(ids, prompt, m)
    prompts, responses = _right_padded(prompt[::m].sum(1)), _right_padded(fed.sum(1))
    held = torch.cat([prompts.flatten(), responses.flatten()])
    order = held.nonzero()[:, 0]
    slots = torch.zeros(held.shape, dtype=torch.int64)
    slots[order] = torch.arange(order.shape[0])
    causal, mask = _masks(prompts, responses, m, device)
    targets, cu_seqlens = unpad(ids, response)

    def row(padded: Tensor) -> Tensor:
        return torch.cat([padded[::m][prompt[::m]], padded[:, :-1][fed]])[None].to(device)

    return PackedGroups(
        input_ids=row(ids),
        positions=row(attended.cumsum(1) - 1),
        slots=slots.to(device),
        padding=~held[:, None, None].to(device),
        order=order.to(device),
        sizes=(*prompts.shape, *responses.shape),  # type: ignore[arg-type]
        prompt_mask=None if additive is None else _added(causal, additive),
        response_mask=mask if additive is None else _added(mask, additive),
        predicts=_predictors(prompts.sum(1), cu_seqlens, m).to(device),
        targets=targets.to(device),
        cu_seqlens=cu_seqlens.to(device),
    )


def _require_one_prompt(ids: Tensor, prompt: Tensor, m: int) -> None:
    lengths = prompt.sum(1).view(-1, m)
    same = bool((lengths == lengths[:, :1]).all())
    if same:
        expected = [row for group in ids[::m][prompt[::m]].split(lengths[:, 0].tolist()) for row in [group] * m]
        same = torch.equal(ids[prompt], torch.cat(expected))
    if not same:
        raise ValueError(f"batch: expected every {m} responses in a row to answer one prompt, found different prompts")


def _right_padded(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.max())) < lengths[:, None]


def _predictors(prompt_lengths: Tensor, cu_seqlens: Tensor, m: int) -> Tensor:
    """Tokens of the row that predict the responses: a prompt's last one, then the response's own but its last."""
    lengths = cu_seqlens.diff()
    last_of_prompt = (prompt_lengths.cumsum(0) - 1).repeat_interleave(m)
    fed = (lengths - 1).clamp(min=0)
    start = prompt_lengths.sum() + fed.cumsum(0) - fed
    response = torch.arange(lengths.shape[0]).repeat_interleave(lengths)
    offset = torch.arange(response.shape[0]) - cu_seqlens[response]
    return torch.where(offset == 0, last_of_prompt[response], start[response] + offset - 1)


def _masks(prompts: Tensor, responses: Tensor, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bool masks of prompts [1, 1, P, P] and responses [B, 1, R, P + R] of what is held in [G, P] and [B, R]."""
    (b, r), p = responses.shape, prompts.shape[1]
    mask = torch.empty(b, 1, r, p + r, dtype=torch.bool, device=device)
    mask[..., :p] = prompts.to(device).repeat_interleave(m, 0)[:, None, None]
    mask[..., p:] = torch.ones(r, r, dtype=torch.bool, device=device).tril()
    return torch.ones(1, 1, p, p, dtype=torch.bool, device=device).tril(), mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention(
    name: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_groups: PackedGroups | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention `name`, twice where the model was called with `packed_groups`, as it is elsewhere."""
    attend = _implementation(name, module)
    if packed_groups is None:
        return attend(module, query, key, value, attention_mask, **options)
    if _is_plain(query, packed_groups, options):
        return _by_products(packed_groups, query, key, value, options["scaling"]), None
    groups, _, responses, length = packed_groups.sizes
    (q_prompt, q), (k_prompt, k), (v_prompt, v) = map(packed_groups.spread, (query, key, value))
    prompts, _ = attend(module, q_prompt, k_prompt, v_prompt, packed_groups.prompt_mask, **options)
    if length == 0:
        return packed_groups.pack(prompts, prompts[:0, :0]), None
    copies = [x[:, None].expand(-1, responses // groups, -1, -1, -1).flatten(0, 1) for x in (k_prompt, v_prompt)]
    keys, values = torch.cat([copies[0], k], 2), torch.cat([copies[1], v], 2)
    out, _ = attend(module, q, keys, values, packed_groups.response_mask, **options)
    return packed_groups.pack(prompts, out), None


def _is_plain(query: Tensor, packed: PackedGroups, options: dict[str, Any]) -> bool:
    """Whether `_by_products` has all that a layer asks for, and a CPU, whose fused attention is slower."""
    more = [options.get(name) for name in ("softcap", "s_aux", "position_bias")] + [options.get("dropout") or None]
    plain = options.get("scaling") is not None and all(option is None for option in more)
    _, _, tokens, width = query.shape
    fits = packed.sizes[3] > 0 and packed.pairs <= MOST_SCORES * tokens * width
    return query.device.type == "cpu" and plain and fits


def _by_products(packed: PackedGroups, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention [1, T, h, k] over heads [1, h, T, k] of the packed row.

    All queries of a group's responses that share a head of keys multiply the prompt's keys at once, and each response's
    its own; one softmax goes over both. Scores are of the values' type, as in transformers' eager attention.
    """
    (g, p, b, r), (h, j) = packed.sizes, (query.shape[1], key.shape[1])
    queries, keys = packed.head_rows(j, h // j), packed.head_rows(j, 1)
    q_prompt, q = queries.spread((query * scaling).to(value.dtype)).split([g * h * p, b * h * r])
    (k_prompt, k), (v_prompt, v) = (keys.spread(x.to(value.dtype)).split([g * j * p, b * j * r]) for x in (key, value))
    k_prompt, v_prompt = k_prompt.view(g * j, p, -1), v_prompt.view(g * j, p, -1)
    k, v = k.view(b * j, r, -1), v.view(b * j, r, -1)

    causal = _added(torch.ones(p, p, dtype=torch.bool).tril(), value.dtype)
    scores = q_prompt.view(g * j, -1, k_prompt.shape[2]) @ k_prompt.mT
    weights = scores.view(g * h, p, p).add_(causal).softmax(-1).view(scores.shape)
    prompts = weights @ v_prompt

    seen, own = _added_masks(packed, value.dtype)
    to_prompt, to_self = q.view(g * j, -1, k.shape[2]) @ k_prompt.mT, q.view(b * j, -1, k.shape[2]) @ k.mT
    if seen is not None:
        to_prompt.view(g, -1, p).add_(seen)
    to_self.view(b * h, r, r).add_(own)
    weights = torch.cat([to_prompt.view(b * h, r, p), to_self.view(b * h, r, r)], 2).softmax(-1)
    on_prompt, on_self = weights.split([p, r], 2)
    out = on_prompt.reshape(to_prompt.shape) @ v_prompt
    out = torch.baddbmm(out.view(b * j, -1, v.shape[2]), on_self.reshape(to_self.shape), v)
    rows = torch.cat([prompts.flatten(0, 1), out.flatten(0, 1)])
    return queries.pack(rows).view(1, -1, h, v.shape[2])


def _added_masks(packed: PackedGroups, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Of prompts [G, 1, P], None where all are of one length, and of responses among themselves [R, R]."""
    g, p, b, _ = packed.sizes
    seen, own = packed.response_mask[:: b // g, 0, :1, :p], packed.response_mask[0, 0, :, p:]
    if own.dtype == torch.bool:
        return None if bool(seen.all()) else _added(seen, dtype), _added(own, dtype)
    return None if not bool(seen.any()) else seen.to(dtype), own.to(dtype)


def _implementation(name: str, module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A model's eager attention stands in its own file, the others in one table."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    files = (vars(sys.modules[kind.__module__]) for kind in type(module).__mro__ if kind.__module__ in sys.modules)
    return next(file["eager_attention_forward"] for file in files if "eager_attention_forward" in file)


for _name in ATTENTIONS:
    AttentionInterface.register(PREFIX + _name, partial(_attention, _name))
    AttentionMaskInterface.register(PREFIX + _name, AttentionMaskInterface()[_name])
