"""From sequence features and rewards to shaped rewards and advantages, group by group (paper eq. 2, 9 to 13).

With S_ij the cosine of responses i and j of a group (B responses, G groups, m the size of a group):

    w_ij  = exp(r_j) / sum_{k != i} exp(r_k)                eq. 10, over peers j != i
    nu_i  = sqrt(max(1 - sum_j w_ij S_ij^2, 0))             eq. 11, in [0, 1]
    nubar = (nu - min nu) / (max nu - min nu)               eq. 13, inside the group
    r~_i  = clip(r_i (1 + lambda nubar_i), -c_i, c_i)       eq. 12, rule "scale"; c_i = max(c, |r_i|)
    A_i   = (r~_i - mean r~) / sqrt(var r~ + eps)           eq. 2

A response without gradient (empty, fully masked: Phi = 0) is invalid: no peer to others, left out of min and max, and
its reward stays as it is.

NaN or inf in features, similarities or scores leaves the results of its group undefined, and no other group's.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch

from g2rl_kernels.checks import (
    ValueChecks,
    check_int,
    check_offsets,
    check_real,
    check_tensor,
    own_copy,
    refuse_function_transforms,
    refuse_second_derivative,
    refuse_tangents,
    values_readable,
    warn_caller,
)
from g2rl_kernels.dispatch import resolve
from g2rl_kernels.group_layout import GroupLayout, largest_group
from g2rl_kernels.ops.registration import register_op
from g2rl_kernels.products import where_float64_is
from g2rl_kernels.records import GroupAdvantages, Shaping

NORMALIZATIONS = ("std", "none")

_REAL = (torch.float32, torch.float64)
_OFFSETS = (torch.int32, torch.int64)
_DATA = "results are data, without a gradient"
_LARGEST_GROUP = 2**31 - 1  # every number divides a batch of none


def group_similarity(features: torch.Tensor, groups: int | torch.Tensor) -> torch.Tensor:
    """Cosine similarities inside each group (eq. 9); differentiable in features, once and in reverse mode.

    Equivalent, for groups of m, to ``u = F.normalize(features.view(G, m, d), dim=-1); u @ u.mT``.

    Args:
        features: [B, d], fp32 or fp64.
        groups: the size m of every group, or offsets cu_groups [G + 1] int32 or int64 from 0 to B.

    Returns:
        [G, m_max, m_max]; rows and columns of zero features, and entries beyond a group's size, are 0. Under
        ``torch.compile(fullgraph=True)`` m_max is a number if `groups` is one, otherwise a size known only at run time.

    Raises:
        NotImplementedError: features have a tangent, of forward-mode differentiation, or torch.func takes the gradient
            in them.
        TypeError, ValueError: an argument has another type, shape or range.
    """
    check_tensor("features", features, ("B", "d"), _REAL)
    refuse_tangents(features=features)
    refuse_function_transforms("use torch.autograd.grad", features=features)
    cu_groups, m_max = _offsets(groups, features.shape[0], features.device)
    return _group_similarity(features, cu_groups, m_max)


def exploration_scores(
    similarity: torch.Tensor,
    rewards: torch.Tensor,
    groups: int | torch.Tensor,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """How far each response's gradient direction lies from its rewarded peers' (eq. 10, 11).

    Args:
        similarity: [G, m_max, m_max], from `group_similarity`.
        rewards: [B] float, raw.
        groups: as in `group_similarity`.
        valid: [B] bool; None takes responses whose similarity to themselves is not 0.

    Returns:
        nu [B] in [0, 1], of similarity's dtype; 0 for an invalid response and for one without a valid peer. Data, not
        differentiable.

    Raises:
        NotImplementedError: torch.func takes the gradient in similarity or rewards.
        TypeError, ValueError: an argument has another type, shape, device or range, or rewards are not finite.
    """
    check_tensor("rewards", rewards, ("B",))
    check_real("rewards", rewards)
    check_tensor("similarity", similarity, ("G", "m_max", "m_max"), _REAL, rewards.device)
    cu_groups, m_max = _offsets(groups, rewards.shape[0], rewards.device)
    m_max = similarity.shape[1] if m_max is None else m_max
    check_tensor("similarity", similarity, (cu_groups.shape[0] - 1, m_max, m_max))
    _check_valid(valid, rewards)
    refuse_function_transforms(_DATA, similarity=similarity, rewards=rewards)
    return _exploration_scores(similarity, rewards.to(similarity.dtype), cu_groups, valid)


def shape_rewards(
    rewards: torch.Tensor,
    scores: torch.Tensor,
    groups: int | torch.Tensor,
    shaping: Shaping | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rewards scaled by normalised scores and clipped (eq. 12, 13, section 2.5).

    Args:
        rewards: [B] float, raw; -1 / +1 in the paper. With 0 / 1, scaling cannot move wrong answers: a warning says so.
        scores: [B] fp32 or fp64, nu.
        groups: as in `group_similarity`.
        shaping: None takes ``Shaping()``.
        valid: [B] bool; invalid responses keep their reward and take no part in min and max. None: all are valid.

    Returns:
        r~ [B] of scores' dtype. Data, not differentiable.

    Raises:
        NotImplementedError: torch.func takes the gradient in rewards or scores.
        TypeError, ValueError: an argument has another type, shape, device or range, or rewards are not finite.
    """
    check_tensor("scores", scores, ("B",), _REAL)
    check_tensor("rewards", rewards, (scores.shape[0],), None, scores.device)
    check_real("rewards", rewards)
    cu_groups, _ = _offsets(groups, scores.shape[0], scores.device)
    _check_valid(valid, scores)
    refuse_function_transforms(_DATA, rewards=rewards, scores=scores)
    return _shape_rewards(rewards.to(scores.dtype), scores, cu_groups, valid, *_flat(shaping))


def group_advantages(
    rewards: torch.Tensor, groups: int | torch.Tensor, normalize: Literal["std", "none"] = "std"
) -> torch.Tensor:
    """Rewards relative to their group (eq. 2).

    Args:
        rewards: [B] float, raw or shaped.
        groups: as in `group_similarity`.
        normalize: "std" divides by sqrt(variance + 1e-6), the variance over the group's m (GRPO); "none" does not
            (Dr. GRPO).

    Returns:
        A [B], fp64 for fp64 rewards, else fp32; exactly 0 where a group's rewards are all equal. Not differentiable.

    Raises:
        NotImplementedError: torch.func takes the gradient in rewards.
        TypeError, ValueError: an argument has another type, shape, device or range, or rewards are not finite.
    """
    check_tensor("rewards", rewards, ("B",))
    check_real("rewards", rewards)
    refuse_function_transforms(_DATA, rewards=rewards)
    _check_normalize(normalize)
    cu_groups, _ = _offsets(groups, rewards.shape[0], rewards.device)
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return _group_advantages(rewards.to(dtype), cu_groups, normalize)


def g2rl_advantages(
    features: torch.Tensor,
    rewards: torch.Tensor,
    groups: int | torch.Tensor,
    shaping: Shaping | None = None,
    valid: torch.Tensor | None = None,
    *,
    normalize: Literal["std", "none"] = "std",
) -> GroupAdvantages:
    """All of the above in one op: similarity, scores, shaped rewards, advantages.

    Equivalent to::

        S = group_similarity(features, groups)
        nu = exploration_scores(S, rewards, groups, valid)
        r = shape_rewards(rewards, nu, groups, shaping, valid)
        A = group_advantages(r, groups, normalize)

    with `valid` narrowed to responses whose features are not all 0.

    Args:
        features: [B, d] fp32 or fp64, from `sequence_features`.
        rewards: [B] float, raw.
        groups, shaping, valid, normalize: as in the functions above.

    Returns:
        Data, not differentiable.

    Raises:
        NotImplementedError: torch.func takes the gradient in features or rewards.
        RuntimeError: a backend that was chosen by name holds no group of this size.
        TypeError, ValueError: an argument has another type, shape, device or range, or rewards are not finite.
    """
    check_tensor("features", features, ("B", "d"), _REAL)
    check_tensor("rewards", rewards, (features.shape[0],), None, features.device)
    check_real("rewards", rewards)
    _check_normalize(normalize)
    _check_valid(valid, rewards)
    refuse_function_transforms(_DATA, features=features, rewards=rewards)
    cu_groups, m_max = _offsets(groups, features.shape[0], features.device)
    rewards = rewards.to(features.dtype)
    return GroupAdvantages(*_g2rl_advantages(features, rewards, cu_groups, m_max, valid, *_flat(shaping), normalize))


def _offsets(groups: int | torch.Tensor, B: int, device: torch.device) -> tuple[torch.Tensor, int | None]:
    """cu_groups [G + 1] and the size of every group, None where they may differ."""
    if isinstance(groups, torch.Tensor):
        check_tensor("groups", groups, ("G + 1",), _OFFSETS, device)
        if groups.shape[0] == 0:
            raise ValueError("groups: expected at least the offset 0, found an empty tensor")
        return groups, None
    check_int("groups", groups, "an int or a tensor of offsets")
    if groups <= 0 or B % groups or groups > _LARGEST_GROUP:
        raise ValueError(f"groups: expected a divisor of B = {B}, found {groups}")
    groups = groups if isinstance(groups, torch.SymInt) else int(groups)  # NumPy's numbers fit no schema
    return torch.arange(0, B + 1, groups, device=device), groups


def _check_valid(valid: torch.Tensor | None, like: torch.Tensor) -> None:
    if valid is not None:
        check_tensor("valid", valid, (like.shape[0],), (torch.bool,), like.device)


def _flat(shaping: Shaping | None) -> tuple[float, float, str, float, str]:
    """The record as a schema can hold it; None is the default one."""
    s = Shaping() if shaping is None else shaping
    if not isinstance(s, Shaping):
        raise TypeError(f"shaping: expected a Shaping, found {type(s).__name__}")
    return s.strength, s.clip, s.rule, s.min_range, s.uniform_groups


def _check_normalize(normalize: str) -> None:
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize: expected one of {', '.join(NORMALIZATIONS)}, found {normalize!r}")


def _check_finite(rewards: torch.Tensor) -> tuple[float, float] | None:
    """Smallest and largest reward, where there are any and they may be read."""
    if rewards.numel() == 0 or not values_readable(rewards):
        return None
    low, high = (float(bound) for bound in torch.aminmax(rewards))  # both NaN if any reward is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("rewards: expected finite values, found NaN or inf")
    return low, high


def _check_rewards(rewards: torch.Tensor, strength: float) -> None:
    if _check_finite(rewards) == (0, 1) and strength > 0 and bool(((rewards == 0) | (rewards == 1)).all()):
        warn_caller(
            "rewards: found only 0 and 1; shaping scales rewards and cannot move wrong answers. Map them to -1 and +1."
        )


def _suspicious(rewards: torch.Tensor) -> torch.Tensor:
    """Whether `_check_rewards` may have something to say: all are 0 or 1, or one is not finite."""
    return ((rewards == 0) | (rewards == 1)).all() | (rewards - rewards != 0).any()


def _checked(cu_groups: torch.Tensor, B: int) -> torch.Tensor:
    """Offsets that kernels may address memory with: the op's own, so that they stay as they were checked."""
    cu_groups = own_copy(cu_groups)
    check_offsets("groups", cu_groups, B, "B")
    return cu_groups


@register_op
def _group_similarity(features: torch.Tensor, cu_groups: torch.Tensor, m_max: int | None) -> torch.Tensor:
    cu_groups = _checked(cu_groups, features.shape[0])
    run = resolve("group_similarity", features.device, features.dtype)
    return run(features, cu_groups, largest_group(cu_groups) if m_max is None else m_max)


@torch.library.register_fake(_group_similarity)
def _(features, cu_groups, m_max):
    size = torch.library.get_ctx().new_dynamic_size() if m_max is None else m_max
    return features.new_empty((cu_groups.shape[0] - 1, size, size))


@register_op
@where_float64_is
def _similarity_gradient(grad: torch.Tensor, features: torch.Tensor, cu_groups: torch.Tensor) -> torch.Tensor:
    """With u_i = Phi_i / |Phi_i| and S = u u^T: du = (dS + dS^T) u, dPhi_i = (du_i - u_i <u_i, du_i>) / |Phi_i|.

    An op of its own: compilers may know the size of the largest group at run time alone. In float64, as the similarity
    itself: the part of du along u cancels, and fp32 would lose its digits.
    """
    if features.device.type == "cpu":  # another thread may have changed them since the forward pass
        cu_groups = _checked(cu_groups, features.shape[0])
    phi, grad = features.double(), grad.double()
    layout = GroupLayout(cu_groups, phi.shape[0], grad.shape[1])
    norm = phi.norm(dim=1, keepdim=True)
    inverse = torch.where(norm > 0, norm.reciprocal(), 0)
    u = phi * inverse
    # Whatever comes back for the zeros beyond a group's size, inf and NaN included, is nobody's.
    grad_u = layout.gather(torch.where(layout.member[:, None], grad + grad.mT, 0) @ layout.spread(u))
    return ((grad_u - u * (u * grad_u).sum(1, keepdim=True)) * inverse).to(features.dtype)


@torch.library.register_fake(_similarity_gradient)
def _(grad, features, cu_groups):
    return features.new_empty(features.shape)


def _save_features(ctx, inputs, output):
    features, cu_groups, _ = inputs
    ctx.save_for_backward(features, cu_groups)


def _similarity_backward(ctx, grad):
    return _similarity_gradient(grad, *ctx.saved_tensors), None, None


torch.library.register_autograd(_group_similarity, _similarity_backward, setup_context=_save_features)
torch.library.register_autograd(_similarity_gradient, refuse_second_derivative("similarity"))


@register_op
def _exploration_scores(
    similarity: torch.Tensor, rewards: torch.Tensor, cu_groups: torch.Tensor, valid: torch.Tensor | None
) -> torch.Tensor:
    cu_groups = _checked(cu_groups, rewards.shape[0])
    if values_readable(cu_groups) and (largest := largest_group(cu_groups)) > similarity.shape[1]:
        found = f"{list(similarity.shape)} and a group of {largest}"
        raise ValueError(f"similarity: expected shape [G, m_max, m_max] with m_max of the largest group, found {found}")
    _check_finite(rewards)
    run = resolve("exploration_scores", similarity.device, similarity.dtype)
    return run(similarity, rewards, cu_groups, valid)


@torch.library.register_fake(_exploration_scores)
def _(similarity, rewards, *_):
    return torch.empty_like(rewards)


@register_op
def _shape_rewards(
    rewards: torch.Tensor,
    scores: torch.Tensor,
    cu_groups: torch.Tensor,
    valid: torch.Tensor | None,
    strength: float,
    clip: float,
    rule: str,
    min_range: float,
    uniform_groups: str,
) -> torch.Tensor:
    cu_groups = _checked(cu_groups, rewards.shape[0])
    _check_rewards(rewards, strength)
    run = resolve("shape_rewards", rewards.device, rewards.dtype)
    shaping = Shaping(strength, clip, rule, min_range, uniform_groups)  # type: ignore[arg-type]
    return run(rewards, scores, cu_groups, valid, shaping)


@torch.library.register_fake(_shape_rewards)
def _(rewards, *_):
    return torch.empty_like(rewards)


@register_op
def _group_advantages(rewards: torch.Tensor, cu_groups: torch.Tensor, normalize: str) -> torch.Tensor:
    cu_groups = _checked(cu_groups, rewards.shape[0])
    _check_finite(rewards)
    run = resolve("group_advantages", rewards.device, rewards.dtype)
    return run(rewards, cu_groups, normalize)


@torch.library.register_fake(_group_advantages)
def _(rewards, *_):
    return torch.empty_like(rewards)


@register_op
def _g2rl_advantages(
    features: torch.Tensor,
    rewards: torch.Tensor,
    cu_groups: torch.Tensor,
    m_max: int | None,
    valid: torch.Tensor | None,
    strength: float,
    clip: float,
    rule: str,
    min_range: float,
    uniform_groups: str,
    normalize: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    checks = ValueChecks()
    if m_max is None:  # else they are `_offsets`' own
        cu_groups = checks.offsets("groups", cu_groups, features.shape[0], "B")
    checks.run(partial(_check_rewards, rewards, strength), rewards, lambda: _suspicious(rewards))
    shaping = Shaping(strength, clip, rule, min_range, uniform_groups)  # type: ignore[arg-type]
    with checks:
        largest = largest_group(cu_groups) if m_max is None else m_max
        run = resolve("g2rl_advantages", features.device, features.dtype, m_max=largest)
        return tuple(run(features, rewards, cu_groups, largest, valid, shaping, normalize))


@torch.library.register_fake(_g2rl_advantages)
def _(features, rewards, cu_groups, m_max, *_):
    size = torch.library.get_ctx().new_dynamic_size() if m_max is None else m_max
    similarity = features.new_empty((cu_groups.shape[0] - 1, size, size))
    return (*(torch.empty_like(rewards) for _ in range(3)), similarity)


def _mark_as_data(ctx, inputs, output):
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))
    ctx.count = len(inputs)


def _no_gradient(ctx, *grads):
    return (None,) * ctx.count


# Scores, shaped rewards and advantages are data for the loss: gradients end here by contract.
for _op in (_exploration_scores, _shape_rewards, _group_advantages, _g2rl_advantages):
    torch.library.register_autograd(_op, _no_gradient, setup_context=_mark_as_data)
