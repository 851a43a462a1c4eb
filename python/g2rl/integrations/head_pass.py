"""A forward pass that ends in log-probabilities, entropy and gradient features instead of logits.

It runs inside the model's own `forward`, so that what wraps the model (DDP, FSDP2, PEFT, autocast, gradient
checkpointing) sees an ordinary call, and the head's weight is whole where a wrapper shards it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from g2rl.heads import adapter_on_head, inside_head, lm_head, product_dtype
from g2rl_kernels import LMHead, SequenceFeatures, pad, sequence_features, token_logprobs, unpad

# The mean difference of log-probabilities that rounding logits to 16 bits explains, absolute and relative.
ROUNDING = 0.1


class HeadOutputs(NamedTuple):
    """What a `HeadPass` gives, fp32; 0 at positions that were not asked for.

    Attributes:
        logps, entropy: [B, L - 1], of the tokens 1 ... L - 1; differentiable.
        features: [B, d], data; None unless asked for. Of sequences that share a row, B is their number.
    """

    logps: torch.Tensor
    entropy: torch.Tensor
    features: torch.Tensor | None


@dataclass(frozen=True)
class HeadPass:
    """What to compute from the hidden states [B, L, d] of a batch of sequences, padded on either side.

    Attributes:
        input_ids: [B, L] int64.
        scored: [B, L], bools or numbers; non-zero marks a token whose log-probability is wanted. The first of a row,
            which nothing predicts, is left out.
        token_weights: [B, L] of each token in its sequence's feature, 0 for tokens of tools; None: no features.
        temperature: of the policy.
        dtype: of the head's product; None: autocast's, or the hidden states'.
        cu_seqlens: [sequences + 1] int, where each begins of sequences that follow one another in a single row, as
            flash attention has them; None: each row is a sequence.

    Raises:
        TypeError, ValueError: a tensor has another type or shape.
    """

    input_ids: torch.Tensor
    scored: torch.Tensor
    token_weights: torch.Tensor | None
    temperature: float
    dtype: torch.dtype | None = None
    cu_seqlens: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows = {"input_ids": self.input_ids, "scored": self.scored}
        if self.token_weights is not None:
            rows["token_weights"] = self.token_weights
        offsets = {} if self.cu_seqlens is None else {"cu_seqlens": self.cu_seqlens}
        for name, tensor in (rows | offsets).items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"head_pass.{name}: expected a tensor, found {type(tensor).__name__}")
        if self.input_ids.dim() != 2:
            raise ValueError(f"head_pass.input_ids: expected shape [B, L], found {list(self.input_ids.shape)}")
        if self.input_ids.dtype != torch.int64:
            raise TypeError(f"head_pass.input_ids: expected dtype torch.int64, found {self.input_ids.dtype}")
        shape = list(self.input_ids.shape)
        for name, tensor in rows.items():
            if list(tensor.shape) != shape:
                raise ValueError(f"head_pass.{name}: expected shape {shape}, as input_ids, found {list(tensor.shape)}")
        if self.cu_seqlens is not None and len(self.input_ids) != 1:
            raise ValueError(f"head_pass.input_ids: expected shape [1, L] with cu_seqlens, found {shape}")

    def rows(self, rows: slice) -> HeadPass:
        """The same for some of the sequences."""
        return self._of_each(lambda tensor: tensor[rows])

    def reordered(self, order: torch.Tensor) -> HeadPass:
        """The same with the tokens of each sequence in this order, [B, L]."""
        return self._of_each(lambda tensor: tensor.gather(1, order))

    def _of_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> HeadPass:
        weights = self.token_weights
        return replace(
            self,
            input_ids=change(self.input_ids),
            scored=change(self.scored),
            token_weights=None if weights is None else change(weights),
        )

    def __call__(self, model: Any, hidden: torch.Tensor) -> HeadOutputs:
        """Outputs of `model`'s head on its last hidden states; raises ValueError where they are of other rows."""
        if hidden.shape[:2] != self.input_ids.shape:
            B, L = self.input_ids.shape
            found = f"found {list(hidden.shape)}"
            raise ValueError(f"hidden: expected shape [{B}, {L}, d] of rows as head_pass.input_ids has them, {found}")
        scored = self._predicted()
        packed, cu_seqlens = unpad(hidden[:, :-1], scored)
        if self.cu_seqlens is not None:
            cu_seqlens = F.pad(scored[0].cumsum(0), (1, 0))[(self.cu_seqlens - 1).clamp(min=0)]
        dtype = self.dtype or product_dtype(hidden)
        targets = self.input_ids[:, 1:][scored]

        def compute(packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
            head = lm_head(model, self.temperature, dtype)
            packed = packed.to(dtype)
            if self.token_weights is None:
                return token_logprobs(packed, head, targets)[:2]
            weights = self.token_weights[:, 1:][scored].float()
            out = sequence_features(packed, head, targets, cu_seqlens, weights)
            return out.logps, out.entropy, out.features

        logps, entropy, *features = inside_head(model, compute, packed)
        return HeadOutputs(pad(logps, scored), pad(entropy, scored), features[0] if features else None)

    def _predicted(self) -> torch.Tensor:
        """Which of tokens 1 ... L - 1 are scored, [B, L - 1] bool; no first one of a sequence, which has no past."""
        scored = self.scored[:, 1:].bool()
        if self.cu_seqlens is not None:
            positions = torch.arange(1, self.scored.shape[1], device=scored.device)
            scored = scored & ~torch.isin(positions, self.cu_seqlens)
        return scored


def join(outputs: Sequence[HeadOutputs]) -> HeadOutputs:
    """Outputs of consecutive rows as one; raises ValueError where there are none."""
    if not outputs:
        raise ValueError(
            "outputs: expected those of a forward pass, found none; a compiled model runs no hook that came after it"
        )
    logps, entropy, features = zip(*outputs, strict=True)
    return HeadOutputs(torch.cat(logps), torch.cat(entropy), None if features[0] is None else torch.cat(features))


def add_head_pass(model: Any) -> None:
    """Make `model` one for `run_head_pass`; whoever else calls it sees no difference.

    Args:
        model: a causal language model of transformers, not yet wrapped for distribution; the base model of a PEFT one.

    Raises:
        TypeError: it is no model of transformers, such as a PEFT model itself.
    """
    _require_model(model)
    original = model.forward
    # A copy of the model is to run its own weights.
    function = getattr(original, "__func__", None)

    # The signature stays the model's own: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, head_pass: HeadPass | None = None, **kwargs: Any) -> Any:
        if head_pass is None:
            return original(*args, **kwargs) if function is None else function(self, *args, **kwargs)
        outputs = head_pass(self, self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state)
        return _changed(outputs, _as_complex)

    model.forward = types.MethodType(forward, model)


def _require_model(model: Any) -> None:
    if isinstance(model, PreTrainedModel):
        return
    found = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise TypeError(f"model: expected the one inside PEFT's, model.get_base_model(), found {found}")
    raise TypeError(f"model: expected one of transformers, as causal_lm_inside finds it in a wrapper, found {found}")


def run_head_pass(model: Any, head_pass: HeadPass, **inputs: Any) -> HeadOutputs:
    """Outputs of `head_pass` on the hidden states of `inputs`, [B, L] each beside the pass's own input ids.

    Args:
        model: one that `add_head_pass` has seen, in whatever wraps it now.

    Raises:
        TypeError: the model has given logits, as one of transformers does that knows nothing of a head pass.
    """
    outputs = model(input_ids=head_pass.input_ids, head_pass=head_pass, **inputs)
    if hasattr(outputs, "logits"):
        raise TypeError(f"model: expected one that add_head_pass has seen, found {type(model).__name__} without it")
    return _changed(outputs, torch.real)


def _as_complex(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, in a type that leaves any wrapper as it is.

    FSDP2 casts real numbers that leave a forward pass to 16 bits where its policy says so, and has its hooks on the
    tensors that it finds there, as DDP has: they have to be among the outputs, and out of reach of casts.
    """
    return torch.complex(tensor, torch.zeros_like(tensor))


def _changed(outputs: HeadOutputs, change: Callable[[torch.Tensor], torch.Tensor]) -> HeadOutputs:
    logps, entropy, features = outputs
    return HeadOutputs(change(logps), change(entropy), None if features is None else change(features))


@contextmanager
def run_alongside(model: Any, head_pass: HeadPass) -> Iterator[list[HeadOutputs]]:
    """Apply `head_pass` to the hidden states of forward passes that others run inside the block, rows in their order.

    Args:
        model: as in `add_head_pass`; wrapped or not is theirs.

    Yields:
        the outputs so far, one for each pass.

    Raises:
        TypeError: as `add_head_pass`.
    """
    _require_model(model)
    outputs: list[HeadOutputs] = []
    done = 0

    def hook(backbone: torch.nn.Module, args: Any, output: Any) -> None:
        nonlocal done
        hidden = output.last_hidden_state
        start, done = done, done + hidden.shape[0]
        outputs.append(head_pass.rows(slice(start, done))(model, hidden))

    handle = model.base_model.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


@dataclass
class FeaturePass:
    """Features of a forward pass that others run, of sequences packed or padded, whole or a rank's part of them.

    Attributes:
        response: [...] as the model's input, int64: the response whose token a position predicts, -1 for none. Those of
            a response are in a row, and responses in order.
        targets: [...], that token.
        B: responses.
        temperature: of the policy.
        context_group: the ranks that have parts of the same sequences, or None.
        outputs: of the head, once it has had its hidden states; logps are of the n positions that predict a token.
    """

    response: torch.Tensor
    targets: torch.Tensor
    B: int
    temperature: float
    context_group: ProcessGroup | None = None
    outputs: SequenceFeatures | None = None

    def run(self, model: Any, hidden: torch.Tensor) -> None:
        """Set outputs, of `model`'s head on its last hidden states [..., d]."""
        self.run_head(lm_head(model, self.temperature, product_dtype(hidden)), hidden)

    def run_head(self, head: LMHead, hidden: torch.Tensor) -> None:
        """Set outputs, of a head of the pass's temperature on hidden states [..., d]."""
        response = self.response.flatten().to(hidden.device)
        predicts = response >= 0
        lengths = torch.bincount(response[predicts], minlength=self.B)
        self.outputs = sequence_features(
            hidden.flatten(0, -2)[predicts].to(head.weight.dtype),
            head,
            self.targets.flatten().to(hidden.device)[predicts],
            F.pad(lengths.cumsum(0), (1, 0)),
            context_group=self.context_group,
        )


def at_predictors(values: torch.Tensor, length: int, fill: int = 0) -> torch.Tensor:
    """Values [B, T] of the last T tokens of sequences, at the positions [B, length] that predict them."""
    return F.pad(values, (length - 1 - values.shape[1], 1), value=fill)


def predicted_response(offsets: torch.Tensor, mask: torch.Tensor, mask_offsets: torch.Tensor) -> torch.Tensor:
    """For each position of packed sequences the response whose token it predicts, -1 for none.

    Args:
        offsets: [B + 1] of the sequences, prompt and response, N tokens together.
        mask: [M] of the responses' tokens, 0 for those of tools and of padding.
        mask_offsets: [B + 1] of the responses, each the end of its sequence.

    Returns:
        [N] int64, ascending where it is not -1.
    """
    lengths = mask_offsets.diff()
    response = torch.arange(lengths.shape[0], device=mask.device).repeat_interleave(lengths)
    # The token before predicts.
    shift = (offsets[1:] - mask_offsets[1:] - 1).to(mask.device)[response]
    positions = torch.arange(mask.shape[0], device=mask.device) + shift
    row = torch.full((int(offsets[-1]),), -1, device=mask.device)
    row[positions] = response.where(mask.bool(), -1)
    return row


def causal_lm_inside(module: torch.nn.Module) -> PreTrainedModel:
    """The model of transformers in whatever wraps it: DDP, FSDP, DeepSpeed, PEFT, a trainer's own module.

    Raises:
        TypeError: there is none.
    """
    found = next((part for part in module.modules() if isinstance(part, PreTrainedModel)), None)
    if found is None:
        raise TypeError(f"model: expected one of transformers, or a wrapper of one, found {type(module).__name__}")
    return found


class HeadHook:
    """Runs a `FeaturePass` where the model of a trainer is about to use its head: there, FSDP and ZeRO-3 have it whole.

    Args:
        module: the model in whatever wraps it.
        trainer: its name, for errors; targets: its option that says what has an adapter, likewise.
        fused: for a trainer whose kernels read the head's weight and never call it, what to say where their
            log-probabilities are others than the head's.

    Attributes:
        model: the model of transformers.
        awaited: what the next forward pass is to run; None lets it go by.

    Raises:
        ValueError: an adapter on the head.
    """

    def __init__(self, module: torch.nn.Module, trainer: str, targets: str, fused: str = "") -> None:
        self.model = causal_lm_inside(module)
        self.awaited: FeaturePass | None = None
        self._trainer, self._wrong = trainer, fused or "it is not one that G2RL knows"
        self._compared = False
        if adapted := adapter_on_head(self.model):
            raise ValueError(f"{targets}: {adapted}")
        if fused:
            self.model.base_model.register_forward_hook(lambda _, args, output: self._run(output[0]))
        else:
            self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: self._run(args[0]))

    def _run(self, hidden: torch.Tensor) -> None:
        if self.awaited is not None:
            self.awaited.run(self.model, hidden)

    @contextmanager
    def awaiting(self, awaited: FeaturePass) -> Iterator[None]:
        """Run it in the forward pass inside the block."""
        self.awaited = awaited
        try:
            yield
        finally:
            self.awaited = None

    def features(self, done: FeaturePass, logps: Callable[[], torch.Tensor]) -> torch.Tensor:
        """[B, d] of a pass that was awaited.

        Args:
            logps: gives the trainer's log-probabilities [n] of the same tokens. The first are compared with the head's:
                another head would give other features.

        Raises:
            RuntimeError: rounding does not explain their difference, or the head was not called.
        """
        name = type(self.model).__name__
        if done.outputs is None:
            raise RuntimeError(f"g2rl: {name} makes logits without a call of its head")
        ours = done.outputs.logps
        if not self._compared and len(ours):
            self._compared = True
            gap, size = float((logps().to(ours) - ours).abs().sum()), float(ours.abs().sum())
            if gap > ROUNDING * (len(ours) + size):
                raise RuntimeError(
                    f"g2rl: {self._trainer}'s log-probabilities differ from those of the head of {name} by "
                    f"{gap / len(ours):.2g} a token: {self._wrong}"
                )
        return done.outputs.features
