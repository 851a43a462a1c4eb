"""The backbone's pass over a batch of whole groups: padded, packed, or packed with one copy of each group's prompt."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from g2rl.config import ConfigError, ModelConfig
from g2rl.probes import ROUNDINGS, distances, evaluating, rounded_otherwise
from g2rl.shared_prompts import ATTENTIONS, PREFIX, PackedGroups, pack_groups
from g2rl.types import Batch
from g2rl_kernels import unpad

FLASH = "flash_attention_2"


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

    Three ways give the same states and gradients to rounding. *Padded*: a row for each response, with its own copy of
    its prompt; any model can. *Packed*: the same sequences one after the other in a single row, so that no product is
    spent on padding. *Shared*: packed, with every prompt once for its group. The last two need an attention that is
    called through transformers' attention interface, as `sdpa` or `eager`, and sees all that lies before a token; it is
    that of `g2rl.shared_prompts`, to which a packed response is a group of its own. `flash_attention_2` packs by itself
    (`cu_seq_lens_q`) and shares nothing.

    `model.packing=auto` and `model.prefix_sharing=auto` take the cheapest way that a model can. A pass costs one
    multiplication for each token and weight of the backbone, and 2 h k for each pair of tokens that h heads of width k
    score in a layer:

    - padded: B L tokens and B L^2 pairs, L the longest prompt with its response;
    - packed: the sequences' tokens; B P^2 + B R (P + R) pairs, P and R the longest prompt and response;
    - shared: the same, with prompts counted once a group: G for the first B.

    (Last tokens of responses predict nothing and are left out of all.) With prompts of one length each is no more than
    the one before, whatever P, R and m: responses do not see each other, so that long ones do not cost (P + m R)^2.
    Pairs can be up to twice as many where the longest prompt has short responses and a short prompt the longest one,
    hence the count.

    What a configuration says of a model may not be all. States are compared once, on a small batch of random tokens in
    the model's own dtype, without autocast: shared ones with padded ones, and these with those of a response alone,
    since some models read padding as text, or what follows. What rounding explains is measured: by how much states move
    in the padded pass when its embeddings do (`g2rl.probes`).

    Args:
        model: a causal language model of transformers, all on one device. Packing renames its attention implementation;
            whatever else calls it gets the same results as before.
        config: `packing`, `prefix_sharing` and `autocast` count here.

    Raises:
        ConfigError: `always` with a model that cannot, or one that reads padding as text.
    """

    def __init__(self, model: Any, config: ModelConfig) -> None:
        self._in_bf16 = config.in_bfloat16
        self._config = model.config.get_text_config()
        self._window = _window(self._config)
        self._weights = backbone_weights(model)
        self._width = attention_width(self._config)
        self._flash = _attention(model) == FLASH
        self._wishes = {"prefix_sharing": config.prefix_sharing, "packing": config.packing}
        self.obstacles = {key: f"model.{key} is never" for key, wish in self._wishes.items() if wish == "never"}
        """Why prompts are not shared, and sequences not packed, by key of `model`; without the keys of what is done."""
        self._look_for_obstacles(model)

    def _look_for_obstacles(self, model: Any) -> None:
        whole = _obstacle(model, self._config)
        why = whole or _foreign(model)
        if not self._flash:  # whose kernels know padding, and take no fp32
            with torch.no_grad(), evaluating(model):
                probe = _Probe(model, self._config.vocab_size)
                probe.check_padding(model)
                if not why and len(self.obstacles) < len(self._wishes):
                    why = probe.share(model)
        for key in self._wishes.keys() - self.obstacles.keys():
            found = whole if key == "packing" and self._flash else why
            if found and self._wishes[key] == "always":
                raise ConfigError(f"model.{key}: expected auto or never, found always, but {found}")
            if found:
                self.obstacles[key] = found
        if why and self.obstacles.get("prefix_sharing") == why:
            _say_repeated(why)

    def __call__(self, model: Any, batch: Batch) -> ResponseStates:
        """States of a batch by `model`: the one given at first, or one of the same architecture."""
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self._in_bf16):
            if self._flash and "packing" not in self.obstacles:
                states = _by_cu_seqlens(model, batch)
            else:
                packed = self._packed(model, batch)
                states = _padded(model, batch) if packed is None else _packed(model, packed)
        return states._replace(hidden=states.hidden.to(torch.bfloat16 if self._in_bf16 else model.dtype))

    @property
    def facts(self) -> dict[str, str]:
        """How prompts and padding are dealt with, in words for the run's facts."""
        return {
            "prompts": self._fact("prefix_sharing", "once for each group", "once for each response"),
            "padding": self._fact("packing", "left out", "computed"),
        }

    def _fact(self, key: str, done: str, otherwise: str) -> str:
        if key in self.obstacles:
            return f"{otherwise} ({self.obstacles[key]})"
        return done if self._wishes[key] == "always" or self._flash else f"{done}, where that is cheaper"

    def _packed(self, model: Any, batch: Batch) -> PackedGroups | None:
        """The batch as one row of tokens, None where that must not or need not be."""
        key = next((key for key in self._wishes if key not in self.obstacles), None)
        if key is None:
            return None
        longest = int(batch.attention_mask.sum(1).max())
        if self._window is not None and longest > self._window:
            _say_repeated(f"a sequence of {longest} tokens is longer than the sliding window of {self._window}")
            return None
        # Shared is never more than packed.
        packed = pack_groups(batch if key == "prefix_sharing" else replace(batch, group_size=1), _additive(model))
        rows, length = batch.input_ids[:, :-1].shape
        cheaper = self._cost(packed.input_ids.numel(), packed.pairs) < self._cost(rows * length, rows * length**2)
        return packed if self._wishes[key] == "always" or cheaper else None

    def _cost(self, tokens: int, pairs: int) -> int:
        return tokens * self._weights + pairs * 2 * self._width


def backbone_weights(model: Any) -> int:
    """Numbers of weights that multiply each token on its way to the head."""
    return sum(p.numel() for p in model.base_model.parameters()) - model.get_input_embeddings().weight.numel()


def attention_width(config: Any, heads: str = "num_attention_heads") -> int:
    """h k, summed over the layers of a text model's configuration, which may differ in both.

    Args:
        heads: key of h; that of keys may be left out where they are as many as those of queries.
    """

    def width(layer: Any) -> int:
        queries = getattr(layer, "num_attention_heads", None)
        if not queries:  # a layer without attention
            return 0
        k = getattr(layer, "head_dim", None) or layer.hidden_size // queries
        return k * (getattr(layer, heads, None) or queries)

    return sum(map(width, getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers))


def _padded(model: Any, batch: Batch) -> ResponseStates:
    """A response's last token predicts nothing, and is left out."""
    mask = batch.attention_mask[:, :-1]
    output = model.base_model(
        input_ids=batch.input_ids[:, :-1],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,  # said in each pass, not in the model's configuration, which is saved with its weights
    )
    predicts = batch.response_mask[:, 1:]
    hidden, cu_seqlens = unpad(output.last_hidden_state, predicts)
    return ResponseStates(hidden, batch.input_ids[:, 1:][predicts], cu_seqlens)


def _packed(model: Any, packed: PackedGroups) -> ResponseStates:
    # A mask of four dimensions keeps transformers from making one of its own, [T, T]; the attention has its masks.
    output = model.base_model(
        input_ids=packed.input_ids,
        attention_mask=packed.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
        position_ids=packed.positions,
        packed_groups=packed,
        use_cache=False,
    )
    return ResponseStates(output.last_hidden_state[0][packed.predicts], packed.targets, packed.cu_seqlens)


def _by_cu_seqlens(model: Any, batch: Batch) -> ResponseStates:
    """Sequences in one row, kept apart by an attention that knows where each begins."""
    held, answers = batch.attention_mask[:, :-1].bool(), batch.response_mask[:, 1:]
    input_ids, cu_seqlens = unpad(batch.input_ids[:, :-1], held)
    longest = int(cu_seqlens.diff().max())
    output = model.base_model(
        input_ids=input_ids[None],
        position_ids=(held.cumsum(1) - 1)[held][None],
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=longest,
        max_length_k=longest,
        use_cache=False,
    )
    return ResponseStates(output.last_hidden_state[0][answers[held]], *unpad(batch.input_ids[:, 1:], answers))


def _attention(model: Any) -> str:
    return model.config._attn_implementation.removeprefix(PREFIX)


def _additive(model: Any) -> torch.dtype | None:
    return model.dtype if model.config._attn_implementation.endswith("eager") else None


def _obstacle(model: Any, config: Any) -> str:
    """What a model's configuration says against a row of sequences; empty if nothing."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"{config.model_type} has layers of type {', '.join(sorted(kinds))}"
    if getattr(config, "alibi", False) or not model._can_set_attn_implementation():
        return f"{config.model_type} has an attention of its own"
    return ""


def _foreign(model: Any) -> str:
    """Why the attention of `g2rl.shared_prompts` cannot stand in for the model's; empty if it can."""
    attention = _attention(model)
    return "" if attention in ATTENTIONS else f"attention {attention} takes no mask for it; model.attention=sdpa does"


def _window(config: Any) -> int | None:
    """Tokens that some layer sees at most; None where all see everything."""
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None


def _say_repeated(why: str) -> None:
    warnings.warn(f"g2rl: each response is computed with its own copy of the prompt: {why}", RuntimeWarning, 3)


# ---- the comparison --------------------------------------------------------------------------------------------------


def _random_batch(vocabulary: int, device: torch.device) -> Batch:
    """Two groups of random tokens, padding too: prompts of two lengths, responses with none, one and several tokens."""
    lengths = ((7, (5, 1, 3)), (4, (0, 4, 6)))
    generator = torch.Generator().manual_seed(0)
    longest = max(prompt + max(responses) for prompt, responses in lengths)
    ids = torch.randint(vocabulary, (sum(len(responses) for _, responses in lengths), longest), generator=generator)
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
    return Batch(ids.to(device), attended.to(device), answered.to(device), 3)


class _Probe:
    """A small batch of random tokens, its states by the padded pass, and how far rounding explains others.

    Attributes:
        bound: relative.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        self.batch = _random_batch(vocabulary, model.device)
        self.padded = _padded(model, self.batch)
        with rounded_otherwise(model):
            moved = _padded(model, self.batch).hidden
        self.bound = ROUNDINGS * float(distances(moved, self.padded.hidden).max())

    def check_padding(self, model: Any) -> None:
        """Raise `ConfigError` unless a response has the states that it has alone, and with a token behind it.

        Most of its tokens have: one that a router sends elsewhere for a rounding is none of padding.
        """
        row, prompt, padding = 4, 4, 4
        ids = self.batch.input_ids[row : row + 1, padding:]
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        output = model.base_model(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=False
        )
        first, last = self.padded.cu_seqlens[row : row + 2].tolist()
        alone = output.last_hidden_state[0, prompt - 1 : -1]
        found = float(distances(self.padded.hidden[first:last], alone).median())
        if not found <= self.bound:
            raise ConfigError(
                "model.path: expected a model whose tokens see what is before them, and no padding there, found hidden "
                f"states of {model.config.model_type} that differ by {found:.1e} from those of a response alone, where "
                f"rounding explains {self.bound:.1e}"
            )

    def share(self, model: Any) -> str:
        """What is wrong where prompts that are shared give other states; else empty, and `model` set to share."""
        name = model.config._attn_implementation
        if not name.startswith(PREFIX):
            model.set_attn_implementation(PREFIX + name)
        try:
            shared = _packed(model, pack_groups(self.batch, _additive(model))).hidden
        except (TypeError, ValueError, RuntimeError, StopIteration) as error:
            why = f"its attention does not take shared prompts ({error})"
        else:
            found = float(distances(shared, self.padded.hidden).max())
            if found <= self.bound:
                return ""
            why = f"hidden states with shared prompts differ by {found:.1e}, where rounding explains {self.bound:.1e}"
        model.set_attn_implementation(name)
        return why
