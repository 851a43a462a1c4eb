r"""What two responses' likeness may be read from: gradient features, and cheaper or coarser things.

Each is a matrix [m, m] of similarities in fp64; all but the last are cosines of one vector for each response:

    phi              sum_t phi_t, the paper's feature (eq. 8 with a_t = 1); that the sum is divided by the number of
                     tokens changes no cosine
    phi, entropy     sum_t H_t phi_t: tokens weigh by the entropy of their distribution
    phi, unit        sum_t phi_t / |phi_t|: tokens weigh by their direction alone
    phi, top 256     phi_t from the 256 most likely tokens and the response's own, their probabilities made to sum to 1
    phi, bf16        hidden states, head, logits, probabilities and phi_t rounded to bf16, sums in fp32
    mean hidden      mean_t h_t, the head's input
    bag of tokens    how often each token occurs
    semantic         a sentence encoder's embedding of the text
    length           the shorter response's tokens over the longer one's
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from g2rl.encoder import SentenceEncoder
from g2rl.forward import ResponseStates
from g2rl.probes import in_float64
from g2rl.types import Episode
from g2rl_kernels import LMHead, group_similarity, sequence_features

TOP = 256
VARIANTS = ("phi, entropy", "phi, unit")
"""Features that weigh tokens in another way than the paper's."""
BASELINES = ("phi, top 256", "phi, bf16", "mean hidden", "bag of tokens", "semantic", "length")
PREDICTORS = ("phi", *VARIANTS, *BASELINES)


def cosines(vectors: Tensor) -> Tensor:
    """[m, m] fp64 of vectors [m, k]; rows and columns of zero vectors are 0."""
    return group_similarity(in_float64(vectors), len(vectors))[0]


def representations(
    states: ResponseStates, head: LMHead, episodes: Sequence[Episode], encoder: SentenceEncoder | None
) -> dict[str, Tensor]:
    """Similarities [m, m] of one problem's responses by name of `PREDICTORS`; without an encoder no `semantic`.

    Args:
        states: of the m responses, none of them empty.
        head: at the rollouts' temperature.
    """
    hidden, targets, cu = states
    out = sequence_features(hidden, head, targets, cu)
    each = torch.arange(len(targets) + 1, dtype=cu.dtype, device=cu.device)
    tokens = sequence_features(hidden, head, targets, each).features
    found = {
        "phi": out.features,
        "phi, entropy": sequence_features(hidden, head, targets, cu, token_weights=out.entropy).features,
        "phi, unit": sum_tokens(torch.nn.functional.normalize(tokens, dim=1), cu),
        "phi, top 256": sum_tokens(truncated_features(hidden, head, targets), cu),
        "phi, bf16": sum_tokens(rounded_features(hidden, head, targets), cu),
        "mean hidden": sum_tokens(hidden, cu),
        "bag of tokens": bags(episodes),
    }
    similarities = {name: cosines(vectors) for name, vectors in found.items()}
    if encoder is not None:
        similarities["semantic"] = cosines(encoder.encode([episode.text for episode in episodes]))
    lengths = in_float64(cu.diff())
    similarities["length"] = torch.minimum(lengths[:, None], lengths) / torch.maximum(lengths[:, None], lengths)
    return {name: similarity.cpu() for name, similarity in similarities.items()}


def sum_tokens(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[m, k] fp64: the sum over each response's tokens of values [N, k]."""
    values = in_float64(values)
    sums = values.new_zeros(len(cu_seqlens) - 1, values.shape[1])
    lengths = cu_seqlens.diff().long().to(values.device)
    return sums.index_add_(0, torch.arange(len(sums), device=values.device).repeat_interleave(lengths), values)


def truncated_features(hidden: Tensor, head: LMHead, targets: Tensor, top: int = TOP) -> Tensor:
    """phi_t [N, d] from the `top` most likely tokens and the target, K: p_v over K alone, and 0 elsewhere."""

    def probabilities(logits: Tensor) -> Tensor:
        kept = torch.zeros_like(logits, dtype=torch.bool)
        kept.scatter_(1, logits.topk(min(top, logits.shape[1]), dim=1).indices, True)
        kept.scatter_(1, targets[:, None], True)
        return torch.where(kept, logits, -torch.inf).softmax(1)

    return _plain_features(hidden, head, targets, probabilities)


def rounded_features(hidden: Tensor, head: LMHead, targets: Tensor) -> Tensor:
    """phi_t [N, d] with every tensor rounded to bf16."""
    rounded = replace(head, weight=head.weight.bfloat16(), bias=None if head.bias is None else head.bias.bfloat16())
    return _plain_features(hidden.bfloat16(), rounded, targets, lambda logits: logits.softmax(1))


def _plain_features(hidden: Tensor, head: LMHead, targets: Tensor, probabilities: Callable[[Tensor], Tensor]) -> Tensor:
    """phi_t = s W^T (e_y - p) dz/dx, token by token, in the dtype of what is given."""
    x = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    z = x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)
    slope = torch.ones_like(z) if head.softcap is None else 1 - (z / head.softcap) ** 2
    p = probabilities(z / head.temperature)
    chosen = slope.gather(1, targets[:, None]) * head.weight[targets]
    return head.logit_scale * (chosen - (p * slope) @ head.weight)


def bags(episodes: Sequence[Episode]) -> Tensor:
    """[m, K] counts of the K tokens that occur in any of the responses."""
    tokens = sorted({token for episode in episodes for token in episode.response_ids})
    place = {token: k for k, token in enumerate(tokens)}
    counts = torch.zeros(len(episodes), len(tokens), dtype=torch.float64)
    for i, episode in enumerate(episodes):
        for token in episode.response_ids:
            counts[i, place[token]] += 1
    return counts
