"""Sample responses: problems in, episodes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from g2rl.adapters import copy_weights, has_adapter, plain_copy
from g2rl.config import RolloutConfig
from g2rl.heads import keep_head_inputs_contiguous
from g2rl.types import Batch, Episode, Problem


class InverseCDFSampler(LogitsProcessor):
    """Draw the next token and leave only it: greedy decoding then takes the sample.

    One uniform number a response against the cumulated probabilities. On a CPU, `torch.multinomial` over a vocabulary
    costs as much as a small model's decoding step; this costs a tenth of it. The draws come from `generator` alone, or
    each row's from its own, so that they do not depend on the rows beside it.
    """

    def __init__(self, generator: torch.Generator | Sequence[torch.Generator]) -> None:
        self.generator = generator
        self.logps: list[torch.Tensor] = []
        """[B] log-probabilities of the drawn tokens, one tensor a call."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        p = scores.float().softmax(-1)
        cdf = p.cumsum(-1)
        u = self._uniforms(scores.shape[0]).to(scores.device)
        # The first token whose cumulated probability exceeds u * total has a probability above 0.
        token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_(max=scores.shape[1] - 1)
        self.logps.append(p.gather(1, token).squeeze(1).log())
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def _uniforms(self, rows: int) -> torch.Tensor:
        if isinstance(self.generator, torch.Generator):
            return torch.rand(rows, 1, generator=self.generator)
        return torch.cat([torch.rand(1, 1, generator=generator) for generator in self.generator])


class Sampler:
    """Generates with a copy of the policy's weights in the rollout dtype, a LoRA adapter merged into them.

    Args:
        model: the policy; `sync` copies its weights.
        tokenizer: pads on the left; its chat template renders problems.
        config: token limit, batch size, and dtype.
        system_prompt: system message, None for the template's own default.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, config: RolloutConfig, system_prompt: str | None = None
    ) -> None:
        self.policy = model
        self.tokenizer = tokenizer
        self.config = config
        self.system_prompt = system_prompt
        dtype = getattr(torch, config.dtype)
        same = model.dtype == dtype and not has_adapter(model)
        self.model: Any = model if same else plain_copy(model).to(dtype)
        keep_head_inputs_contiguous(self.model)
        stop = model.generation_config.eos_token_id if model.generation_config else None
        stop = tokenizer.eos_token_id if stop is None else stop
        self.stop_ids = frozenset(stop if isinstance(stop, list) else [stop])
        # The model's own generation defaults (top-k, penalties) would change the policy that is sampled from.
        self.model.generation_config = GenerationConfig(
            eos_token_id=sorted(self.stop_ids), pad_token_id=tokenizer.pad_token_id, do_sample=False, use_cache=True
        )

    def sync(self) -> None:
        """Copy the policy's weights."""
        if self.model is not self.policy:
            copy_weights(self.policy, self.model)

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """The rendered prompt; problems go in as they are when the tokenizer has no chat template."""
        if self.tokenizer.chat_template is None:
            text = problem.prompt if self.system_prompt is None else f"{self.system_prompt}\n\n{problem.prompt}"
            return tuple(self.tokenizer(text)["input_ids"])
        messages = [{"role": "user", "content": problem.prompt}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        text = str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def sample(
        self, problems: Sequence[Problem], copies: int, temperature: float, top_p: float, seed: int | Sequence[int]
    ) -> list[Episode]:
        """`copies` responses to each problem, those of one problem side by side.

        Args:
            temperature: 0 decodes greedily.
            top_p: probability mass kept, in (0, 1].
            seed: of this call's draws, or one for each response, in order; equal seeds, weights and arguments give
                equal responses.
        """
        seeds = [seed] if isinstance(seed, int) else seed
        generators = [torch.Generator().manual_seed(number) for number in seeds]
        prompts = {problem.id: self.prompt_ids(problem) for problem in problems}
        asked = [problem for problem in problems for _ in range(copies)]
        episodes = []
        for start in range(0, len(asked), self.config.batch_size):
            one_each = generators[start : start + self.config.batch_size]
            generator = generators[0] if isinstance(seed, int) else one_each
            chunk = asked[start : start + self.config.batch_size]
            ids = [prompts[problem.id] for problem in chunk]
            responses, logps = self._generate(ids, temperature, top_p, generator)
            texts = self.tokenizer.batch_decode([list(r) for r in responses], skip_special_tokens=True)
            for row in zip(chunk, ids, responses, texts, logps, strict=True):
                problem, prompt, response, text, known = row
                finished = bool(response) and response[-1] in self.stop_ids
                drawn = None if known is None else tuple(known[: len(response)])
                episodes.append(Episode(problem, prompt, response, text, finished, drawn))
        return episodes

    def _generate(
        self,
        prompts: list[tuple[int, ...]],
        temperature: float,
        top_p: float,
        generator: torch.Generator | Sequence[torch.Generator],
    ) -> tuple[list[tuple[int, ...]], Sequence[list[float] | None]]:
        """Responses, and their tokens' log-probabilities, None when decoding greedily."""
        input_ids, attention_mask = left_pad(prompts, self.tokenizer.pad_token_id)
        processors = LogitsProcessorList()
        draw = InverseCDFSampler(generator)
        if temperature > 0:
            if temperature != 1:
                processors.append(TemperatureLogitsWarper(temperature))
            if top_p < 1:
                processors.append(TopPLogitsWarper(top_p))
            processors.append(draw)
        training = self.model.training
        self.model.eval()
        with torch.inference_mode():
            output = self.model.generate(
                input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
                max_new_tokens=self.config.max_new_tokens,
                logits_processor=processors,
                past_key_values=self._prefilled(prompts),
            )
        self.model.train(training)
        responses = [self._until_stop(row) for row in output[:, input_ids.shape[1] :].tolist()]
        return responses, torch.stack(draw.logps, 1).tolist() if draw.logps else [None] * len(responses)

    def _prefilled(self, prompts: list[tuple[int, ...]]) -> DynamicCache | None:
        """Keys and values of the prompts but for their last tokens, each prompt computed once for its copies.

        None where no two are the same, and for models with other layers than full attention.
        """
        distinct = list(dict.fromkeys(prompts))
        cache = DynamicCache(config=self.model.config)
        if len(distinct) == len(prompts) or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return None
        input_ids, attention_mask = (
            x[:, :-1].to(self.model.device) for x in left_pad(distinct, self.tokenizer.pad_token_id)
        )
        if input_ids.shape[1] == 0:
            return None
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        copies = [distinct.index(prompt) for prompt in prompts]
        cache.batch_select_indices(torch.tensor(copies, device=self.model.device))
        return cache

    def _until_stop(self, tokens: list[int]) -> tuple[int, ...]:
        """The response up to and with its first stop token; what follows is padding."""
        for position, token in enumerate(tokens):
            if token in self.stop_ids:
                return tuple(tokens[: position + 1])
        return tuple(tokens)


def left_pad(rows: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, L] and attention mask [B, L], both int64, rows aligned at their ends."""
    length = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), length), value)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, length - len(row) :] = torch.tensor(row, dtype=torch.int64)
        attention_mask[i, length - len(row) :] = 1
    return input_ids, attention_mask


def make_batch(
    episodes: Sequence[Episode], rewards: Sequence[float], group_size: int, pad_id: int, device: torch.device
) -> Batch:
    """Whole groups of episodes as the tensors of one forward pass."""
    rows = [episode.prompt_ids + episode.response_ids for episode in episodes]
    input_ids, attention_mask = left_pad(rows, pad_id)
    positions = torch.arange(input_ids.shape[1])
    lengths = torch.tensor([len(episode.response_ids) for episode in episodes])
    response_mask = positions >= input_ids.shape[1] - lengths[:, None]
    return Batch(
        input_ids.to(device),
        attention_mask.to(device),
        response_mask.to(device),
        torch.tensor(rewards, dtype=torch.float32, device=device),
        group_size,
    )
