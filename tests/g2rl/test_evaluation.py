"""Suites: their settings, sampling that survives a kill, scores by hand, and what is shown."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from g2rl.bootstrap import Estimate
from g2rl.cli import main
from g2rl.config import ConfigError, ModelConfig, RolloutConfig
from g2rl.evaluation.command import digest, labels
from g2rl.evaluation.results import plot_pass_at_k, read_results, write_results
from g2rl.evaluation.samples import Sample, problems_digest, provenance
from g2rl.evaluation.scores import Scores, bootstrap, score, sizes
from g2rl.evaluation.suite import read_suite
from g2rl.files import StorageError
from g2rl.model import load_model
from g2rl.rollout import TransformersSampler
from g2rl.tasks.data_sets import DATA_SETS
from g2rl.tasks.grading import ChoiceJudge, MathJudge
from g2rl.types import Problem
from tests.g2rl.conftest import build_model
from tests.g2rl.json_lines import write
from tests.g2rl.scripted_sampler import PROBLEMS, ScriptedSampler, run, settings

ROOT = Path(__file__).parents[2]


class TestSamples:
    def test_every_response_has_its_own_seed(self, tmp_path: Path) -> None:
        sampler = ScriptedSampler()
        samples = run(tmp_path / "s.jsonl", sampler)
        assert [[sample.sample for sample in row] for row in samples] == [[0, 1, 2]] * 5
        assert [row[0].problem for row in samples] == [problem.id for problem in PROBLEMS]
        assert len({seed for _, seed in sampler.drawn}) == 15
        other = ScriptedSampler()
        run(tmp_path / "other.jsonl", other, seed=1)
        assert not set(sampler.drawn) & set(other.drawn)

    def test_a_kill_at_any_byte_changes_nothing(self, tmp_path: Path) -> None:
        whole = ScriptedSampler()
        expected = run(tmp_path / "whole.jsonl", whole)
        content = (tmp_path / "whole.jsonl").read_bytes()
        lines = content.count(b"\n") - 1
        for cut in range(0, len(content) + 1, 7):
            path = tmp_path / "cut.jsonl"
            path.write_bytes(content[:cut])
            again = ScriptedSampler()
            assert run(path, again) == expected
            assert sorted(path.read_bytes().splitlines()[1:]) == sorted(content.splitlines()[1:])
            # Only batches that lack a sample are drawn again: at most one that was begun, and what comes after it.
            left = max(0, content[:cut].count(b"\n") - 1)
            assert len(again.drawn) == lines - left // 4 * 4 if left < lines else not again.drawn

    def test_killed_twice(self, tmp_path: Path) -> None:
        expected = run(tmp_path / "whole.jsonl", ScriptedSampler())
        for batches in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "killed.jsonl", ScriptedSampler(batches))
        last = ScriptedSampler()
        assert run(tmp_path / "killed.jsonl", last) == expected
        assert len(last.drawn) == 3  # 15 samples, 12 of them in the three batches before
        assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def test_blank_lines_are_no_samples(self, tmp_path: Path) -> None:
        samples = run(tmp_path / "s.jsonl", ScriptedSampler())
        with (tmp_path / "s.jsonl").open("a") as file:
            file.write("\n  \n")
        again = ScriptedSampler()
        assert run(tmp_path / "s.jsonl", again) == samples and not again.drawn

    def test_more_samples_and_problems_keep_those_there(self, tmp_path: Path) -> None:
        few = run(tmp_path / "s.jsonl", ScriptedSampler(), samples=2)
        more = run(tmp_path / "s.jsonl", ScriptedSampler(), samples=6)
        assert [row[:2] for row in more] == few
        assert more == run(tmp_path / "at-once.jsonl", ScriptedSampler(), samples=6)

    @pytest.mark.parametrize("change", [{"temperature": 0.5}, {"max_tokens": 9}, {"seed": 3}, {"batch_size": 2}])
    def test_other_settings_do_not_mix(self, tmp_path: Path, change: dict[str, Any]) -> None:
        run(tmp_path / "s.jsonl", ScriptedSampler())
        (key, value) = next(iter(change.items()))
        with pytest.raises(ConfigError, match=f"out: expected samples with {key} = {value}, found .*--out"):
            run(tmp_path / "s.jsonl", ScriptedSampler(), **change)

    def test_other_problems_or_weights_do_not_mix(self) -> None:
        chosen = settings()
        first = provenance(chosen, {"weights": "w"})
        assert first == provenance(settings(samples=9, limit=1), {"weights": "w"})
        assert first != provenance(replace(chosen, problems=problems_digest(PROBLEMS[:-1])), {"weights": "w"})
        assert first != provenance(chosen, {"weights": "v"})

    @pytest.mark.parametrize("line", ["{", "[1]", '{"problem": "a"}'])
    def test_damage_is_named_by_file_and_line(self, tmp_path: Path, line: str) -> None:
        run(tmp_path / "s.jsonl", ScriptedSampler())
        rows = (tmp_path / "s.jsonl").read_text().splitlines()
        rows[2] = line
        (tmp_path / "s.jsonl").write_text("\n".join(rows) + "\n")
        with pytest.raises(ConfigError, match="s.jsonl:3: expected a sample as a JSON object"):
            run(tmp_path / "s.jsonl", ScriptedSampler())


def test_a_seed_gives_the_same_response_in_any_batch(tiny_model: Path) -> None:
    model, tokenizer = load_model(ModelConfig(path=str(tiny_model)))
    sampler = TransformersSampler(model, tokenizer, RolloutConfig(max_new_tokens=12, dtype="float32"))

    def drawn(problems: Sequence[Problem], seeds: Sequence[int]) -> list[tuple[int, ...]]:
        return [episode.response_ids for episode in sampler.sample(problems, 1, 1.0, 1.0, seeds)]

    # Prompts of one length: padding would move sums by rounding.
    together = drawn(PROBLEMS, range(5))
    assert len(set(together)) == 5
    assert [drawn([problem], [i])[0] for i, problem in enumerate(PROBLEMS)] == together
    assert drawn(PROBLEMS[::-1], range(4, -1, -1))[::-1] == together
    sampler.config = RolloutConfig(max_new_tokens=12, dtype="float32", batch_size=2)
    assert drawn(PROBLEMS, range(5)) == together


def sample(problem: int, text: str, tokens: int = 10, finished: bool = True) -> Sample:
    return Sample(PROBLEMS[problem].id, 0, text, tokens, finished)


def test_scores_by_hand() -> None:
    samples = [
        [sample(0, r"\boxed{2}"), sample(0, "The answer is 2."), sample(0, r"\boxed{3}"), sample(0, "What?", 20)],
        [sample(1, r"\boxed{5}"), sample(1, r"\boxed{5}"), sample(1, "So it is 4", 90, False), sample(1, "4")],
    ]
    with MathJudge() as judge:
        scores = score("m", "amc23", PROBLEMS[:2], samples, judge)
    assert (scores.problems, scores.samples) == (2, 4)
    values = {mode: {key: e.value for key, e in by_key.items()} for mode, by_key in scores.metrics.items()}
    assert list(values) == ["lenient", "strict"]
    # Lenient: 2 and 1 of 4 right. Two of 4 hold a right one in 1 - C(2,2)/C(4,2) and 1 - C(3,2)/C(4,2) of the pairs.
    lenient = {"pass@1": (2 / 4 + 1 / 4) / 2, "pass@2": (5 / 6 + 3 / 6) / 2, "pass@4": 1.0, "maj@4": 0.5}
    assert {key: values["lenient"][key] for key in lenient} == pytest.approx(lenient)
    # Strict: 1 and 0 of 4; of the first problem's votes "2" and "3" are equally many.
    strict = {"pass@1": 1 / 8, "pass@2": (3 / 6) / 2, "pass@4": 0.5, "maj@4": 0.25}
    assert {key: values["strict"][key] for key in strict} == pytest.approx(strict)
    assert scores.response_length.value == pytest.approx((50 / 4 + 120 / 4) / 2)
    assert scores.truncated_share.value == pytest.approx(1 / 8)
    # Two problems: a resample holds one of them twice half of the time, so the interval spans both their values.
    pass_at_1 = scores.metrics["lenient"]["pass@1"]
    assert (pass_at_1.low, pass_at_1.high) == pytest.approx((1 / 4, 2 / 4))


def test_choices_vote_by_letter() -> None:
    problem = Problem("p", "", "B", {"options": ["Paris", "Rome", "Oslo"]})
    texts = ["The answer is (B).", "Rome", r"\boxed{C}"]
    scores = score("m", "mmlu_pro", [problem], [[Sample("p", i, text, 1, True) for i, text in enumerate(texts)]],
                   ChoiceJudge())  # fmt: skip
    assert scores.metrics["lenient"]["maj@3"].value == 1.0
    assert scores.metrics["lenient"]["pass@1"].value == pytest.approx(2 / 3)
    assert scores.metrics["strict"]["pass@3"].value == 0.0


def test_bootstrap() -> None:
    """50 of 100 right: normal intervals 0.5 +- 1.96 * 0.05; the quantiles of 2000 draws err by about 0.003 * 1.2."""
    values = np.stack([np.arange(100) % 2, np.ones(100), np.arange(100)], axis=1)
    half, one, mean = bootstrap(values)
    assert half.value == 0.5
    assert (half.low, half.high) == pytest.approx((0.402, 0.598), abs=0.015)
    assert one.value == 1.0 and np.isnan([one.low, one.high]).all()  # nothing is known of other problems
    assert mean.value == 49.5
    assert (mean.low, mean.high) == pytest.approx((49.5 - 1.96 * 2.887, 49.5 + 1.96 * 2.887), abs=0.9)
    assert bootstrap(values)[::2] == [half, mean]
    assert np.isnan([bootstrap(np.array([[0.4]]))[0].low])


def test_equal_answers_vote_together() -> None:
    """Right ones, however they are spelled, and wrong ones as well: here two against two and three against two."""
    right = [r"\boxed{\frac{\pi}{2}}", r"\boxed{\pi/2}"]
    wrong = [r"\boxed{x+1}", r"\boxed{1+x}", r"\boxed{y}", r"\boxed{\frac{2x+2}{2}}"]
    problem = Problem("p", "", r"\frac\pi2")
    with MathJudge() as judge:
        votes = [
            score("m", "amc23", [problem], [[Sample("p", i, t, 1, True) for i, t in enumerate(texts)]], judge)
            .metrics["strict"][f"maj@{len(texts)}"].value
            for texts in (right + wrong[2:], right + wrong[:3], right + wrong)
        ]  # fmt: skip
        assert votes == [1.0, 0.5, 0.0]
        many = [[r"\boxed{a}", None, "", "7", *(f"x_{i}" for i in range(40)), "a + a", "2a"]]
        (found,) = judge.votes(many, [[True] + [False] * (len(many[0]) - 1)])
    assert found[:2] == ["right", None]
    assert len(set(found)) in (len(found), len(found) - 1)  # what is rare may not be compared


@pytest.mark.parametrize("n, expected", [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_sizes(n: int, expected: list[int]) -> None:
    assert sizes(n) == expected


class TestSuite:
    def test_names_and_flags(self) -> None:
        first, second = read_suite("math500, aime24", {"samples": 4, "limit": None})
        assert (first.name, second.name) == ("math500", "aime24")
        assert (first.samples, first.temperature, first.limit) == (4, 0.8, None)

    def test_flags_override_the_file_and_sets_the_suite(self, tmp_path: Path) -> None:
        file = tmp_path / "suite.yaml"
        file.write_text("samples: 8\nmax_tokens: 100\nsets:\n  math500: {}\n  gpqa: {samples: 32, max_tokens: 50}\n")
        read = read_suite(str(file), {"max_tokens": 10})
        assert [(s.name, s.samples, s.max_tokens) for s in read] == [("math500", 8, 10), ("gpqa", 32, 10)]

    def test_the_papers_suite(self) -> None:
        read = {s.name: s for s in read_suite(str(ROOT / "configs/suites/paper.yaml"), {})}
        assert list(read) == ["math500", "amc23", "aime24", "aime25", "gpqa", "mmlu_pro"]
        assert (read["aime25"].samples, read["gpqa"].samples, read["mmlu_pro"].samples) == (16, 32, 1)
        assert {s.temperature for s in read.values()} == {0.8}
        assert read["math500"].system_prompt.endswith("\\boxed{}.")

    @pytest.mark.parametrize(
        "suite, flags, message",
        [
            ("math-500", {}, "suite: expected names from math, .* found 'math-500'; did you mean math500"),
            ("AIME_2024", {}, "did you mean aime2"),
            ("mmlu", {}, "did you mean mmlu_pro"),
            ("zzz", {}, "found 'zzz'$"),
            ("", {}, "suite: expected names of data sets or a YAML file with sets, found ''"),
            ("nowhere.yaml", {}, "expected a YAML file, found nothing at 'nowhere.yaml'"),
            ("amc23", {"samples": 0}, "samples of amc23: expected 1 or more, found 0"),
            ("amc23", {"temperature": -1.0}, "temperature of amc23: expected from 1e-18 to 1e18, or 0"),
            ("amc23", {"temperature": float("inf")}, "temperature of amc23: expected from 1e-18 to 1e18, or 0"),
            ("amc23", {"limit": 0}, "limit of amc23"),
        ],
    )
    def test_bad_suites(self, suite: str, flags: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_suite(suite, flags)

    def test_unknown_keys_of_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "suite.yaml").write_text("sets: {math500: {sample: 3}}\n")
        with pytest.raises(ConfigError, match="sets.math500.sample: Key 'sample' not in 'SetConfig'"):
            read_suite(str(tmp_path / "suite.yaml"), {})

    def test_one_file_serves_one_set(self, tmp_path: Path) -> None:
        file, suite = tmp_path / "aime24.jsonl", tmp_path / "suite.yaml"
        file.write_text("")
        assert read_suite("aime24", {"data": str(file)})[0].data == str(file)
        assert len(read_suite("aime24,amc23", {"data": str(tmp_path)})) == 2
        with pytest.raises(
            ConfigError, match="data: expected a folder for several data sets, aime24, amc23, found one"
        ):
            read_suite("aime24,amc23", {"data": str(file)})
        suite.write_text(f"data: {file}\nsets: {{aime24: {{}}, amc23: {{}}}}\n")
        with pytest.raises(ConfigError, match="data: expected a folder"):
            read_suite(str(suite), {})
        suite.write_text(f"sets: {{aime24: {{data: {file}}}, amc23: {{}}}}\n")
        assert [one.data for one in read_suite(str(suite), {})] == [str(file), None]


NOTHING: dict[str, Any] = {"settings": [], "results": []}


def estimates(**values: float) -> dict[str, Estimate]:
    return {key.replace("_at_", "@"): Estimate(v, v - 0.1, v + 0.1) for key, v in values.items()}


def test_what_is_shown(tmp_path: Path) -> None:
    strict = estimates(pass_at_1=0.1, pass_at_2=0.2, maj_at_2=0.1)
    scores = [
        Scores(model, name, 5, 2, {"lenient": estimates(pass_at_1=p, pass_at_2=p + 0.2, maj_at_2=p + 0.1),
                                   "strict": strict}, Estimate(12.4, 10, 15), Estimate(0.25, 0.2, 0.3))
        for model, p in (("grpo", 0.3), ("g2rl", 0.5)) for name in ("amc23", "aime24")
    ]  # fmt: skip
    tables = write_results(tmp_path, scores, [settings()], NOTHING)
    assert len(tables) == 2
    text = (tmp_path / "results.txt").read_text(encoding="utf-8")
    assert "30.0 / 40.0 / 50.0" in text
    assert "50.0 / 60.0 / 70.0" in text
    assert "[20.0, 40.0]" in text
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))
    console.print(tables[1])
    assert "[20.0, 40.0]" in console.export_text()  # whole on a terminal of the usual width
    narrow = Console(width=60, record=True, quiet=False, file=open("/dev/null", "w"))
    narrow.print(tables[1])
    shown = narrow.export_text()
    assert all(text in shown for text in ("amc23", "g2rl", "[20.0,", "40.0]", "10.0", "25.0")) and "…" not in shown
    record = json.loads((tmp_path / "results.json").read_text())
    assert set(record["judge"]) == set(record["results"][0]["metrics"]) == {"lenient", "strict"}
    assert record["results"][2]["metrics"]["lenient"]["pass@2"] == pytest.approx(
        {"value": 0.7, "low": 0.6, "high": 0.8}
    )
    assert record["settings"][0]["temperature"] == 0.8
    assert (tmp_path / "pass_at_k.png").stat().st_size > 10_000
    amc, aime = plot_pass_at_k(scores).axes[:2]
    assert (amc.get_title(), aime.get_title()) == ("amc23", "aime24")
    assert [list(line.get_ydata()) for line in amc.lines] == [[0.3, 0.5], [0.5, 0.7]]


def test_axes_of_likely_answers_end_at_ticks() -> None:
    for value, top in ((0.71, 0.8), (0.99, 1.0)):
        both = {
            mode: {key: Estimate(value, value, value) for key in ("pass@1", "pass@2")} for mode in ("lenient", "strict")
        }
        axes = plot_pass_at_k([Scores("m", "amc23", 5, 2, both, Estimate(1, 1, 1), Estimate(0, 0, 0))]).axes[0]
        assert value < top < axes.get_ylim()[1] < 1.05 * top
        assert any(abs(tick - top) < 1e-9 for tick in axes.get_yticks())


def scored(model: str, name: str, value: float) -> Scores:
    both = estimates(pass_at_1=value, pass_at_3=value, maj_at_3=value)
    none = Estimate(value, float("nan"), float("nan"))
    return Scores(model, name, 5, 3, {"lenient": both, "strict": {**both, "pass@1": none}}, none, none)


def test_results_of_another_suite_stay(tmp_path: Path) -> None:
    first, (other,) = settings(), read_suite("aime24", {"samples": 3})
    assert read_results(tmp_path, ["a"], [first]) == NOTHING
    write_results(tmp_path, [scored("a", "amc23", 0.3), scored("b", "amc23", 0.4)], [first], NOTHING)
    earlier = read_results(tmp_path, ["a"], [other])
    write_results(tmp_path, [scored("a", "aime24", 0.5)], [other], earlier)
    text = (tmp_path / "results.txt").read_text()
    assert all(f"{value:.1f} / {value:.1f} / {value:.1f}" in text for value in (30, 40, 50))
    record = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert [(one["model"], one["name"]) for one in record["results"]] == [
        ("a", "amc23"),
        ("b", "amc23"),
        ("a", "aime24"),
    ]
    assert [one["name"] for one in record["settings"]] == ["amc23", "aime24"]
    assert record["results"][0]["metrics"]["strict"]["pass@1"] == {"value": 0.3, "low": None, "high": None}
    # Evaluated again, a result takes the place of the one before.
    write_results(tmp_path, [scored("a", "amc23", 0.6)], [first], read_results(tmp_path, ["a"], [first]))
    record = json.loads((tmp_path / "results.json").read_text())
    found = {(one["model"], one["name"]): one["metrics"]["lenient"]["pass@1"]["value"] for one in record["results"]}
    assert found == {("b", "amc23"): 0.4, ("a", "aime24"): 0.5, ("a", "amc23"): 0.6}


def test_results_with_other_settings_or_damaged_are_refused_at_once(tmp_path: Path) -> None:
    write_results(tmp_path, [scored("a", "amc23", 0.3), scored("b", "amc23", 0.4)], [settings()], NOTHING)
    changed = [settings(temperature=0.5)]
    with pytest.raises(ConfigError, match="out: expected samples with temperature = 0.5, found 0.8 in .*results.json"):
        read_results(tmp_path, ["a"], changed)
    assert read_results(tmp_path, ["a", "b"], changed) == NOTHING  # none of the others is left
    for key, value in {"limit": 3, "seed": 7, "problems": "others"}.items():
        with pytest.raises(ConfigError, match=f"out: expected samples with {key} = {value!r}, found"):
            read_results(tmp_path, ["a"], [replace(settings(), **{key: value})])
    for damage in ("", "{", "[]", '{"settings": [], "results": [{}]}'):
        (tmp_path / "results.json").write_text(damage)
        with pytest.raises(ConfigError, match="out: expected results of g2rl eval, found damage in .*results.json"):
            read_results(tmp_path, ["a"], changed)


@pytest.mark.parametrize(
    "paths, expected",
    [
        (["smollm2"], ["smollm2"]),
        (["Qwen/Qwen3-1.7B", "/models/mine"], ["Qwen3-1.7B", "mine"]),
        (["/a/final", "/b/final"], ["a-final", "b-final"]),
        (["/runs/g2rl/checkpoints/step-000030", "smollm2"], ["g2rl-step-000030", "smollm2"]),
        (["a/x/checkpoints/step-000030", "b/x/checkpoints/step-000030"], ["a-x-step-000030", "b-x-step-000030"]),
    ],
)
def test_labels(paths: list[str], expected: list[str]) -> None:
    assert labels(paths) == expected


def test_labels_of_folders_are_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are spelt: a label is a folder below that of the results."""
    (tmp_path / "a" / "checkpoints" / "step-000030").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "checkpoints")
    assert labels(["."]) == labels([".."]) == ["a"]
    assert labels(["step-000030", "..", "smollm2"]) == ["a-step-000030", "a", "smollm2"]
    with pytest.raises(ConfigError, match=r"checkpoint: expected different models, found '\.\.' twice"):
        labels(["..", str(tmp_path / "a")])
    assert labels(["/checkpoints", "/"]) == ["checkpoints", "model"]


def test_digests_tell_weights_apart(tiny_model: Path) -> None:
    model, _ = load_model(ModelConfig(path=str(tiny_model)))
    before = digest(model)
    assert before == digest(load_model(ModelConfig(path=str(tiny_model)))[0])
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3
    assert digest(model) != before


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    # Multiple choice, whose judge starts no processes.
    rows = [{"problem": f"What is {i} + {i}?", "answer": "B", "options": [str(i - 1), str(2 * i)]} for i in range(8)]
    write(tmp_path / "mmlu_pro.jsonl", rows)
    yield tmp_path


def command(model: Path, data: Path, out: str, *more: str) -> list[str]:
    return ["eval", str(model), "--suite", "mmlu_pro", "rollout.dtype=float32", "--data", str(data), "--samples", "4",
            "--max-tokens", "12", "--limit", "6", "--batch-size", "3", "--out", str(data / out), *more]  # fmt: skip


def test_sigkill_twice(tmp_path: Path) -> None:
    """Killed at no chosen moment, in a process of its own that only sleeps where a model would work."""
    program = f"""
import sys, time
sys.path[:] = {sys.path!r}
from pathlib import Path
from tests.g2rl.scripted_sampler import ScriptedSampler, run

class Slow(ScriptedSampler):
    def sample(self, *arguments):
        time.sleep(0.02)
        return super().sample(*arguments)

run(Path({str(tmp_path / "killed.jsonl")!r}), Slow(), samples=100)
"""
    path = tmp_path / "killed.jsonl"
    for least in (50, 200):
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not (path.exists() and path.read_bytes().count(b"\n") >= least):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert least <= path.read_bytes().count(b"\n") < 500
    assert run(path, ScriptedSampler(), samples=100) == run(tmp_path / "whole.jsonl", ScriptedSampler(), samples=100)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_model_goes_on_where_its_samples_end(tiny_model: Path, data: Path) -> None:
    """From a file torn in the middle of a batch, the same results as at once."""
    assert main(command(tiny_model, data, "whole")) == 0
    samples = f"{tiny_model.name}/mmlu_pro.jsonl"
    whole = (data / "whole" / samples).read_bytes()
    assert whole.count(b"\n") == 1 + 6 * 4
    (data / "torn" / samples).parent.mkdir(parents=True)
    (data / "torn" / samples).write_bytes(whole[: len(whole) * 2 // 5])
    assert main(command(tiny_model, data, "torn")) == 0
    for file in (samples, "results.json", "results.txt"):
        assert (data / "torn" / file).read_bytes() == (data / "whole" / file).read_bytes()


def test_several_models_side_by_side(tiny_model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = build_model(data / "other", seed=1)
    arguments = command(tiny_model, data, "out", "--limit", "2")
    arguments.insert(2, str(other))
    assert main(arguments) == 0
    assert "other" in capsys.readouterr().out
    record = json.loads((data / "out" / "results.json").read_text())
    assert [(r["model"], r["name"], r["problems"], r["samples"]) for r in record["results"]] == [
        (tiny_model.name, "mmlu_pro", 2, 4),
        ("other", "mmlu_pro", 2, 4),
    ]
    # The same weights elsewhere are the same model; another engine's samples are others.
    samples = data / "out" / "other" / "mmlu_pro.jsonl"
    before = samples.read_bytes()
    (data / "elsewhere").mkdir()
    other.rename(data / "elsewhere" / "other")
    assert main(command(data / "elsewhere" / "other", data, "out", "--limit", "2")) == 0
    assert samples.read_bytes() == before
    assert json.loads(before.partition(b"\n")[0])["engine"] == "transformers"
    assert main(command(tiny_model, data, "out", "--temperature", "0.5")) == 2
    assert "out: expected samples with temperature = 0.5, found 0.8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--suite", "amc32"], "found 'amc32'; did you mean amc23 or"),
        (["MODEL", "--suite", "aime24", "--data", "DATA"], "expected aime24.jsonl or aime24_train.jsonl in"),
        (["MODEL", "--suite", "mmlu_pro", "--data", "DATA", "--max-tokens", "256"], "model's context of 256 tokens"),
        (["MODEL", "MODEL", "--suite", "mmlu_pro", "--data", "DATA"], "checkpoint: expected different models"),
        (["MODEL", "--suite", "math500", "rollout.max_new_tokens=64"],
         "rollout.max_new_tokens: expected --max-tokens, found an override, which would not count beside --suite"),
        (["MODEL", "--suite", "math500", "rollout.dtype=float32", "rollout={vllm: {max_model_len: 9}, top_p: 0.1}"],
         "rollout.top_p: expected the key top_p in the suite's file, found an override, which would not count"),
        (["MODEL", "--suite", "math500", "task.options.instruction=foo"],
         "task.options.instruction: expected the key instruction in the suite's file, found"),
        (["MODEL", "--suite", "math500", "methods.g2rl.clip=2"],
         "methods.g2rl.clip: expected overrides of model.attention, model.device, rollout.chat_template_kwargs, "),
        (["MODEL", "--suite", "mmlu_pro", "--data", "DATA", "--max-tokens", "8", "rollout.chat_template_kwargs={a: 1}"],
         "rollout.chat_template_kwargs: expected arguments of the model's chat template, found 'a', which"),
        (["MODEL", "--samples", "3"], "suite: expected --suite with data sets, found --samples without it"),
        (["MODEL"], "suite: expected --suite with data sets, found --out without it"),
        (["MODEL", "smollm2"], "suite: expected --suite with data sets, found 2 checkpoints without it"),
        (["eval.samples=3"], "checkpoint: expected a checkpoint, a run's folder or a model, found none"),
    ],
)  # fmt: skip
def test_bad_commands(
    arguments: list[str], message: str, tiny_model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"MODEL": str(tiny_model), "DATA": str(data)}
    assert main(["eval", *(names.get(text, text) for text in arguments), "--out", str(data / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tiny_model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "file").write_text("")
    assert main(command(tiny_model, data, "file")) == 1
    place = data / "file" / tiny_model.name / "mmlu_pro.jsonl"
    assert f"g2rl: out: '{place}' cannot be written: " in capsys.readouterr().err


def test_a_full_disk(tmp_path: Path) -> None:
    run(tmp_path / "s.jsonl", ScriptedSampler())
    before = (tmp_path / "s.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"out: '.*s\.jsonl' cannot be written: "):
            run(tmp_path / "s.jsonl", ScriptedSampler(), samples=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "s.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize("name", ["eval", "geometry"])
def test_a_model_is_named_by_itself(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([name, str(tiny_model), "model.path=elsewhere"]) == 2
    assert "model.path: expected a checkpoint or model by itself, found an override" in capsys.readouterr().err


def test_every_data_set_can_be_named() -> None:
    assert [s.name for s in read_suite(",".join(DATA_SETS), {})] == list(DATA_SETS)
