"""The loss and its gradient against hand-computed numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from g2rl.config import ObjectiveConfig
from g2rl.objective import (
    Tokens,
    Totals,
    kl_estimate,
    overlong_penalty,
    policy_loss,
    probability_ratio,
    surrogate,
    token_weights,
    truncated,
)

GRPO = ObjectiveConfig()
CU = torch.tensor([0, 2, 3])
ONE = Totals(1, 1)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def made(ratios: torch.Tensor, advantages: torch.Tensor, cu: torch.Tensor = CU, **more: torch.Tensor) -> Tokens:
    """Tokens whose ratio to the old policy is `ratios`; entropies are 0 unless given."""
    old = -1 - torch.arange(len(ratios), dtype=torch.float64)
    logps = (old + ratios.log()).requires_grad_()
    return Tokens(logps, more.pop("entropy", torch.zeros_like(old)), old, advantages, cu, **more)


def gradient(tokens: Tokens, totals: Totals, config: ObjectiveConfig) -> list[float]:
    loss, _ = policy_loss(tokens, totals, config)
    return torch.autograd.grad(loss, tokens.logps)[0].tolist()


def test_grpo() -> None:
    """Two responses of 2 and 1 tokens; ratios 1.5 (clipped to 1.2), 0.5, 0.5 (clipped to 0.8 where A < 0)."""
    tokens = made(numbers(1.5, 0.5, 0.5), numbers(2, -1))
    loss, shown = policy_loss(tokens, Totals(2, 3), GRPO)
    # Response 1: mean of -min(1.5 * 2, 1.2 * 2) = -2.4 and -min(0.5 * 2, 0.8 * 2) = -1. Response 2: -min(-0.5, -0.8).
    assert loss.item() == pytest.approx(((-2.4 - 1) / 2 + 0.8) / 2)
    assert shown["ratio_clip_share"].item() == 2
    # Clipped tokens have no gradient; d(-rho A)/dlogp = -rho A, weighed by 1 / (2 responses x length).
    assert gradient(tokens, Totals(2, 3), GRPO) == pytest.approx([0, -0.5 * 2 / 4, 0])


def test_clip_higher() -> None:
    """1.25 is beyond 1.2, and within 1.28, where it keeps its gradient."""
    for high, value, slope in ((0.2, 1.2, 0.0), (0.28, 1.25, 1.25)):
        tokens = made(numbers(1.25), numbers(1), CU[[0, 2]] // 2)
        config = ObjectiveConfig(clip_high=high)
        assert policy_loss(tokens, ONE, config)[0].item() == pytest.approx(-value)
        assert gradient(tokens, ONE, config) == pytest.approx([-slope])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Responses of 2, 0, 1 and 3 tokens, the last one filtered: 3 responses and 3 tokens are left.
        ("response_mean", [1 / 6, 1 / 6, 1 / 3, 0, 0, 0]),
        ("token_mean", [1 / 3, 1 / 3, 1 / 3, 0, 0, 0]),
        ("fixed_length", [1 / 15, 1 / 15, 1 / 15, 0, 0, 0]),  # length 5
    ],
)
def test_aggregation(aggregation: str, expected: list[float]) -> None:
    cu, kept = torch.tensor([0, 2, 2, 3, 6]), torch.tensor([True, True, True, False])
    config = ObjectiveConfig(aggregation=aggregation, length=5)  # type: ignore[arg-type]
    tokens = made(torch.ones(6).double(), numbers(1, 1, -1, 4), cu, kept=kept)
    assert token_weights(tokens, Totals(3, 3), config).tolist() == pytest.approx(expected)
    # On-policy the gradient is - weight x A.
    signs = [1, 1, -1, 4, 4, 4]
    expected_gradient = [-w * a for w, a in zip(expected, signs, strict=True)]
    assert gradient(tokens, Totals(3, 3), config) == pytest.approx(expected_gradient)
    nothing = replace(tokens, kept=torch.zeros(4, dtype=torch.bool))
    assert gradient(nothing, Totals(0, 0), config) == [0] * 6


def test_filtered_responses_are_not_shown() -> None:
    """All three tokens are clipped, with a KL of 1 and a ratio of 2 to the rollout; the last response is left out."""
    kept = torch.tensor([True, False])
    tokens = made(numbers(1.5, 1.5, 1.5), numbers(1, 1), kept=kept)
    tokens = replace(tokens, reference_logps=tokens.logps.detach() - 1, rollout_logps=tokens.old_logps - math.log(2))
    shown = policy_loss(tokens, Totals(1, 2), ObjectiveConfig(kl_estimator="k1"))[1]
    assert {key: value.item() for key, value in shown.items()} == pytest.approx(
        {"ratio_clip_share": 2, "rollout_ratio": 4, "kl": 2}
    )
    assert not any(value.requires_grad for value in shown.values())


def test_sequence_ratio() -> None:
    """GSPO: ratios 4 and 1/1 have the geometric mean 2, an empty response none, and 0.5 its own."""
    cu = torch.tensor([0, 2, 2, 3])
    tokens = made(numbers(4, 1, 0.5), numbers(-1, 9, 1), cu)
    assert probability_ratio(tokens, "sequence").tolist() == pytest.approx([2, 2, 0.5])
    config = ObjectiveConfig(ratio="sequence")
    assert policy_loss(tokens, Totals(3, 3), config)[0].item() == pytest.approx((2 - 0.5) / 3)
    # d s / d logp_t = s / length: 2 x -(-1) / 2 for both tokens of the first response.
    assert gradient(tokens, Totals(3, 3), config) == pytest.approx([1 / 3, 1 / 3, -0.5 / 3])
    clipped = made(numbers(4, 1, 0.5), numbers(1, 9, -1), cu)
    assert gradient(clipped, Totals(3, 3), config) == pytest.approx([0, 0, 0])


def test_dual_clip() -> None:
    """Only a negative advantage is bounded: at 3 A where the ratio is 5; 2 and 5 with A > 0 are as in PPO."""
    config = ObjectiveConfig(dual_clip=3.0)
    ratio, advantages = numbers(5, 2, 5).requires_grad_(), numbers(-2, -1, 1)
    value, clipped = surrogate(ratio, advantages, config)
    assert value.tolist() == pytest.approx([-6, -2, 1.2])
    assert clipped.tolist() == [True, False, True]
    assert torch.autograd.grad(value.sum(), ratio)[0].tolist() == pytest.approx([0, -1, 0])


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", lambda g: g, lambda g: 1),
        ("k2", lambda g: g * g / 2, lambda g: g),
        ("k3", lambda g: math.exp(-g) + g - 1, lambda g: 1 - math.exp(-g)),
    ],
)
def test_kl(estimator: str, value, slope) -> None:
    """log p - log p_ref of 0.5, -1 and 0, with A = 0: the loss is the KL term alone."""
    gaps = [0.5, -1.0, 0.0]
    logps = numbers(-1, -2, -1.5)
    tokens = Tokens(logps.requires_grad_(), logps.detach(), logps.detach(), numbers(0, 0), CU)
    tokens = replace(tokens, reference_logps=logps.detach() - numbers(*gaps))
    config = ObjectiveConfig(kl_coef=0.1, kl_estimator=estimator)  # type: ignore[arg-type]
    k = [value(g) for g in gaps]
    assert kl_estimate(logps, logps.detach() - numbers(*gaps), estimator).tolist() == pytest.approx(k)
    loss, shown = policy_loss(tokens, Totals(2, 3), config)
    assert loss.item() == pytest.approx(0.1 * ((k[0] + k[1]) / 2 + k[2]) / 2)
    assert shown["kl"].item() == pytest.approx(sum(k))
    weights = [0.1 / 4, 0.1 / 4, 0.1 / 2]
    expected = [w * slope(g) for w, g in zip(weights, gaps, strict=True)]
    assert gradient(tokens, Totals(2, 3), config) == pytest.approx(expected)


def test_kl_gradients_are_what_the_docstring_says() -> None:
    """Over all tokens of a distribution: E[k1' grad log p] = 0, k2's is grad KL(p, q), k3's is grad KL(q, p)."""
    z = numbers(0.3, -0.7, 1.1).requires_grad_()
    q = numbers(0.2, 0.5, 0.3)
    logps, p = z.log_softmax(0), z.softmax(0)
    forward, reverse = (q * (q.log() - logps)).sum(), (p * (logps - q.log())).sum()
    expected = {"k1": torch.zeros(3).double()}
    expected["k2"], expected["k3"] = (torch.autograd.grad(k, z, retain_graph=True)[0] for k in (reverse, forward))
    for estimator, want in expected.items():
        mean = (p.detach() * kl_estimate(logps, q.log(), estimator)).sum()
        torch.testing.assert_close(torch.autograd.grad(mean, z, retain_graph=True)[0], want)


def test_entropy_bonus() -> None:
    """Aggregated like the rest: weights 1/4, 1/4, 1/2, and the bonus lowers the loss."""
    entropy = numbers(1, 2, 4).requires_grad_()
    tokens = made(torch.ones(3).double(), numbers(0, 0), entropy=entropy)
    loss, _ = policy_loss(tokens, Totals(2, 3), ObjectiveConfig(entropy_coef=0.1))
    assert loss.item() == pytest.approx(-0.1 * (1 / 4 + 2 / 4 + 4 / 2))
    assert torch.autograd.grad(loss, entropy)[0].tolist() == pytest.approx([-0.025, -0.025, -0.05])


def test_truncated_importance_sampling() -> None:
    """Old policy over sampling engine: 4 (cut to 2), 0.5 and 1; the weight multiplies the gradient, and has none."""
    tokens = made(torch.ones(3).double(), numbers(1, -1))
    tokens = replace(tokens, rollout_logps=tokens.old_logps - numbers(4, 0.5, 1).log())
    assert truncated(numbers(4, 0.5, 1), 2.0).tolist() == [2, 0.5, 1]
    capped = ObjectiveConfig(importance_cap=2.0, entropy_coef=0.1)
    tokens = replace(tokens, entropy=numbers(1, 1, 1))
    loss, shown = policy_loss(tokens, Totals(2, 3), capped)
    assert loss.item() == pytest.approx(-(2 + 0.5) / 4 + 1 / 2 - 0.1)  # the bonus is not weighed
    assert shown["rollout_ratio"].item() == pytest.approx(5.5)
    assert gradient(tokens, Totals(2, 3), capped) == pytest.approx([-2 / 4, -0.5 / 4, 1 / 2])
    capped = ObjectiveConfig(importance_cap=0.8)
    assert gradient(tokens, Totals(2, 3), capped) == pytest.approx([-0.8 / 4, -0.5 / 4, 0.8 / 2])
    # Without a cap the ratio is only shown.
    assert gradient(tokens, Totals(2, 3), GRPO) == pytest.approx([-1 / 4, -1 / 4, 1 / 2])


@pytest.mark.parametrize(("length", "penalty"), [(0, 0), (12, 0), (14, -0.25), (19, -0.875), (20, -1)])
def test_overlong_penalty(length: int, penalty: float) -> None:
    """Limit 20, buffer 8: nothing up to 12, then linearly to -1."""
    assert overlong_penalty(length, 20, 8) == penalty


@pytest.mark.parametrize("aggregation", ["response_mean", "token_mean", "fixed_length"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_parts_sum_to_the_whole(aggregation: str, ratio: str) -> None:
    """Responses of 3, 1, 0, 5 tokens in one micro-batch or four, with every term on: same loss, same gradient."""
    torch.manual_seed(0)
    lengths = [3, 1, 0, 5]
    cu = torch.tensor([0, 3, 4, 4, 9])
    draw = [torch.randn(9, dtype=torch.float64) - 2 for _ in range(5)]
    advantages, kept = torch.randn(4, dtype=torch.float64), torch.tensor([True, False, True, True])
    config = ObjectiveConfig(
        aggregation=aggregation, ratio=ratio, length=7, kl_coef=0.1, entropy_coef=0.1, importance_cap=2.0, dual_clip=3.0
    )  # type: ignore[arg-type]
    logps, entropy, old, reference, rollout = draw
    logps.requires_grad_()
    entropy.requires_grad_()
    whole = Tokens(logps, entropy, old, advantages, cu, kept, reference, rollout)
    loss, _ = policy_loss(whole, Totals(3, 8), config)
    parts = []
    for b, length in enumerate(lengths):
        t, r = slice(int(cu[b]), int(cu[b + 1])), slice(b, b + 1)
        part = Tokens(
            logps[t], entropy[t], old[t], advantages[r], torch.tensor([0, length]), kept[r], reference[t], rollout[t]
        )
        parts.append(policy_loss(part, Totals(3, 8), config)[0])
    torch.testing.assert_close(sum(parts), loss)
    expected = torch.autograd.grad(loss, (logps, entropy), retain_graph=True)
    for got, want in zip(torch.autograd.grad(sum(parts), (logps, entropy)), expected, strict=True):
        torch.testing.assert_close(got, want)
