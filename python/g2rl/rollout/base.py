"""What training and evaluation ask of a sampling engine."""

from __future__ import annotations

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase as Tokenizer

from g2rl.config import ConfigError, RolloutConfig
from g2rl.rollout.draws import response_seeds
from g2rl.types import Episode, Problem

VERSIONS = ((0, 32), (0, 34))
"""First version of vLLM that is served, and the first that is not."""


def check_version(key: str, found: str) -> None:
    """Raise `ConfigError` for a version of vLLM whose hand-over of weights is not known here."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not VERSIONS[0] <= numbers < VERSIONS[1]:
        first, last = (".".join(map(str, version)) for version in VERSIONS)
        raise ConfigError(f"{key}: expected vLLM {first} or newer, below {last}, found {found}")


def is_checked(name: str) -> bool:
    """Whether a weight is compared after each hand-over.

    vLLM holds embeddings and norms as the trainer does; it fuses, splits and packs others.
    """
    return "embed" in name or "norm" in name


class Response(NamedTuple):
    """Sampled tokens, a stop token at the end included, and their log-probabilities, None where they were not drawn."""

    tokens: tuple[int, ...]
    logps: tuple[float, ...] | None


class RolloutError(RuntimeError):
    """Rollouts cannot go on: the engine has gone, or has other weights than it was handed."""


def require_finite(rows: Iterable[Iterable[float]]) -> None:
    """Raise `RolloutError` where log-probabilities, or the logits of tokens, by response, are NaN or infinite."""
    if not all(math.isfinite(value) for row in rows for value in row):
        raise RolloutError(
            "rollout: log-probabilities of the model are not finite: its weights, or what it computes in "
            "rollout.dtype, have NaN or infinity"
        )


class Sampling(NamedTuple):
    """How tokens are drawn; a temperature of 0 decodes greedily."""

    temperature: float
    top_p: float


class Context(NamedTuple):
    """How long a prompt and its response may be together in an engine, and the setting of it that says so."""

    setting: str
    tokens: int


class Sampler(ABC):
    """Problems in, episodes out: responses by the policy's weights as of the last `sync`.

    Args:
        model: the policy.
        tokenizer: its chat template renders problems.
        config: of the rollouts; token limit and batch size may be replaced later, and `limit_key`, what messages call
            the limit.
        system_prompt: system message, None for the template's own default.

    Raises:
        ConfigError: nothing names a token that ends responses, or the template takes no system message, leaves out what
            the user asks, or does not know an argument that it is to be given.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer, config: RolloutConfig, system_prompt: str | None = None
    ) -> None:
        self.policy = model
        self.tokenizer = tokenizer
        self.config = config
        self.limit_key = "rollout.max_new_tokens"
        stop = model.generation_config.eos_token_id if model.generation_config else None
        stop = tokenizer.eos_token_id if stop is None else stop
        if stop is None:
            raise ConfigError(
                "model.path: expected a token that ends responses, named by the model's generation configuration or "
                "its tokenizer (eos_token), found none"
            )
        self.stop_ids = frozenset(stop if isinstance(stop, list) else [stop])
        self._positions = _learned_positions(model)
        self._meant_for = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self._context: Context | None = None
        self._check_template_arguments()
        self.set_system_prompt(system_prompt, "task.system_prompt")

    def set_system_prompt(self, text: str | None, key: str) -> None:
        """Ask with this system message from now on; raises `ConfigError` that names `key`, see the class."""
        self.system_prompt = text
        if self.tokenizer.chat_template is not None:
            self._check_template(key)

    def _check_template_arguments(self) -> None:
        template = self.tokenizer.chat_template
        words = set(re.findall(r"\w+", str(template or ""))) - {"messages", "add_generation_prompt"}
        for name in self.config.chat_template_kwargs:
            if name not in words:  # the template would not say so
                found = f"{name!r}, which it does not know" if template else "a tokenizer without a chat template"
                expected = "arguments of the model's chat template"
                raise ConfigError(f"rollout.chat_template_kwargs: expected {expected}, found {found}")

    def _check_template(self, of_system: str) -> None:
        system = self.system_prompt is not None
        try:
            asks = self._in_template("1") != self._in_template("2")
        except TemplateError as error:
            key, takes = (of_system, "a system message") if system else ("model.path", "a user's message")
            raise ConfigError(
                f"{key}: expected a chat template that takes {takes}, found one that says: {error}"
                + ("; null leaves the message out" if system else "")
            ) from error
        if not asks:  # such as one for messages of several parts, images among them
            raise ConfigError("model.path: expected a chat template that asks a user's message, found one without it")

    @abstractmethod
    def sync(self) -> None:
        """Take the policy's present weights."""

    def sleep(self) -> None:  # noqa: B027  # some engines can, and only some leave something
        """Give memory back until the next `sync`, where the engine can."""

    def close(self) -> None:  # noqa: B027
        """The last call: remove what was left outside of this process."""

    @abstractmethod
    def respond(self, prompts: Sequence[tuple[int, ...]], sampling: Sampling, seeds: Sequence[int]) -> list[Response]:
        """A response to each prompt, in order; each draws from a stream of its own, by its seed."""

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """The rendered prompt; problems go in as they are when the tokenizer has no chat template."""
        if self.tokenizer.chat_template is None:
            text = problem.prompt if self.system_prompt is None else f"{self.system_prompt}\n\n{problem.prompt}"
            return tuple(self.tokenizer(text)["input_ids"])
        return tuple(self.tokenizer(self._in_template(problem.prompt), add_special_tokens=False)["input_ids"])

    def _in_template(self, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        arguments = {**self.config.chat_template_kwargs, "add_generation_prompt": True, "tokenize": False}
        return str(self.tokenizer.apply_chat_template(messages, **arguments))

    def sample(
        self, problems: Sequence[Problem], copies: int, temperature: float, top_p: float, seed: int | Sequence[int]
    ) -> list[Episode]:
        """`copies` responses to each problem, those of one problem side by side.

        Args:
            temperature: 0 decodes greedily.
            top_p: probability mass kept, in (0, 1].
            seed: of this call's draws, or one for each response, in order; equal seeds, weights and arguments give
                equal responses.

        Raises:
            ConfigError: a prompt and its response may be longer than the model has positions, or the engine's context.
            RolloutError: the model computes NaN or infinity.
        """
        rendered = {problem.id: self.prompt_ids(problem) for problem in problems}
        longest = max(rendered, key=lambda problem: len(rendered[problem]), default="")
        self._check_length(len(rendered.get(longest, ())), longest)
        asked = [problem for problem in problems for _ in range(copies)]
        prompts = [rendered[problem.id] for problem in asked]
        seeds = response_seeds(seed, len(asked)) if isinstance(seed, int) else seed
        responses = self.respond(prompts, Sampling(temperature, top_p), seeds)
        require_finite(response.logps or () for response in responses)
        texts = self.tokenizer.batch_decode([list(r.tokens) for r in responses], skip_special_tokens=True)
        return [
            Episode(problem, prompt, r.tokens, text, bool(r.tokens) and r.tokens[-1] in self.stop_ids, r.logps)
            for problem, prompt, r, text in zip(asked, prompts, responses, texts, strict=True)
        ]

    def _check_length(self, prompt: int, problem: str) -> None:
        limit, tokens, context = self._positions, self.config.max_new_tokens, self._context
        of_problem = f"; the prompt is that of problem {problem!r}"
        if context is not None and prompt + tokens > context.tokens:  # vLLM would cut the response, and not say so
            raise ConfigError(
                f"{self.limit_key}: expected prompt and response to fit vLLM's context of {context.tokens} "
                f"tokens, found a prompt of {prompt} tokens and {tokens}; {context.setting} sets the context"
                f"{of_problem}"
            )
        if limit is not None and prompt + tokens - 1 > limit:  # nothing follows the last one
            raise ConfigError(
                f"{self.limit_key}: expected prompt and response to fit the {limit} positions that the model has "
                f"learned, found a prompt of {prompt} tokens and {tokens}{of_problem}"
            )
        if prompt + tokens - 1 > self._meant_for:  # rotary positions have no end, but the model knows none further on
            warnings.warn(
                f"g2rl: a prompt of {prompt} tokens and {self.limit_key} = {tokens} are more than the "
                f"{self._meant_for} tokens that the model is made for (max_position_embeddings of its configuration)",
                RuntimeWarning,
                3,
            )
            self._meant_for = math.inf  # told once


def _learned_positions(model: Any) -> int | None:
    """Length of the table that a model looks positions up in; None where it computes them."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tables = [
        p for name, p in model.named_parameters() if re.search(r"(pos|wpe)[a-z_]*\.weight$", name) and p.dim() == 2
    ]
    return limit if limit and any(table.shape[0] >= limit for table in tables) else None
