"""The loss against hand-computed numbers, and the methods against the kernels they are composed of."""

from __future__ import annotations

import math

import pytest
import torch

from g2rl.config import Config, ObjectiveConfig, load_config
from g2rl.geometry import geometry_metrics, pair_cosines
from g2rl.objective import METHODS, policy_loss
from g2rl_kernels import Shaping, g2rl_advantages, group_advantages

CU = torch.tensor([0, 2, 3])


def test_loss_by_hand() -> None:
    """Two responses of 2 and 1 tokens; ratios 1.5 (clipped to 1.2), 0.5, 0.5 (clipped to 0.8 where A < 0)."""
    old = torch.tensor([-1.0, -2.0, -3.0])
    logps = (old + torch.tensor([1.5, 0.5, 0.5]).log()).requires_grad_()
    loss, terms = policy_loss(logps, old, None, torch.tensor([2.0, -1.0]), CU, ObjectiveConfig())
    # Response 1: mean of -min(1.5 * 2, 1.2 * 2) = -2.4 and -min(0.5 * 2, 0.8 * 2) = -1.
    # Response 2: -min(-0.5, -0.8) = 0.8.
    assert loss.item() == pytest.approx((-2.4 - 1.0) / 2 + 0.8)
    assert terms["ratio_clip_share"].item() == pytest.approx(0.5 + 1.0)
    loss.backward()
    # Clipped tokens have no gradient; d(-ratio A)/dlogp = -ratio A, weighed by 1 / length.
    assert logps.grad.tolist() == pytest.approx([0.0, -0.5 * 2 / 2, 0.0])


def test_clip_higher() -> None:
    old, logps = torch.zeros(1), torch.tensor([math.log(1.25)])
    cu = torch.tensor([0, 1])
    loss, terms = policy_loss(logps, old, None, torch.ones(1), cu, ObjectiveConfig(clip_high=0.28))
    assert loss.item() == pytest.approx(-1.25)
    assert terms["ratio_clip_share"].item() == 0


def test_kl_term_by_hand() -> None:
    logps = torch.tensor([-1.0, -2.0, -1.5], requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -1.5])
    loss, terms = policy_loss(logps, logps.detach(), reference, torch.zeros(2), CU, ObjectiveConfig(kl_coef=0.1))
    k3 = [math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1.0 - 1, 0.0]
    assert terms["kl"].item() == pytest.approx((k3[0] + k3[1]) / 2)
    assert loss.item() == pytest.approx(0.1 * (k3[0] + k3[1]) / 2)
    loss.backward()
    # d k3 / d logp = 1 - exp(reference - logp).
    assert logps.grad.tolist() == pytest.approx([0.05 * (1 - math.exp(-0.5)), 0.05 * (1 - math.exp(1.0)), 0.0])


def test_empty_response_weighs_nothing() -> None:
    cu = torch.tensor([0, 0, 2])
    logps = torch.tensor([-1.0, -1.0])
    loss, _ = policy_loss(logps, logps, None, torch.tensor([5.0, 1.0]), cu, ObjectiveConfig())
    assert loss.item() == pytest.approx(-1.0)


def test_methods_are_compositions_of_the_kernels() -> None:
    torch.manual_seed(0)
    features, rewards = torch.randn(8, 5), torch.tensor([1.0, -1, -1, 1, 1, 1, 1, 1])
    config = load_config(None, ["shaping.strength=0.5", "objective.normalize=none"])
    shaped = METHODS["g2rl"](features, rewards, 4, config)
    expected = g2rl_advantages(features, rewards, 4, Shaping(strength=0.5), normalize="none")
    for got, want in zip(shaped, expected, strict=True):
        assert torch.equal(got, want)
    plain = METHODS["grpo"](features, rewards, 4, config)
    assert torch.equal(plain.advantages, group_advantages(rewards, 4, "none"))
    assert torch.equal(plain.shaped_rewards, rewards)
    assert torch.equal(plain.similarity, shaped.similarity)
    assert plain.advantages[4:].eq(0).all()


def test_geometry_metrics_by_hand() -> None:
    """Group 1: unit vectors at 0, 90 and 180 degrees; group 2: two alike and one without feature."""
    features = torch.tensor([[1.0, 0], [0, 2.0], [-3.0, 0], [1.0, 1.0], [2.0, 2.0], [0, 0]])
    rewards = torch.tensor([1.0, -1, -1, 1, 1, 1])
    config = Config()
    result = METHODS["g2rl"](features, rewards, 3, config)
    metrics = geometry_metrics(features, rewards, result, 3, config)
    cosines = pair_cosines(result.similarity, torch.tensor([[True] * 3, [True, True, False]]))
    assert sorted(cosines.tolist()) == pytest.approx([-1, 0, 0, 1])
    assert metrics["geometry/mean_cosine"] == pytest.approx(0)
    assert metrics["geometry/negative_share"] == pytest.approx(0.25)
    assert metrics["geometry/zero_features"] == 1
    assert metrics["groups/zero_variance_share"] == pytest.approx(0.5)
    assert metrics["groups/degenerate_share"] == pytest.approx(0.5)
    assert metrics["geometry/feature_norm_max"] == pytest.approx(3)
