"""Decode with a model of transformers: token by token by ourselves, or by `generate` where a model needs that."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import InitVar, dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from g2rl.probes import ROUNDINGS, distances, evaluating, rounded_otherwise
from g2rl.rollout.base import Response, Sampling, require_finite
from g2rl.rollout.batches import left_pad, right_pad
from g2rl.rollout.draws import Draws, draw, uniforms
from g2rl.rollout.slots import ATTENTION, Slots, fits_slots

# Prompts are computed for an eighth of the slots at least: each time the weights are read once more.
_REFILL = 8
# Tokens of the prompts, and of the responses to them, by which a model is tried.
_TRIED_PROMPTS, _TRIED_TOKENS = (5, 2), 3


@dataclass(eq=False)
class Decoding:
    """Responses to prompts, a slot each: a finished response leaves its slot to the next prompt.

    No response waits for a longer one, nor is it computed beyond its end; a prompt is computed once for all its
    responses that start together.

    Args:
        model: whose cache can have slots (`fits_slots`), in evaluation mode.
        prompts, seeds: of each response.
        sampling: how tokens are drawn.
        count: responses at once.
        max_new_tokens: of a response.
        stop_ids: tokens that end one.
    """

    model: Any
    prompts: Sequence[tuple[int, ...]]
    seeds: Sequence[int]
    sampling: Sampling
    count: InitVar[int]
    max_new_tokens: int
    stop_ids: frozenset[int]

    def __post_init__(self, count: int) -> None:
        limit = max(map(len, self.prompts)) + self.max_new_tokens
        self.slots = Slots(self.model.config, min(count, len(self.prompts)), limit, self.model.device)
        self.started = 0
        self.active: list[int] = []
        """The response in each slot in use."""
        self.tokens: list[list[int]] = [[] for _ in self.prompts]
        self.logps: list[list[float]] = [[] for _ in self.prompts]
        """Of the tokens; at a temperature of 0 their logits."""
        self.streams: dict[int, list[float]] = {}

    def run(self) -> list[Response]:
        with torch.inference_mode(), _attention(self.model):
            while self.active or self.started < len(self.prompts):
                self._refill()
                self._step()
                self._leave()
        return _responses([tuple(tokens) for tokens in self.tokens], self.logps, self.sampling)

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
            body = self.model.base_model
            body(input_ids=input_ids, position_ids=positions, use_cache=True, **{_cache_name(body): cache})
        return cache

    def _step(self) -> None:
        """One more token of every response."""
        device, slots = self.model.device, self.slots
        last = [(self.tokens[i] or self.prompts[i])[-1] for i in self.active]
        logits = self.model(
            input_ids=torch.tensor(last, device=device)[:, None],
            attention_mask=slots.mask(),
            position_ids=slots.lengths[:, None],
            use_cache=True,
            **{_cache_name(self.model): slots.cache},
        ).logits[:, -1]
        slots.grow()
        if self.sampling.temperature == 0:
            logps, tokens = (values.tolist() for values in logits.max(-1))
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


def _cache_name(model: Any) -> str:
    """What a model calls the cache that it is given: transformers 5.24 warns of the name that those before it know."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    """The model with the attention that slots need; it may be the policy itself."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def has_slots(model: Any) -> bool:
    """Whether `Decoding` serves a model, by its configuration, and by a few tokens, of which a warning tells."""
    if not fits_slots(model):
        return False
    why = _difference(model)
    if why:
        warnings.warn(f"g2rl: responses are sampled by transformers' generate: {why}", RuntimeWarning, 3)
    return not why


def _difference(model: Any) -> str:
    """What is wrong where tokens have other logits by slots than by one pass over all; empty if nothing."""
    generator, vocabulary = torch.Generator().manual_seed(0), model.config.get_text_config().vocab_size
    prompts = [tuple(torch.randint(vocabulary, (n,), generator=generator).tolist()) for n in _TRIED_PROMPTS]
    with evaluating(model):
        try:
            drawn, found = _by_slots(model, prompts)
        except Exception as error:  # whatever it is, `generate` may not have it
            return f"slots of a cache do not fit {model.config.model_type} ({type(error).__name__}: {error})"
        rows = [prompt + response.tokens for prompt, response in zip(prompts, drawn, strict=True)]
        expected = _by_one_pass(model, rows)
        with rounded_otherwise(model):
            bound = ROUNDINGS * float(distances(_by_one_pass(model, rows), expected).max())
    # Of most tokens of each response: a router may send one elsewhere for a rounding.
    gap = float(distances(found, expected).view(_TRIED_TOKENS, -1).median(0).values.max())
    if gap <= bound:
        return ""
    return f"logits by slots of a cache differ by {gap:.1e}, where rounding explains {bound:.1e}"


def _by_slots(model: Any, prompts: Sequence[tuple[int, ...]]) -> tuple[list[Response], torch.Tensor]:
    """Responses, and logits [steps * responses, V] of their tokens."""
    steps: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda _, __, output: steps.append(output.logits[:, -1]))
    try:
        seeds = range(len(prompts))
        drawn = Decoding(model, prompts, seeds, Sampling(1.0, 1.0), len(prompts), _TRIED_TOKENS, frozenset()).run()
    finally:
        handle.remove()
    return drawn, torch.cat(steps)


@torch.inference_mode()
def _by_one_pass(model: Any, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """The same of rows with their prompts, padded on the right."""
    input_ids, lengths = right_pad(rows, 0).to(model.device), torch.tensor([len(row) for row in rows])
    held = torch.arange(input_ids.shape[1]) < lengths[:, None]
    logits = model(input_ids=input_ids, attention_mask=held.to(input_ids), use_cache=False).logits
    places = [lengths - 1 - left for left in range(_TRIED_TOKENS, 0, -1)]
    return torch.cat([logits[torch.arange(len(rows)), place] for place in places])


def generate(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> list[Response]:
    """Responses by transformers' `generate`, as one batch that lasts as long as its longest."""
    input_ids, attention_mask = left_pad(prompts, 0)
    draws = Draws(uniforms(seeds, max_new_tokens), *sampling)
    with torch.inference_mode(), plain_generation(model, stop_ids):
        output = model.generate(
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([draws]),
        )
    rows = [until_stop(row, stop_ids) for row in output[:, input_ids.shape[1] :].tolist()]
    return _responses(rows, torch.stack(draws.logps, 1).tolist(), sampling)


def _responses(rows: Sequence[tuple[int, ...]], logps: Sequence[list[float]], sampling: Sampling) -> list[Response]:
    """Of tokens, and their log-probabilities or greatest logits, which tell whether the model computes at all."""
    known = [values[: len(tokens)] for tokens, values in zip(rows, logps, strict=True)]
    if sampling.temperature > 0:
        return [Response(tokens, tuple(values)) for tokens, values in zip(rows, known, strict=True)]
    require_finite(known)
    return [Response(tokens, None) for tokens in rows]


@contextmanager
def plain_generation(model: Any, stop_ids: frozenset[int]) -> Iterator[None]:
    """The model, which may be the policy itself, without its own generation defaults: top-k and penalties would change
    what is sampled from. `generate` fills up from them whatever a configuration that it is given leaves open."""
    before = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=sorted(stop_ids), pad_token_id=0, do_sample=False, use_cache=True
    )
    try:
        yield
    finally:
        model.generation_config = before


def until_stop(tokens: list[int], stop_ids: frozenset[int]) -> tuple[int, ...]:
    """The response up to and with its first stop token; what follows is padding."""
    for position, token in enumerate(tokens):
        if token in stop_ids:
            return tuple(tokens[: position + 1])
    return tuple(tokens)
