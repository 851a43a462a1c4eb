"""The backbone's pass over a batch of whole groups: with a prompt for each response, or one for each group."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from g2rl.config import ConfigError, ModelConfig
from g2rl.shared_prompts import ATTENTIONS, PREFIX, PackedGroups, pack_groups
from g2rl.types import Batch
from g2rl_kernels import unpad


class ResponseStates(NamedTuple):
    """What the head needs of a batch's responses, one after the other.

    Attributes:
        hidden: [N, d], states that predict the response tokens.
        targets: [N] int64, those tokens.
        cu_seqlens: [B + 1] int32.
    """

    hidden: Tensor
    targets: Tensor
    cu_seqlens: Tensor


class ForwardPass:
    """Hidden states of responses, from a model that is trained.

    Two ways give the same states and gradients to rounding. *Repeated*: prompts and responses in a padded batch, each
    response with its own copy of its prompt; any model can. *Shared*: every prompt once for its group (see
    `g2rl.shared_prompts`); the model's attention must come through transformers' attention interface, as `sdpa` or
    `eager`, and see all that lies before a token.

    `prefix_sharing=auto` shares where the model can and a batch gets cheaper. A pass costs one multiplication for each
    token and weight of the backbone, and 2 h k for each pair of tokens that h heads of width k score in a layer:

    - repeated: B L tokens and B L^2 pairs, L the longest prompt with its response;
    - shared: all prompts' tokens, once a group, and all responses', without padding; G P^2 + B R (P + R) pairs, P and R
      the longest prompt and response.

    (Last tokens of responses predict nothing and are left out of both.) With prompts of one length the second is never
    more, whatever P, R and m: responses do not see each other, so that long ones do not cost (P + m R)^2. Pairs can be
    up to twice as many where the longest prompt has short responses and a short prompt the longest one, hence the
    count.

    What a configuration says of a model may not be all. Both ways are compared once, on a small batch of random tokens
    in the model's own dtype, without autocast. What rounding explains is measured: by how much states move in the
    repeated pass when its embeddings do by one unit in their last place, which is two roundings, and changes all that
    follow. Another order of sums changes some of them, so that `ROUNDINGS` = 2 such distances are a bound with room.

    Args:
        model: a causal language model of transformers, all on one device. Sharing renames its attention implementation;
            whatever else calls it gets the same results as before.
        config: `prefix_sharing` and `autocast` count here.

    Raises:
        ConfigError: `prefix_sharing=always` with a model that cannot.
    """

    ROUNDINGS = 2

    def __init__(self, model: Any, config: ModelConfig) -> None:
        self._in_bf16 = config.autocast == "bfloat16"
        self._always = config.prefix_sharing == "always"
        self._config = model.config.get_text_config()
        self._window = _window(self._config)
        self.obstacle = "model.prefix_sharing is never"
        """Why prompts are repeated; empty where they are shared."""
        if config.prefix_sharing == "never":
            return
        self.obstacle = _obstacle(model, self._config) or self._difference(model)
        if self.obstacle and self._always:
            raise ConfigError(f"model.prefix_sharing: expected auto or never, found always, but {self.obstacle}")
        if self.obstacle:
            _say_repeated(self.obstacle)
        self._weights = backbone_weights(model)

    def __call__(self, model: Any, batch: Batch) -> ResponseStates:
        """States of a batch by `model`: the one given at first, or one of the same architecture."""
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self._in_bf16):
            packed = None if self.obstacle else self._packed(model, batch)
            states = _repeated(model, batch) if packed is None else _shared(model, packed)
        return states._replace(hidden=states.hidden.to(torch.bfloat16 if self._in_bf16 else model.dtype))

    @property
    def prompts(self) -> str:
        """How prompts are computed, in words for the run's facts."""
        if self.obstacle:
            return f"once for each response ({self.obstacle})"
        return "once for each group" if self._always else "once for each group, where that is cheaper"

    def _packed(self, model: Any, batch: Batch) -> PackedGroups | None:
        """The batch with shared prompts, None where that must not or need not be."""
        longest = int(batch.attention_mask.sum(1).max())
        if self._window is not None and longest > self._window:
            _say_repeated(f"a sequence of {longest} tokens is longer than the sliding window of {self._window}")
            return None
        packed = pack_groups(batch, _additive(model))
        rows, length = batch.input_ids[:, :-1].shape
        cheaper = self._cost(packed.input_ids.numel(), packed.pairs) < self._cost(rows * length, rows * length**2)
        return packed if self._always or cheaper else None

    def _cost(self, tokens: int, pairs: int) -> int:
        config = self._config
        width = config.num_attention_heads * head_width(config)
        return tokens * self._weights + pairs * 2 * width * config.num_hidden_layers

    def _difference(self, model: Any) -> str:
        """What is wrong where both ways differ by more than rounding explains; else empty, and `model` set to share."""
        name = model.config._attn_implementation
        if not name.startswith(PREFIX):
            model.set_attn_implementation(PREFIX + name)
        batch = _probe(self._config.vocab_size, model.device)
        with torch.no_grad(), _evaluating(model):
            repeated = _repeated(model, batch).hidden.double()
            with _rounded_otherwise(model):
                rounding = _distance(_repeated(model, batch).hidden, repeated)
            try:
                found = _distance(_shared(model, pack_groups(batch, _additive(model))).hidden, repeated)
            except (TypeError, ValueError, RuntimeError, StopIteration) as error:
                found, why = float("nan"), f"its attention does not take shared prompts ({error})"
            else:
                why = (
                    f"hidden states with shared prompts differ by {found:.1e}, where rounding explains "
                    f"{self.ROUNDINGS * rounding:.1e}"
                )
        if found <= self.ROUNDINGS * rounding:
            return ""
        model.set_attn_implementation(name)
        return why


def backbone_weights(model: Any) -> int:
    """Numbers of weights that multiply each token on its way to the head."""
    return sum(p.numel() for p in model.base_model.parameters()) - model.get_input_embeddings().weight.numel()


def head_width(config: Any) -> int:
    """k of the attention heads of a text model's configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _repeated(model: Any, batch: Batch) -> ResponseStates:
    """By a padded batch. A response's last token predicts nothing, and is left out."""
    mask = batch.attention_mask[:, :-1]
    output = model.base_model(
        input_ids=batch.input_ids[:, :-1], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    )
    predicts = batch.response_mask[:, 1:]
    hidden, cu_seqlens = unpad(output.last_hidden_state, predicts)
    return ResponseStates(hidden, batch.input_ids[:, 1:][predicts], cu_seqlens)


def _shared(model: Any, packed: PackedGroups) -> ResponseStates:
    # A mask of four dimensions keeps transformers from making one of its own, [T, T]; the attention has its masks.
    output = model.base_model(
        input_ids=packed.input_ids,
        attention_mask=packed.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
        position_ids=packed.positions,
        packed_groups=packed,
    )
    return ResponseStates(output.last_hidden_state[0][packed.predicts], packed.targets, packed.cu_seqlens)


def _additive(model: Any) -> torch.dtype | None:
    return model.dtype if model.config._attn_implementation.endswith("eager") else None


def _obstacle(model: Any, config: Any) -> str:
    """What a model's configuration says against sharing; empty if nothing."""
    attention = model.config._attn_implementation.removeprefix(PREFIX)
    if attention not in ATTENTIONS:
        return f"attention {attention} takes no mask for it; model.attention=sdpa does"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{config.model_type} has layers of type {', '.join(sorted(kinds))}"
    if getattr(config, "alibi", False) or not model._can_set_attn_implementation():
        return f"{config.model_type} has an attention of its own"
    return ""


def _window(config: Any) -> int | None:
    """Tokens that some layer sees at most; None where all see everything."""
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None


def _say_repeated(why: str) -> None:
    warnings.warn(f"g2rl: each response is computed with its own copy of the prompt: {why}", RuntimeWarning, 3)


# ---- the comparison --------------------------------------------------------------------------------------------------


def _probe(vocabulary: int, device: torch.device) -> Batch:
    """Two groups of random tokens: prompts of two lengths, responses with none, one and several tokens."""
    lengths = ((7, (5, 1, 3)), (4, (0, 4, 6)))
    generator = torch.Generator().manual_seed(0)
    longest = max(prompt + max(responses) for prompt, responses in lengths)
    ids = torch.zeros(sum(len(responses) for _, responses in lengths), longest, dtype=torch.int64)
    attended, answered = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    row = 0
    for prompt, responses in lengths:
        question = torch.randint(vocabulary, (prompt,), generator=generator)
        for response in responses:
            start = longest - prompt - response
            ids[row, start:] = torch.cat([question, torch.randint(vocabulary, (response,), generator=generator)])
            attended[row, start:] = 1
            answered[row, start + prompt :] = True
            row += 1
    return Batch(ids.to(device), attended.to(device), answered.to(device), torch.zeros(row, device=device), 3)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest relative error of a token's state."""
    return float(((found.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout, which would be another one each time."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _rounded_otherwise(model: Any) -> Iterator[None]:
    """Embeddings moved by one unit in their last place, up or down at random."""
    generator = torch.Generator().manual_seed(0)

    def move(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        signs = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
        return output * (1 + torch.finfo(output.dtype).eps * signs)

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()
