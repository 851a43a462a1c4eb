"""What the plug-in for verl does on plain tensors, against numbers by hand and a float64 reference, without verl."""

from __future__ import annotations

import importlib
import logging
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from g2rl.config import ConfigError
from g2rl.integrations.exploration import (
    Once,
    Options,
    few_responses,
    require_plain,
    reward_warnings,
    shape_by_uid,
    shape_in_range,
)
from g2rl.integrations.head_pass import predicted_response
from g2rl.integrations.section import read_options
from g2rl.integrations.verl.shaping import add_to_last, final_outputs
from g2rl.reward_range import has_unmoved_zeros, range_left
from g2rl_kernels import Shaping, g2rl_advantages, use_backend


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (None, Options()),
        ({"strength": 2, "rule": "centered"}, Options(Shaping(strength=2, rule="centered"))),
        ({"reward_range": [0, 1], "min_range": 0.0}, Options(Shaping(min_range=0.0), (0.0, 1.0))),
    ],
)
def test_options(section: dict | None, expected: Options) -> None:
    assert read_options(section) == expected


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (1, r"g2rl: expected keys and values such as g2rl\.strength=1\.0, found 1"),
        ({"lambda": 1.0}, r"g2rl\.lambda: expected one of strength, .*, reward_range; found an unknown key"),
        ({"strength": "strong"}, r"g2rl\.strength: expected a number, found 'strong'"),
        ({"strength": True}, r"g2rl\.strength: expected a number, found True"),
        ({"rule": 1}, r"g2rl\.rule: expected text, found 1"),
        ({"rule": "scales"}, r"g2rl\.rule: expected one of scale, centered, literal, found 'scales'"),
        ({"clip": 0}, r"g2rl\.clip: expected a number > 0, found 0"),
        ({"reward_range": [1, 0]}, r"g2rl\.reward_range: expected two finite numbers, the lower .* found \[1, 0\]"),
        ({"reward_range": "01"}, r"g2rl\.reward_range: expected two finite numbers, .* found '01'"),
        ({"reward_range": [False, True]}, r"g2rl\.reward_range: expected two finite numbers, .* found \[False, True\]"),
        ({"reward_range": [0, math.inf]}, r"g2rl\.reward_range: expected two finite numbers, .* found \[0, inf\]"),
        ({"reward_range": [-math.inf, 1]}, r"g2rl\.reward_range: expected two finite numbers, .* found \[-inf, 1\]"),
        ({"reward_range": [math.nan, 1]}, r"g2rl\.reward_range: expected two finite numbers, .* found \[nan, 1\]"),
    ],
)
def test_options_that_are_wrong(section: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_options(section)


def test_predicted_response() -> None:
    """Prompts of 2, 1 and 3 tokens, responses of 3 (the second a tool's), 0 and 1."""
    row = predicted_response(
        torch.tensor([0, 5, 6, 10]), mask=torch.tensor([1, 0, 1, 1]), mask_offsets=torch.tensor([0, 3, 3, 4])
    )
    assert row.tolist() == [-1, 0, -1, 0, -1, -1, -1, -1, 2, -1]


def test_final_outputs() -> None:
    """The order is any; indices are numbers, not text; ids of prompts may hold underscores."""
    keys = ["a_0_2", "a_1_0", "a_0_10", "b_b_0_0", "a_0_9", "b_b_1_0"]
    assert final_outputs(keys).tolist() == [2, 1, 2, 3, 2, 5]


def test_add_to_last() -> None:
    values = add_to_last(
        torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.tensor([0, 2, 2, 4]), torch.tensor([0.5, 9.0, -0.25])
    )
    assert values.tolist() == [0.0, 1.5, 2.0, -1.25]


@pytest.mark.parametrize("options", [Options(Shaping(min_range=0)), Options(Shaping(min_range=0), (0.0, 1.0))])
def test_groups_out_of_order(options: Options) -> None:
    """Groups of 4, 3 and 1, the second with a response without feature."""
    uids = ["q", "p", "p", "r", "q", "p", "q", "p"]
    features = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    features[4] = 0
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
    low, high = options.reward_range
    rewards = (signs + 1) / 2 * (high - low) + low
    shaped, metrics = shape_by_uid(features, rewards, uids, options)
    expected, scores = signs.double(), torch.zeros(8, dtype=torch.float64)
    cosines = []
    with use_backend("reference"):
        for rows in ([1, 2, 5, 7], [0, 4, 6], [3]):
            result = g2rl_advantages(features[rows].double(), signs[rows].double(), len(rows), options.shaping)
            expected[rows], scores[rows] = result.shaped_rewards, result.scores
            m = len(rows)
            real = [i for i, row in enumerate(rows) if row != 4]
            cosines += [float(result.similarity[0, i, j]) for i in range(m) for j in range(i) if {i, j} <= set(real)]
    torch.testing.assert_close(shaped.double(), (expected + 1) / 2 * (high - low) + low, rtol=0, atol=1e-6)
    assert float((shaped - rewards).abs().max()) > 0.1 and shaped[3] == rewards[3] and shaped[4] == rewards[4]
    assert len(cosines) == 7
    assert metrics == {
        "mean_cosine": pytest.approx(sum(cosines) / 7, abs=1e-6),
        "negative_share": pytest.approx(sum(c < 0 for c in cosines) / 7),
        "score": pytest.approx(float(scores.sum()) / 7, abs=1e-6),
        "feature_norm": pytest.approx(float(features.norm(dim=1).sum()) / 7),
        "degenerate_share": pytest.approx(2 / 3),  # the group of one, and that with two features
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward_range", [(-1.0, 1.0), (0.0, 1.0), (0.0, 3.0)])
def test_rewards_that_nothing_shapes_keep_their_bits(dtype: torch.dtype, reward_range: tuple[float, float]) -> None:
    rewards = torch.tensor([0.1, 0.3, 0.7, 1.0], dtype=dtype)
    shaped, _ = shape_in_range(torch.ones(4, 3), rewards, 4, Shaping(), reward_range)
    assert shaped.dtype == dtype and torch.equal(shaped, rewards)


def test_metrics_of_responses_that_take_part() -> None:
    features = torch.tensor([[2.0, 0.0], [0.0, 4.0], [9.0, 9.0], [0.0, 0.0]])
    rewards = torch.tensor([1.0, -1.0, 1.0, 1.0])
    valid = torch.tensor([True, True, False, True])
    _, metrics = shape_in_range(features, rewards, 4, Shaping(), (-1.0, 1.0), valid)
    assert metrics == {
        "degenerate_share": 1.0, "score": 1.0, "feature_norm": 3.0, "mean_cosine": 0.0, "negative_share": 0.0
    }  # fmt: skip
    _, metrics = shape_in_range(features, rewards, 4, Shaping(), (-1.0, 1.0), torch.zeros(4, dtype=torch.bool))
    assert metrics == {"degenerate_share": 1.0}
    _, metrics = shape_in_range(features / 16, rewards, 4, Shaping(), (-1.0, 1.0))
    assert metrics["feature_norm"] == pytest.approx((2 + 4 + 162**0.5) / 3 / 16)


def test_settings_that_have_to_be_plain() -> None:
    require_plain([("a", 1, 1), ("b", "x", "x")])
    with pytest.raises(ValueError, match="^b: expected x with G2RL, found y$"):
        require_plain([("a", 1, 1), ("b", "y", "x")])


def test_zeros_beside_negative_rewards_are_no_wrong_answers() -> None:
    assert has_unmoved_zeros(torch.tensor([0.0, 1.0]))
    assert not has_unmoved_zeros(torch.tensor([0.0, 1.0, -1.0])) and not has_unmoved_zeros(torch.tensor([1.0, 2.0]))


def test_a_thing_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    say = Once(logging.getLogger("said"))
    for message in ("of 1 (found 2)", "of 1 (found 3)", "of 2 (found 2)"):
        say(message)
    assert caplog.messages == ["of 1 (found 2)", "of 2 (found 2)"]


def test_groups_that_are_too_small_are_told() -> None:
    assert few_responses("n", 3) == ""
    assert few_responses("n", 2).startswith("n: expected 3 or more, found 2")


@pytest.mark.parametrize(
    ("reward_range", "rewards", "messages"),
    [
        ((-1.0, 1.0), [1.0, -1.0], []),
        ((-1.0, 1.0), [1.0, 0.0], ["for rewards of 0 and 1 add g2rl=..."]),
        ((-1.0, 1.0), [2.0, 0.0], ["for rewards of 0 and 1 add g2rl=...", "(-1 to 1; found 0 to 2)"]),
        ((0.0, 1.0), [1.0, -1.0], ["(0 to 1; found -1 to 1)"]),
        ((0.0, 1.0), [1.0, 0.0], []),
    ],
)
def test_rewards_that_do_not_fit_are_warned_of(
    reward_range: tuple[float, float], rewards: list[float], messages: list[str]
) -> None:
    options = Options(Shaping(), reward_range)
    found = reward_warnings(torch.tensor(rewards), options, "g2rl=...", "what tasks give")
    assert [message in text for message, text in zip(messages, found, strict=True)] == [True] * len(messages)
    assert all(text.endswith(("g2rl=...", "Set reward_range to what tasks give")) for text in found)
    assert reward_warnings(torch.tensor(rewards), replace(options, shaping=Shaping(strength=0)), "", "") == []


def test_without_strength_rewards_stay_the_same_bits() -> None:
    """Also those far outside of their range, which are clipped otherwise."""
    rewards = torch.tensor([-20.0, -0.1, 0.3, 17.0, 2.0, -3.5])
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    shaped, metrics = shape_by_uid(features, rewards, list("abaabb"), Options(Shaping(strength=0), (0.0, 0.7)))
    assert torch.equal(shaped, rewards) and metrics["score"] > 0


@pytest.mark.parametrize(
    ("rewards", "reward_range", "found"),
    [
        ([-1.0, 1.0], (-1.0, 1.0), ""),
        ([0.1 + 0.2, 1.0000001], (0.3, 1.0), ""),  # a weighted sum may be off by rounding
        ([-1.00001, 1.00001], (-1.0, 1.0), ""),
        ([1.0, 1.0001], (-1.0, 1.0), "(-1 to 1; found 1 to 1.0001)"),
        ([], (-1.0, 1.0), ""),
        ([-1.0, 1.0], (0.0, 1.0), "(0 to 1; found -1 to 1)"),
        ([-12.0, -3.0], (-1.0, 1.0), "(-1 to 1; found -12 to -3)"),
        ([0.5, 1.5], (-1.0, 1.0), "(-1 to 1; found 0.5 to 1.5)"),
    ],
)
def test_rewards_that_leave_their_range(rewards: list[float], reward_range: tuple[float, float], found: str) -> None:
    said = range_left(torch.tensor(rewards), reward_range)
    assert found in said and bool(said) == bool(found)


def test_features_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="found NaN or inf in 1 responses"):
        shape_by_uid(torch.tensor([[1.0], [torch.nan]]), torch.tensor([1.0, -1.0]), ["a", "a"], Options())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_rewards_of_any_dtype(dtype: torch.dtype) -> None:
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    rewards, options = torch.tensor([1.0, 0, 1, 0, 0, 1]), Options(reward_range=(0.0, 1.0))
    shaped, _ = shape_by_uid(features, rewards.to(dtype), list("abaabb"), options)
    assert shaped.dtype == torch.float32 and torch.equal(shaped, shape_by_uid(features, rewards, "abaabb", options)[0])


@pytest.mark.parametrize("uids", ["ab", "aabb"])
def test_another_number_of_uids(uids: str) -> None:
    """Fewer left memory that nobody wrote as the shaped rewards of the last responses."""
    with pytest.raises(ValueError, match=f"uids: expected one for each of 3 responses, found {len(uids)}"):
        shape_by_uid(torch.eye(3), torch.tensor([1.0, -1, 1]), list(uids), Options())


def test_another_number_of_rewards() -> None:
    with pytest.raises(ValueError, match=r"rewards: expected shape \[3\], found \[2\]"):
        shape_by_uid(torch.eye(3), torch.tensor([1.0, -1]), list("aab"), Options())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.eye(3).numpy()}, "features: expected a tensor, found ndarray"),
        ({"features": torch.eye(3).bfloat16()}, "features: expected dtype float32 or float64, found bfloat16"),
        ({"rewards": [1.0, -1.0, 1.0]}, "rewards: expected a tensor, found list"),
        ({"uids": ["a", "a", None]}, "uids: expected strings or ints, all of one type, found NoneType and str"),
        ({"options": Shaping()}, r"options: expected Options\(shaping, reward_range\), found Shaping"),
    ],
)
def test_arguments_of_another_type(changes: dict[str, Any], message: str) -> None:
    arguments = {"features": torch.eye(3), "rewards": torch.ones(3), "uids": ["a"] * 3, "options": Options()}
    with pytest.raises(TypeError, match=message):
        shape_by_uid(**arguments | changes)


def test_a_range_of_numpys_numbers() -> None:
    """As a data set's lowest and highest reward."""
    assert str(Options(reward_range=(np.float32(0), np.int64(1)))) == str(Options(reward_range=(0.0, 1.0)))


@pytest.mark.parametrize("reward_range", [(1.0, 0.0), (1.0, 1.0), (0.0, float("inf")), 1.0])
def test_a_range_that_is_none(reward_range: object) -> None:
    """The higher one first turned right answers into wrong ones for shaping."""
    with pytest.raises(ValueError, match="reward_range: expected two finite numbers, the lower one first, found"):
        Options(reward_range=reward_range)


def test_the_plugin_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """verl itself would keep this from its user."""
    monkeypatch.setitem(sys.modules, "verl", None)
    for name in ("plugin", "engine", "trainer"):
        monkeypatch.delitem(sys.modules, f"g2rl.integrations.verl.{name}", raising=False)
    with pytest.raises(ImportError):
        importlib.import_module("g2rl.integrations.verl.plugin")
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "there will be no trainer_mode=g2rl_sync" in caplog.text
    assert "pip install 'verl[verl-core]>=0.9.1'" in caplog.text and "ModuleNotFoundError: " in caplog.text
