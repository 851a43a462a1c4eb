"""Decode with a model of transformers: token by token by ourselves, or by `generate` where a model needs that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, LogitsProcessorList

from g2rl.rollout.base import Response, Sampling
from g2rl.rollout.batches import left_pad, right_pad
from g2rl.rollout.draws import Draws, draw, uniforms
from g2rl.rollout.slots import ATTENTION, Slots

# Prompts are computed for an eighth of the slots at least: each time the weights are read once more.
_REFILL = 8


class Decoding:
    """Responses to prompts, a slot each: a finished response leaves its slot to the next prompt.

    No response waits for a longer one, nor is it computed beyond its end; a prompt is computed once for all its
    responses that start together.

    Args:
        model: whose cache can have slots (`fits_slots`), in evaluation mode.
        prompts, seeds: of each response.
        sampling: how tokens are drawn.
        slots: responses at once.
        max_new_tokens: of a response.
        stop_ids: tokens that end one.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[tuple[int, ...]],
        seeds: Sequence[int],
        sampling: Sampling,
        slots: int,
        max_new_tokens: int,
        stop_ids: frozenset[int],
    ) -> None:
        self.model = model
        self.prompts = prompts
        self.seeds = seeds
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.stop_ids = stop_ids
        limit = max(map(len, prompts)) + max_new_tokens
        self.slots = Slots(model.config, min(slots, len(prompts)), limit, model.device)
        self.started = 0
        self.active: list[int] = []
        """The response in each slot in use."""
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.logps: list[list[float]] = [[] for _ in prompts]
        self.streams: dict[int, list[float]] = {}

    def run(self) -> list[Response]:
        with torch.inference_mode(), _attention(self.model):
            while self.active or self.started < len(self.prompts):
                self._refill()
                self._step()
                self._leave()
        drawn = self.sampling.temperature > 0
        rows = zip(self.tokens, self.logps, strict=True)
        return [Response(tuple(tokens), tuple(logps) if drawn else None) for tokens, logps in rows]

    def _refill(self) -> None:
        free, waiting = self.slots.count - len(self.active), len(self.prompts) - self.started
        if not waiting or free < min(waiting, max(1, self.slots.count // _REFILL)):
            return
        new = range(self.started, self.started + min(free, waiting))
        prompts = [self.prompts[i] for i in new]
        distinct = list(dict.fromkeys(prompts))
        sources = [distinct.index(prompt) for prompt in prompts]
        self.slots.admit(self._prefilled(distinct), sources, [len(prompt) - 1 for prompt in prompts])
        if self.sampling.temperature > 0:
            streams = uniforms([self.seeds[i] for i in new], self.max_new_tokens).tolist()
            self.streams |= dict(zip(new, streams, strict=True))
        self.active += new
        self.started = new.stop

    def _prefilled(self, prompts: Sequence[tuple[int, ...]]) -> DynamicCache:
        """Keys and values of prompts but for their last tokens, padded on the right."""
        cache = DynamicCache(config=self.model.config)
        input_ids = right_pad([prompt[:-1] for prompt in prompts], 0).to(self.model.device)
        if input_ids.shape[1]:
            positions = torch.arange(input_ids.shape[1], device=self.model.device).expand_as(input_ids)
            self.model.base_model(input_ids=input_ids, position_ids=positions, past_key_values=cache, use_cache=True)
        return cache

    def _step(self) -> None:
        """One more token of every response."""
        device, slots = self.model.device, self.slots
        last = [(self.tokens[i] or self.prompts[i])[-1] for i in self.active]
        logits = self.model(
            input_ids=torch.tensor(last, device=device)[:, None],
            attention_mask=slots.mask(),
            position_ids=slots.lengths[:, None],
            past_key_values=slots.cache,
            use_cache=True,
        ).logits[:, -1]
        slots.grow()
        if self.sampling.temperature == 0:
            tokens, logps = logits.argmax(-1).tolist(), [0.0] * len(last)
        else:
            u = torch.tensor([self.streams[i][len(self.tokens[i])] for i in self.active], device=device)
            tokens, logps = (values.tolist() for values in draw(logits, u, *self.sampling))
        for i, token, logp in zip(self.active, tokens, logps, strict=True):
            self.tokens[i].append(token)
            self.logps[i].append(logp)

    def _leave(self) -> None:
        finished = [row for row, i in enumerate(self.active) if self._is_finished(self.tokens[i])]
        if not finished:
            return
        for row in finished:
            self.streams.pop(self.active[row], None)
        for source, target in self.slots.leave(finished):
            self.active[target] = self.active[source]
        del self.active[len(self.active) - len(finished) :]

    def _is_finished(self, tokens: list[int]) -> bool:
        return tokens[-1] in self.stop_ids or len(tokens) == self.max_new_tokens


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    """The model with the attention that slots need; it may be the policy itself."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def generate(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> list[Response]:
    """Responses by transformers' `generate`, as one batch that lasts as long as its longest."""
    input_ids, attention_mask = left_pad(prompts, model.generation_config.pad_token_id)
    draws = Draws(uniforms(seeds, max_new_tokens), *sampling)
    with torch.inference_mode():
        output = model.generate(
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([draws] if sampling.temperature > 0 else []),
        )
    rows = [until_stop(row, stop_ids) for row in output[:, input_ids.shape[1] :].tolist()]
    if not draws.logps:
        return [Response(tokens, None) for tokens in rows]
    logps = torch.stack(draws.logps, 1).tolist()
    return [Response(tokens, tuple(known[: len(tokens)])) for tokens, known in zip(rows, logps, strict=True)]


def until_stop(tokens: list[int], stop_ids: frozenset[int]) -> tuple[int, ...]:
    """The response up to and with its first stop token; what follows is padding."""
    for position, token in enumerate(tokens):
        if token in stop_ids:
            return tuple(tokens[: position + 1])
    return tuple(tokens)
