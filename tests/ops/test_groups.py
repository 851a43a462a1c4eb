"""The group mathematics: numbers worked out by hand, every backend against the float64 reference, and properties."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from backend_cases import over_wide_backends
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from g2rl_kernels import (
    GroupAdvantages,
    Shaping,
    exploration_scores,
    g2rl_advantages,
    group_advantages,
    group_similarity,
    shape_rewards,
    testing,
    use_backend,
)
from g2rl_kernels.checks import ValueChecks

# What a fp32 (fp64) backend may differ by. A cosine is a sum of products of unit vectors: 1e-6 is 16 roundings of 1.
# nu^2 = 1 - sum w S^2 inherits twice that; nu itself, a root, may be off by more near 0, so nu^2 is what is compared.
COSINE = {torch.float32: 1e-6, torch.float64: 1e-12}

# Three directions of one plane: the cosines are 24/25, -8/10 and -6/10.
PLANE = [[3.0, 4.0], [4.0, 3.0], [0.0, -2.0]]
COSINES = [[1.0, 0.96, -0.8], [0.96, 1.0, -0.6], [-0.8, -0.6, 1.0]]
# For rewards 1, -1, 1: sqrt(1 - 0.1192 0.9216 - 0.8808 0.64), sqrt(1 - (0.9216 + 0.36) / 2), and so on.
SCORES = [0.57134267927275620, 0.59933296255086788, 0.62719759100796359]


class Caller:
    """The public functions on one backend, device and dtype, from plain lists."""

    def __init__(self, backend: str | None, device: str, dtype: torch.dtype) -> None:
        self.backend, self.device, self.dtype = backend, device, dtype

    def tensor(self, values: object) -> Tensor:
        return torch.tensor(values, dtype=self.dtype, device=self.device)

    def mask(self, values: list[bool]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def offsets(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def __call__(self, function: Callable, *args: object, **options: object) -> Tensor | GroupAdvantages:
        args = tuple(self.tensor(x) if isinstance(x, list) else x for x in args)
        with use_backend(self.backend):
            return function(*args, **options)

    def check(self, found: Tensor, expected: object) -> None:
        expected = self.tensor(expected) if isinstance(expected, list) else expected
        assert found.dtype == self.dtype
        # A dozen roundings of numbers of order one, in the dtype of the result.
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[self.dtype]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def call(backend: str | None, device: str, dtype: torch.dtype) -> Caller:
    return Caller(backend, device, dtype)


# Equation 9.


@over_wide_backends("group_similarity")
def test_similarity(call: Caller) -> None:
    call.check(call(group_similarity, PLANE, 3), [COSINES])
    # Groups of one, also by offsets.
    call.check(call(group_similarity, PLANE, 1), [[[1.0]]] * 3)


@over_wide_backends("group_similarity")
def test_similarity_of_ragged_groups_is_padded_with_zeros(call: Caller) -> None:
    found = call(group_similarity, [*PLANE, [1.0, 0.0], [1.0, 1.0], [0.0, 5.0]], call.offsets([0, 3, 4, 4, 6]))
    root = math.sqrt(0.5)
    single = [[1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]
    pair = [[1.0, root, 0.0], [root, 1.0, 0.0], [0.0] * 3]
    call.check(found, [COSINES, single, [[0.0] * 3] * 3, pair])


@over_wide_backends("group_similarity")
def test_similarity_of_zero_features_is_zero(call: Caller) -> None:
    found = call(group_similarity, [[3.0, 4.0], [0.0, 0.0], [4.0, 3.0]], 3)
    call.check(found, [[[1.0, 0.0, 0.96], [0.0, 0.0, 0.0], [0.96, 0.0, 1.0]]])
    call.check(call(group_similarity, [[0.0, 0.0]] * 2, 2), [[[0.0, 0.0], [0.0, 0.0]]])


@over_wide_backends("group_similarity", "exploration_scores", "shape_rewards", "group_advantages")
def test_no_responses_and_no_groups(call: Caller) -> None:
    nothing = torch.zeros(0, dtype=call.dtype, device=call.device)
    features = nothing.view(0, 4)
    assert call(group_similarity, features, call.offsets([0])).shape == (0, 0, 0)
    assert call(group_similarity, features, call.offsets([0, 0])).shape == (1, 0, 0)
    for groups in (call.offsets([0]), call.offsets([0, 0]), 4):
        S = call(group_similarity, features, groups)
        assert call(exploration_scores, S, nothing, groups).numel() == 0
        assert call(shape_rewards, nothing, nothing, groups).numel() == 0
        assert call(group_advantages, nothing, groups).numel() == 0


# Equations 10 and 11.


@over_wide_backends("exploration_scores")
def test_scores(call: Caller) -> None:
    call.check(call(exploration_scores, [COSINES], [1.0, -1.0, 1.0], 3), SCORES)
    # Equal rewards weigh peers alike: 1 - (0.9216 + 0.64) / 2 = 0.2192, 1 - (0.9216 + 0.36) / 2 = 0.3592, 1 - 1 / 2.
    expected = [math.sqrt(0.2192), math.sqrt(0.3592), math.sqrt(0.5)]
    call.check(call(exploration_scores, [COSINES], [0.1] * 3, 3), expected)


@over_wide_backends("exploration_scores")
def test_scores_of_ragged_groups(call: Caller) -> None:
    S = [COSINES, [[1.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0] * 3], [[1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]]
    groups = call.offsets([0, 3, 5, 6])
    # A pair has one peer each, of weight 1, whatever it earned; a group of one has none.
    call.check(call(exploration_scores, S, [1.0, -1.0, 1.0, 1.0, -1.0, 1.0], groups), [*SCORES, 0.8, 0.8, 0.0])


@over_wide_backends("exploration_scores")
def test_scores_of_parallel_and_orthogonal_responses(call: Caller) -> None:
    ones = [[[1.0, -1.0], [-1.0, 1.0]]]
    assert call(exploration_scores, ones, [1.0, 1.0], 2).tolist() == [0.0, 0.0]
    assert call(exploration_scores, [[[1.0, 0.0], [0.0, 1.0]]], [1.0, 1.0], 2).tolist() == [1.0, 1.0]
    # Cosines beyond 1 by rounding must not reach the root.
    above = 1 + 4 * torch.finfo(call.dtype).eps
    assert call(exploration_scores, [[[1.0, above], [above, 1.0]]], [1.0, 1.0], 2).tolist() == [0.0, 0.0]


@over_wide_backends("exploration_scores")
def test_scores_of_large_rewards(call: Caller) -> None:
    """exp(1000) is no number and exp(-1000) is 0; the softmax over peers is fine, whatever oneself earned."""
    heavier = 1 / (1 + math.exp(-1))
    third = math.sqrt(1 - heavier * 0.64 - (1 - heavier) * 0.36)
    call.check(call(exploration_scores, [COSINES], [1000.0, 999.0, -1000.0], 3), [0.28, 0.28, third])
    first = math.sqrt(1 - heavier * 0.64 - (1 - heavier) * 0.9216)
    call.check(call(exploration_scores, [COSINES], [1000.0, -1000.0, -999.0], 3), [first, 0.28, 0.6])


@over_wide_backends("exploration_scores")
def test_invalid_responses_are_no_peers(call: Caller) -> None:
    valid = call.mask([True, True, False])
    # One valid peer each is left: sqrt(1 - 0.9216) = 0.28.
    call.check(call(exploration_scores, [COSINES], [1.0, -1.0, 1.0], 3, valid), [0.28, 0.28, 0.0])
    # Without a mask a response without gradient is told by its similarity to itself.
    S = [[[1.0, 0.0, -0.8], [0.0, 0.0, 0.0], [-0.8, 0.0, 1.0]]]
    call.check(call(exploration_scores, S, [1.0, -1.0, 1.0], 3), [0.6, 0.0, 0.6])
    # One valid response has no peer, none has none.
    assert call(exploration_scores, S, [1.0] * 3, 3, call.mask([True, False, False])).tolist() == [0.0] * 3
    assert call(exploration_scores, S, [1.0] * 3, 3, call.mask([False] * 3)).tolist() == [0.0] * 3


# Equations 12 and 13.

RAW = [1.0, -1.0, 1.0, -1.0]
NU = [0.2, 0.4, 0.6, 0.3]  # min-max inside the group: 0, 1/2, 1, 1/4


@over_wide_backends("shape_rewards")
@pytest.mark.parametrize(
    ("shaping", "expected"),
    [
        (None, [1.0, -1.5, 2.0, -1.25]),
        (Shaping(), [1.0, -1.5, 2.0, -1.25]),
        (Shaping(strength=0.0), RAW),
        (Shaping(strength=0.1), [1.0, -1.05, 1.1, -1.025]),
        (Shaping(strength=10.0), [1.0, -3.0, 3.0, -3.0]),
        (Shaping(strength=10.0, clip=7.0), [1.0, -6.0, 7.0, -3.5]),
        (Shaping(rule="centered"), [0.0, -1.0, 2.0, -0.5]),
        (Shaping(rule="centered", strength=0.5), [0.5, -1.0, 1.5, -0.75]),
        (Shaping(rule="literal"), [1.0, -0.5, 2.0, -0.75]),
        (Shaping(rule="literal", strength=10.0), [1.0, 3.0, 3.0, 1.5]),
        (Shaping(clip=0.5), RAW),
        (Shaping(clip=math.inf, strength=100.0), [1.0, -51.0, 101.0, -26.0]),
        (Shaping(min_range=0.41), RAW),
        (Shaping(min_range=0.39), [1.0, -1.5, 2.0, -1.25]),
    ],
    ids=str,
)
def test_shaped_rewards(call: Caller, shaping: Shaping | None, expected: list[float]) -> None:
    call.check(call(shape_rewards, RAW, NU, 4, shaping), expected)


@over_wide_backends("shape_rewards")
def test_scores_that_span_just_min_range_shape(call: Caller) -> None:
    call.check(call(shape_rewards, [1.0, -1.0, 1.0], [0.25, 0.5, 0.75], 3, Shaping(min_range=0.5)), [1.0, -1.5, 2.0])


@over_wide_backends("shape_rewards")
def test_rewards_beyond_the_clip_stay_apart(call: Caller) -> None:
    """Of other sizes than -1 and +1, say a length: shaping moves none further out, and makes none alike."""
    rewards = [-20.0, -7.0, 2.0, 12.0]
    call.check(call(shape_rewards, rewards, NU, 4), [-20.0, -7.0, 3.0, 12.0])
    call.check(call(shape_rewards, rewards, NU, 4, Shaping(rule="centered")), [0.0, -7.0, 3.0, 6.0])


@over_wide_backends("shape_rewards")
def test_minmax_stays_inside_the_group(call: Caller) -> None:
    rewards, scores = [*RAW, 1.0, 1.0, -1.0], [*NU, 0.9, 0.5, 0.7]
    found = call(shape_rewards, rewards, scores, call.offsets([0, 4, 4, 6, 7]))
    # The pair's nubar is 1 and 0; a group of one has no spread.
    call.check(found, [1.0, -1.5, 2.0, -1.25, 2.0, 1.0, -1.0])


@over_wide_backends("shape_rewards")
def test_invalid_responses_keep_their_reward(call: Caller) -> None:
    valid = call.mask([True, True, False, True])
    # Min and max over 0.2, 0.4, 0.3; the invalid reward is not clipped either.
    found = call(shape_rewards, [1.0, -1.0, 9.0, -1.0], NU, 4, Shaping(clip=1.6), valid)
    call.check(found, [1.0, -1.6, 9.0, -1.5])
    assert call(shape_rewards, RAW, NU, 4, None, call.mask([False] * 4)).tolist() == RAW


@over_wide_backends("shape_rewards", "group_advantages")
def test_groups_of_equal_rewards(call: Caller) -> None:
    """`shape` tells their members apart by novelty, `drop` leaves them without advantage; mixed groups are the same."""
    rewards, scores = [0.1, 0.1, 0.1, 1.0, -1.0, 1.0], [0.2, 0.4, 0.6] * 2
    mixed = [1.0, -1.5, 2.0]
    call.check(call(shape_rewards, rewards, scores, 3, Shaping(uniform_groups="shape")), [0.1, 0.15, 0.2, *mixed])
    dropped = call(shape_rewards, rewards, scores, 3, Shaping(uniform_groups="drop"))
    call.check(dropped, [0.1, 0.1, 0.1, *mixed])
    assert call(group_advantages, dropped[:3], 3).tolist() == [0.0] * 3
    # An invalid response's reward makes a group no less uniform.
    valid = call.mask([True, True, False])
    found = call(shape_rewards, [1.0, 1.0, -1.0], scores[:3], 3, Shaping(uniform_groups="drop"), valid)
    assert found.tolist() == [1.0, 1.0, -1.0]


@over_wide_backends("g2rl_advantages")
def test_near_identical_responses_keep_their_rewards(call: Caller) -> None:
    """Noise of 1e-3 makes scores of 1e-3, which min-max would blow up to the whole of [0, 1]."""
    random = torch.Generator().manual_seed(0)
    base = torch.randn(64, generator=random, dtype=torch.float64)
    features = base + 1e-3 * torch.randn(8, 64, generator=random, dtype=torch.float64)
    result = call(g2rl_advantages, features.to(call.device, call.dtype), [1.0, -1.0] * 4, 8)
    assert 1e-4 < float(result.scores.max()) < 5e-3
    assert result.shaped_rewards.tolist() == [1.0, -1.0] * 4
    unguarded = call(g2rl_advantages, features.to(call.device, call.dtype), [1.0, -1.0] * 4, 8, Shaping(min_range=0.0))
    assert float(unguarded.shaped_rewards.abs().max()) == 2.0


@over_wide_backends("shape_rewards")
def test_equal_scores_keep_rewards_even_without_min_range(call: Caller) -> None:
    for shaping in (Shaping(min_range=0.0), Shaping(min_range=0.0, rule="centered"), Shaping(min_range=0.0, clip=0.5)):
        assert call(shape_rewards, RAW, [0.3] * 4, 4, shaping).tolist() == RAW


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
@pytest.mark.parametrize("function", ["shape_rewards", "g2rl_advantages"])
def test_zero_one_rewards_warn(function: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are shaped: scores alone, and a strength of 0, change no reward. Late, as on a GPU."""
    monkeypatch.setattr(ValueChecks, "_is_late", lambda checks, tensor: late)

    def run(rewards: list[float], strength: float = 1.0) -> None:
        r, shaping = torch.tensor(rewards), Shaping(strength=strength)
        scores = exploration_scores(torch.tensor([COSINES]), r, 3)
        if function == "shape_rewards":
            shape_rewards(r, scores, 3, shaping)
        else:
            g2rl_advantages(torch.tensor(PLANE), r, 3, shaping)

    with pytest.warns(UserWarning, match="found only 0 and 1") as warned:
        run([0, 1, 1])
    assert [w.filename for w in warned] == [__file__], "it points to the caller"
    assert "reward_range" not in str(warned[0].message), "an option of integrations, which say it themselves"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run([0, 1, 1], strength=0)
        for rewards in ([-1, 1, 1], [1, 1, 1], [0, 0, 0], [0.0, 0.5, 1.0], [0, 1, 2]):
            run(rewards)


# Equation 2.


@over_wide_backends("group_advantages")
def test_advantages(call: Caller) -> None:
    rewards = [1.0, 2.0, 3.0, 6.0]  # mean 3, variance 14 / 4
    deviation = math.sqrt(3.5 + 1e-6)
    call.check(call(group_advantages, rewards, 4), [-2 / deviation, -1 / deviation, 0.0, 3 / deviation])
    call.check(call(group_advantages, rewards, 4, "none"), [-2.0, -1.0, 0.0, 3.0])
    ragged = call(group_advantages, [*rewards, 7.0, 1.0, -1.0], call.offsets([0, 4, 4, 5, 7]), "none")
    call.check(ragged, [-2.0, -1.0, 0.0, 3.0, 0.0, 1.0, -1.0])


@over_wide_backends("group_advantages")
@pytest.mark.parametrize("value", [0.1, -1.0, 1 / 3, 1e3, 0.0])
@pytest.mark.parametrize("m", [1, 3, 7])
def test_equal_rewards_have_no_advantage_at_all(call: Caller, value: float, m: int) -> None:
    """Exactly 0: a mean off by a rounding would be divided by sqrt(1e-6)."""
    for normalize in ("std", "none"):
        assert (
            call(group_advantages, [value] * m + [1.0, 2.0], call.offsets([0, m, m + 2]), normalize)[:m].tolist()
            == [0.0] * m
        )


def test_dtypes_of_rewards() -> None:
    for rewards in (torch.tensor([1, 0]), torch.tensor([True, False]), torch.tensor([1.0, 0.0]).bfloat16()):
        found = group_advantages(rewards, 2, "none")
        assert found.dtype == torch.float32
        assert found.tolist() == [0.5, -0.5]
    assert group_advantages(torch.tensor([1.0, 0.0]).double(), 2).dtype == torch.float64
    assert shape_rewards(torch.tensor([1, -1]), torch.tensor([0.0, 1.0]), 2).tolist() == [1.0, -2.0]
    with FakeTensorMode():  # compiled programs rely on these
        similarity, rewards = torch.ones(1, 2, 2), torch.ones(2).double()
        assert exploration_scores(similarity, rewards, 2).dtype == torch.float32
        assert all(x.dtype == torch.float32 for x in g2rl_advantages(torch.ones(2, 3), rewards, 2))


# All in one.


@over_wide_backends("g2rl_advantages")
def test_everything_at_once(call: Caller) -> None:
    """The plane's three directions, a response without gradient beside them, and a group of one."""
    features = [*PLANE, [0.0, 0.0], [1.0, 2.0]]
    result = call(g2rl_advantages, features, [1.0, -1.0, 1.0, 1.0, -1.0], call.offsets([0, 4, 5]))
    call.check(result.scores, [*SCORES, 0.0, 0.0])
    middle = 1 + (SCORES[1] - SCORES[0]) / (SCORES[2] - SCORES[0])
    shaped = [1.0, -middle, 2.0, 1.0]
    call.check(result.shaped_rewards, [*shaped, -1.0])
    mean = sum(shaped) / 4
    deviation = math.sqrt(sum((r - mean) ** 2 for r in shaped) / 4 + 1e-6)
    call.check(result.advantages, [*((r - mean) / deviation for r in shaped), 0.0])
    S = torch.zeros(2, 4, 4, dtype=call.dtype, device=call.device)
    S[0, :3, :3] = call.tensor(COSINES)
    S[1, 0, 0] = 1
    call.check(result.similarity, S)


@over_wide_backends("g2rl_advantages")
def test_nothing_at_once(call: Caller) -> None:
    nothing = torch.zeros(0, dtype=call.dtype, device=call.device)
    for groups, G, m in ((call.offsets([0]), 0, 0), (call.offsets([0, 0]), 1, 0), (4, 0, 4)):
        result = call(g2rl_advantages, nothing.view(0, 3), nothing, groups)
        assert [list(x.shape) for x in result] == [[0], [0], [0], [G, m, m]]
    # Responses, none of which has a gradient: rewards stay, and GRPO's advantages remain.
    result = call(g2rl_advantages, [[0.0, 0.0]] * 3, [1.0, -1.0, 0.0], 3, normalize="none")
    assert result.scores.tolist() == [0.0] * 3
    assert result.shaped_rewards.tolist() == result.advantages.tolist() == [1.0, -1.0, 0.0]


@over_wide_backends("g2rl_advantages")
@pytest.mark.parametrize("value", [0.1, -1.0, 1 / 3, 1e3])
def test_equal_shaped_rewards_have_no_advantage_at_all(call: Caller, value: float) -> None:
    shaping = Shaping(uniform_groups="drop")
    result = call(g2rl_advantages, [*PLANE, *PLANE], [value] * 3 + [1.0, -1.0, 1.0], 3, shaping)
    assert result.advantages[:3].tolist() == [0.0] * 3
    call.check(result.scores[3:], SCORES)
    call.check(result.shaped_rewards[:3], [value] * 3)


@over_wide_backends("g2rl_advantages")
def test_unwritten_memory_is_not_read(call: Caller, poisoned_memory: None) -> None:
    features = [*PLANE, [0.0, 0.0], [1.0, 2.0]]
    result = call(g2rl_advantages, features, [1.0, -1.0, 1.0, 1.0, -1.0], call.offsets([0, 4, 4, 5]))
    assert all(bool(x.isfinite().all()) for x in result)
    call.check(result.scores, [*SCORES, 0.0, 0.0])


def random_groups(seed: int, sizes: list[int], d: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, d], rewards of -1 and +1 [B], and offsets, float64; every fifth response without gradient."""
    random = torch.Generator().manual_seed(seed)
    B = sum(sizes)
    features = torch.randn(B, d, generator=random, dtype=torch.float64)
    features[3::5] = 0
    rewards = torch.randint(0, 2, (B,), generator=random).double() * 2 - 1
    return features, rewards, torch.tensor([0, *sizes]).cumsum(0)


@over_wide_backends("g2rl_advantages")
@pytest.mark.parametrize("sizes", [[16] * 4, [1, 9, 0, 5, 2], [1], [33]], ids=str)
@pytest.mark.parametrize(
    "shaping",
    [
        Shaping(),
        Shaping(rule="centered"),
        Shaping(rule="literal"),
        Shaping(clip=1.5),
        Shaping(strength=0.1, min_range=0.0),
        Shaping(min_range=0.2),
        Shaping(uniform_groups="drop"),
    ],
    ids=str,
)
@pytest.mark.parametrize("normalize", ["std", "none"])
def test_backends_agree_with_the_reference(call: Caller, sizes: list[int], shaping: Shaping, normalize: str) -> None:
    features, rewards, groups = random_groups(len(sizes), sizes)
    rewards[int(groups[-2]) :] = 1
    features, rewards, groups = features.to(call.device, call.dtype), rewards.to(call.device), groups.to(call.device)
    valid = torch.arange(rewards.shape[0], device=call.device) % 7 != 6
    with use_backend("reference"):
        expected = g2rl_advantages(features.double(), rewards, groups, shaping, valid, normalize=normalize)
    found = call(g2rl_advantages, features, rewards, groups, shaping, valid, normalize=normalize)
    tolerance = COSINE[call.dtype]
    torch.testing.assert_close(found.similarity.double(), expected.similarity, rtol=0, atol=tolerance)
    torch.testing.assert_close(found.scores.double() ** 2, expected.scores**2, rtol=0, atol=2 * tolerance)
    # Scores here are above 0.5 and span over 0.01 or nothing, so that nubar is off by 2 (2 tolerance / 2 nu) / 0.01 at
    # most: 400 times the tolerance. r~ is off by as much, and A by 4 times that for its own error and the mean's.
    for g in range(len(sizes)):
        members = expected.scores[int(groups[g]) : int(groups[g + 1])]
        members = members[members > 0]
        assert members.numel() < 3 or (float(members.min()) > 0.5 and float(members.max() - members.min()) > 0.01)
    torch.testing.assert_close(found.shaped_rewards.double(), expected.shaped_rewards, rtol=0, atol=400 * tolerance)
    torch.testing.assert_close(found.advantages.double(), expected.advantages, rtol=0, atol=1600 * tolerance)


any_size = pytest.mark.parametrize(
    ("sizes", "d"),
    [
        ([40, 3, 0, 17, 1], 301),  # groups of several blocks of 16 and of parts of one; columns that fill no vector
        ([130], 128),  # one group alone, which threads share
        ([2, 2], 3),  # fewer columns than a vector has
    ],
    ids=str,
)


def long_and_short(call: Caller, sizes: list[int], d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features 1e-18 to 1e30 long: fp32 holds them, and not their squares."""
    features, rewards, groups = random_groups(0, sizes, d)
    lengths = torch.tensor([1e-18, 1.0, 1e30], dtype=torch.float64).repeat(len(features))[: len(features), None]
    return (features * lengths).to(call.device, call.dtype), rewards.to(call.device), groups.to(call.device)


@over_wide_backends("g2rl_advantages")
@any_size
def test_cosines_of_any_size(call: Caller, sizes: list[int], d: int) -> None:
    features, rewards, groups = long_and_short(call, sizes, d)
    found = call(g2rl_advantages, features, rewards, groups).similarity
    for own, m, S in zip(features.split(sizes), sizes, found, strict=True):
        u = F.normalize(own.double(), dim=1, eps=1e-300)
        torch.testing.assert_close(S[:m, :m].double(), u @ u.mT, rtol=0, atol=COSINE[call.dtype])
        assert S[m:].count_nonzero() == S[:, m:].count_nonzero() == 0


@pytest.mark.skipif(
    "native" not in testing.available_backends("cpu", torch.float32, ("g2rl_advantages",)), reason="not compiled"
)
@any_size
def test_bits_depend_on_the_group_alone(sizes: list[int], d: int) -> None:
    """Not on other groups, the number of threads, nor, for cosines, the order of members."""
    call = Caller("native", "cpu", torch.float32)
    features, rewards, groups = long_and_short(call, sizes, d)
    together = call(g2rl_advantages, features, rewards, groups)
    threads = torch.get_num_threads()
    starts = groups.tolist()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        for x, y in zip(call(g2rl_advantages, features, rewards, groups), together, strict=True):
            assert torch.equal(x, y)
        for start, m, S in zip(starts, sizes, together.similarity, strict=False):
            if m == 0:
                continue
            own = slice(start, start + m)
            *alone, cosines = call(g2rl_advantages, features[own], rewards[own], m)
            assert torch.equal(cosines[0], S[:m, :m])
            for x, y in zip(alone, together[:3], strict=True):
                assert torch.equal(x, y[own])
            backwards = call(g2rl_advantages, features[own].flip(0), rewards[own].flip(0), m).similarity[0]
            assert torch.equal(backwards, S[:m, :m].flip(0, 1))
    finally:
        torch.set_num_threads(threads)


@over_wide_backends("group_similarity")
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "ragged"])
def test_gradient_of_similarity(call: Caller, equal: bool) -> None:
    sizes = [3, 3] if equal else [3, 1, 0, 2]
    features, _, groups = random_groups(0, sizes, d=4)
    groups = 3 if equal else groups.to(call.device)
    if call.dtype == torch.float64:
        # Finite differences do not exist at zero features: the gradient there is 0 by definition.
        smooth = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(call.device)
        assert torch.autograd.gradcheck(lambda x: call(group_similarity, x, groups), smooth.requires_grad_())
    leaf = features.to(call.device, call.dtype).requires_grad_()
    S = call(group_similarity, leaf, groups)
    upstream = torch.randn(S.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(call.device)
    S.backward(upstream.to(call.dtype))
    assert leaf.grad[3].tolist() == [0.0] * 4
    # Plain PyTorch, group by group.
    plain = features.to(call.device).requires_grad_()
    start, loss = 0, plain.new_zeros(())
    for g, m in enumerate(sizes):
        u = F.normalize(plain[start : start + m], dim=1, eps=1e-300)
        loss = loss + (upstream[g, :m, :m] * (u @ u.mT)).sum()
        start += m
    (expected,) = torch.autograd.grad(loss, plain)
    nonzero = [0, 1, 2, 4, 5]
    torch.testing.assert_close(
        leaf.grad[nonzero].double(),
        expected[nonzero],
        rtol=0,
        atol=10 * COSINE[call.dtype] * float(expected.abs().max()),
    )


@over_wide_backends("group_similarity")
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "ragged"])
def test_no_gradient_of_similarity_reaches_another_group(call: Caller, equal: bool) -> None:
    """Neither of a NaN in features, nor of what comes back for the zeros beyond a group's size."""
    features = random_groups(0, [6], d=4)[0].to(call.device, call.dtype)
    groups = 3 if equal else call.offsets([0, 2, 6])
    first = 3 if equal else 2
    clean, spoilt = features.clone().requires_grad_(), features.clone()
    spoilt[0, 0] = torch.nan
    spoilt.requires_grad_()
    for leaf in (clean, spoilt):
        S = call(group_similarity, leaf, groups)
        upstream = torch.ones_like(S)
        upstream[0, first:] = torch.nan
        upstream[0, :, first:] = torch.inf
        S.backward(upstream)
    assert bool(clean.grad.isfinite().all()) and bool(spoilt.grad[:first].isnan().any())
    assert torch.equal(spoilt.grad[first:], clean.grad[first:])


def test_scores_and_advantages_are_data() -> None:
    features, rewards, groups = random_groups(1, [4, 4])
    features.requires_grad_()
    rewards.requires_grad_()
    result = g2rl_advantages(features, rewards, groups)
    assert not any(x.requires_grad for x in result)
    S = group_similarity(features, groups)
    assert S.requires_grad
    assert not exploration_scores(S, rewards, groups).requires_grad
    assert not shape_rewards(rewards, result.scores.requires_grad_(), groups).requires_grad
    assert not group_advantages(rewards, groups).requires_grad


# Properties.

sizes_of_groups = st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 0)
any_reward = st.one_of(
    st.sampled_from([-1.0, 1.0]), st.floats(-1e3, 1e3, allow_subnormal=False), st.sampled_from([-1e3, 0.0, 0.1, 1e3])
)
shapings = st.builds(
    Shaping,
    strength=st.floats(0, 20),
    clip=st.floats(0.1, 10),
    rule=st.sampled_from(["scale", "centered", "literal"]),
    min_range=st.sampled_from([0.0, 1e-2, 0.1]),
    uniform_groups=st.sampled_from(["shape", "drop"]),
)
few = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Features with zero, parallel, opposite and nearly parallel rows, 1e-12 to 1e12 long; rewards; offsets; sizes."""
    sizes = draw(sizes_of_groups)
    B, d = sum(sizes), draw(st.integers(1, 7))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    features = torch.randn(B, d, generator=random, dtype=torch.float64)
    for i in range(B):
        relation = draw(st.sampled_from(["free", "free", "free", "zero", "parallel", "opposite", "near"]))
        other = features[draw(st.integers(0, B - 1))].clone()
        if relation == "zero":
            features[i] = 0
        elif relation == "near":
            features[i] = other * (1 + 1e-6) + 1e-4 * features[i]
        elif relation != "free":
            features[i] = -other if relation == "opposite" else other
    lengths = 10.0 ** torch.tensor(draw(st.lists(st.integers(-12, 12), min_size=B, max_size=B)), dtype=torch.float64)
    rewards = torch.tensor(draw(st.lists(any_reward, min_size=B, max_size=B)), dtype=torch.float64)
    return features * lengths[:, None], rewards, torch.tensor([0, *sizes]).cumsum(0), sizes


def on(call: Caller, problem: tuple[Tensor, Tensor, Tensor, list[int]]) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    features, rewards, groups, sizes = problem
    return (
        features.to(call.device, call.dtype),
        rewards.to(call.device, call.dtype),
        groups.to(call.device),
        sizes,
    )


# Rewards of 0 and 1 alone may turn up, and warn.
@over_wide_backends("g2rl_advantages")
@pytest.mark.filterwarnings("ignore:rewards. found only 0 and 1")
@given(problem=problems(), shaping=shapings)
@few
def test_results_are_in_range(
    backend: str | None,
    device: str,
    dtype: torch.dtype,
    problem: tuple[Tensor, Tensor, Tensor, list[int]],
    shaping: Shaping,
) -> None:
    call = Caller(backend, device, dtype)
    features, rewards, groups, sizes = on(call, problem)
    result = call(g2rl_advantages, features, rewards, groups, shaping)
    assert all(bool(x.isfinite().all()) for x in result)
    # A unit vector's length is rounded: its cosine with itself is 1 to COSINE.
    assert float(result.similarity.abs().max()) <= 1 + COSINE[dtype]
    assert float(result.scores.min()) >= 0
    assert float(result.scores.max()) <= 1
    assert bool((result.shaped_rewards.abs() <= rewards.abs().clamp(min=shaping.clip)).all())
    if shaping.rule == "scale":
        assert torch.equal(result.shaped_rewards.sign(), rewards.sign())
    # Advantages of a group sum to 0, but for a few roundings of the mean, of each difference and of each quotient.
    for A, r in zip(result.advantages.double().split(sizes), result.shaped_rewards.double().split(sizes), strict=True):
        if len(A):
            deviation = float((r.var(correction=0) + 1e-6).sqrt())
            rounding = 4 * len(A) * testing.ROUNDOFF[dtype] * float(r.abs().max() / deviation + A.abs().max())
            assert abs(float(A.sum())) <= rounding


@over_wide_backends("group_similarity", "exploration_scores")
@pytest.mark.filterwarnings("ignore:rewards. found only 0 and 1")
@given(problem=problems(), seed=st.integers(0, 2**32 - 1))
@few
def test_scores_depend_on_directions_alone(
    backend: str | None, device: str, dtype: torch.dtype, problem: tuple[Tensor, Tensor, Tensor, list[int]], seed: int
) -> None:
    """Invariant to the length of each feature, and to a rotation of all."""
    call = Caller(backend, device, dtype)
    features, rewards, groups, _ = on(call, problem)
    features = F.normalize(features.double(), dim=1).to(dtype)
    random = torch.Generator().manual_seed(seed)
    factors = 10.0 ** torch.randint(-8, 9, (features.shape[0], 1), generator=random).to(device, torch.float64)
    d = features.shape[1]
    rotation = torch.linalg.qr(torch.randn(d, d, generator=random, dtype=torch.float64))[0].to(device)
    S = call(group_similarity, features, groups)
    nu = call(exploration_scores, S, rewards, groups)
    for same in (features * factors, features.double() @ rotation):
        # Rounding the changed features turns them by COSINE at most.
        S_same = call(group_similarity, same.to(dtype), groups)
        torch.testing.assert_close(S_same, S, rtol=0, atol=2 * COSINE[dtype])
        nu_same = call(exploration_scores, S_same, rewards, groups)
        torch.testing.assert_close(nu_same**2, nu**2, rtol=0, atol=8 * COSINE[dtype])


@over_wide_backends("g2rl_advantages")
@pytest.mark.filterwarnings("ignore:rewards. found only 0 and 1")
@given(problem=problems(), seed=st.integers(0, 2**32 - 1))
@few
def test_groups_are_independent_and_members_interchangeable(
    backend: str | None, device: str, dtype: torch.dtype, problem: tuple[Tensor, Tensor, Tensor, list[int]], seed: int
) -> None:
    call = Caller(backend, device, dtype)
    features, rewards, groups, sizes = on(call, problem)
    random = torch.Generator().manual_seed(seed)
    together = call(g2rl_advantages, features, rewards, groups)
    starts = groups.tolist()
    order = torch.cat([s + torch.randperm(m, generator=random) for s, m in zip(starts, sizes, strict=False)]).to(device)
    permuted = call(g2rl_advantages, features[order], rewards[order], groups)
    torch.testing.assert_close(permuted.scores**2, together.scores[order] ** 2, rtol=0, atol=4 * COSINE[dtype])
    for g, m in enumerate(sizes):
        if m == 0:
            continue
        own = slice(starts[g], starts[g] + m)
        alone = call(g2rl_advantages, features[own], rewards[own], m)
        torch.testing.assert_close(alone.scores**2, together.scores[own] ** 2, rtol=0, atol=4 * COSINE[dtype])
        torch.testing.assert_close(alone.similarity[0], together.similarity[g, :m, :m], rtol=0, atol=2 * COSINE[dtype])
        assert together.similarity[g, m:].count_nonzero() == together.similarity[g, :, m:].count_nonzero() == 0
        # Shaping has a step at min_range and divides by the span: shaped rewards are compared away from both.
        span = float(together.scores[own].max() - together.scores[own].min())
        if span > 0.1 and float(together.scores[own].min()) > 0.1:
            # nu off by 4 COSINE / (2 nu), nubar by twice that over the span, r~ by as much relative to r; A by that
            # relative to the largest reward over the deviation, at least sqrt(1e-6).
            relative = 400 * COSINE[dtype]
            largest = float(rewards[own].abs().max())
            for found in (alone.shaped_rewards, permuted.shaped_rewards[torch.argsort(order)][own]):
                torch.testing.assert_close(found, together.shaped_rewards[own], rtol=0, atol=relative * largest)


@given(problem=problems(), shaping=shapings, normalize=st.sampled_from(["std", "none"]), masked=st.booleans())
@few
@pytest.mark.filterwarnings("ignore:rewards. found only 0 and 1")
@pytest.mark.parametrize("backend", testing.available_backends("cpu", torch.float64, ("g2rl_advantages",)))
def test_one_op_equals_the_composition(
    backend: str, problem: tuple[Tensor, Tensor, Tensor, list[int]], shaping: Shaping, normalize: str, masked: bool
) -> None:
    """In float64, where what the composition rounds between its steps does not matter away from nu = 0."""
    call, automatic = Caller(backend, "cpu", torch.float64), Caller(None, "cpu", torch.float64)
    features, rewards, groups, _ = on(call, problem)
    valid = torch.arange(rewards.shape[0]) % 3 != 1 if masked else None
    usable = (features != 0).any(1) if valid is None else (features != 0).any(1) & valid
    S = automatic(group_similarity, features, groups)
    nu = automatic(exploration_scores, S, rewards, groups, usable)
    shaped = automatic(shape_rewards, rewards, nu, groups, shaping, usable)
    result = call(g2rl_advantages, features, rewards, groups, shaping, valid, normalize=normalize)
    torch.testing.assert_close(result.similarity, S, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.scores**2, nu**2, rtol=0, atol=1e-12)
    # What follows has steps; a score that rounding could carry over one is not compared.
    assume(torch.equal(result.scores, nu))
    exact = {"rtol": 1e-12, "atol": 0.0}
    torch.testing.assert_close(result.shaped_rewards, shaped, **exact)
    A = automatic(group_advantages, result.shaped_rewards, groups, normalize)
    torch.testing.assert_close(result.advantages, A, rtol=1e-12, atol=1e-12 * float(A.abs().max()))
