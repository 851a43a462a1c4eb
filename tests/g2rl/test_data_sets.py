"""Data sets by name: where their rows come from, what is held out, and what is said of data that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub.errors import HTTPError

from g2rl.config import ConfigError, TaskConfig
from g2rl.rewards import judge_episodes
from g2rl.tasks import make_task
from g2rl.tasks.base import Task
from g2rl.tasks.data_sets import DATA_SETS, load_problems
from g2rl.tasks.grading import ChoiceJudge, MathJudge
from g2rl.types import Episode, Problem
from tests.g2rl.json_lines import write

CHOICE = {"problem": "Which capital?", "answer": "B", "options": ["Paris", "Rome", "Oslo"]}
HUB_ROWS: dict[str, dict[str, Any]] = {
    "math": {"problem": "1 + 1?", "expected_answer": "2", "solution": "no"},
    "math12k": {"problem": "1 + 1?", "answer": "2"},
    "gsm8k": {"question": "1 + 1?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
    "math500": {"problem": "1 + 1?", "answer": "2", "solution": "no", "unique_id": "a"},
    "amc23": {"question": "1 + 1?", "answer": 2.0},
    "aime24": {"problem": "1 + 1?", "answer": "2"},
    "aime25": {"problem": "1 + 1?", "answer": "2"},
    "minerva": {"question": "1 + 1?", "answer": "2"},
    "mmlu_pro": {"question": "1 + 1?", "answer": "J", "options": [str(i) for i in range(7, -3, -1)]},
    "gpqa": {
        "Question": "1 + 1?", "Correct Answer": " 2", "Incorrect Answer 1": "3", "Incorrect Answer 2": "4",
        "Incorrect Answer 3": "5",
    },
}  # fmt: skip


def numbered(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"problem": f"Problem {i}?", "answer": str(i)} for i in range(first, first + count)]


def task(name: str, held_out: int = 0, **options: Any) -> Task:
    return make_task(TaskConfig(name=name, options=options, held_out=held_out), seed=0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with one row in each data set; returns what was asked of it."""
    asked: list[tuple[Any, ...]] = []
    rows = {spec.path: HUB_ROWS[name] for name, spec in DATA_SETS.items()}

    def load_dataset(path: str, subset: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((path, subset, split))
        return [rows[path]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("g2rl.tasks.rows.no_connection", lambda *asked: None)
    return asked


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("name", DATA_SETS)
def test_hub_columns(name: str, hub: list[tuple[Any, ...]]) -> None:
    spec = DATA_SETS[name]
    (problem,) = load_problems(name, spec.test).values()
    assert hub == [(spec.path, spec.subset, spec.test)]
    assert problem.prompt.startswith("1 + 1?\n")
    assert problem.id == f"{name}/{spec.test}:1"
    if spec.judge == "math":
        assert problem.answer in ("2", "2.0")
        assert problem.prompt.endswith("final answer within \\boxed{}.")
    else:
        assert f"({problem.answer}) {'-2' if name == 'mmlu_pro' else '2'}" in problem.prompt
        assert problem.prompt.endswith("letter of the right option within \\boxed{}.")
        assert len(problem.data["options"]) == (10 if name == "mmlu_pro" else 4)


@pytest.mark.parametrize(
    "files", [["gsm8k_train.jsonl", "gsm8k_test.jsonl"], ["gsm8k_train_30.jsonl", "gsm8k_test.jsonl"]]
)
def test_local_splits(tmp_path: Path, files: list[str]) -> None:
    for file, rows in zip(files, (numbered(30), numbered(5, 25)), strict=True):
        write(tmp_path / file, rows)
    with task("gsm8k", held_out=64, data=str(tmp_path), instruction="") as made:
        assert sorted(p.prompt for p in made.held_out()) == [f"Problem {i}?" for i in range(25, 30)]
        # What is held out is not trained on, though the training file has it.
        assert {made.train_problem(i).prompt for i in range(25)} == {f"Problem {i}?" for i in range(25)}


@pytest.mark.parametrize("file", ["gsm8k.jsonl", "gsm8k_train.jsonl"])
def test_one_local_file_is_divided(tmp_path: Path, file: str) -> None:
    write(tmp_path / file, numbered(30))
    for data in (tmp_path, tmp_path / file):
        with task("gsm8k", held_out=10, data=str(data)) as made:
            held_out = {p.prompt for p in made.held_out()}
            assert len(held_out) == 10
            assert all(prompt.endswith(f"?\n{made.instruction}") for prompt in held_out)
            assert len({made.train_problem(i).prompt for i in range(20)} | held_out) == 30


def test_choice_is_judged_by_letters(tmp_path: Path) -> None:
    write(tmp_path / "mmlu_pro_2.jsonl", [CHOICE, {**CHOICE, "problem": "Another?"}])
    with task("mmlu_pro", data=str(tmp_path)) as made:
        problem = made.train_problem(0)
        assert "\n(A) Paris\n(B) Rome\n(C) Oslo\n" in problem.prompt
        responses = [r"\boxed{B}", r"\boxed{A}", "The answer is (B).", r"\boxed{\text{(B) Rome}}", r"\boxed{(B) Oslo}"]
        responses.append("The answer is Oslo.\n\\boxed{B}")
        assert made.judge([problem] * 6, responses) == [True, False, False, True, False, False]
        assert [made.extract(response, problem) for response in responses] == ["B", "A", None, "B", None, None]
        assert made.extract(responses[0]) == "B"
        given = [Episode(problem, (1,), (2,), response, True) for response in responses]
        assert [verdict.answer for verdict in judge_episodes(given, made, [])] == ["B", "A", None, "B", None, None]


def test_modes() -> None:
    """Strict takes boxes only; lenient takes what else is right, and never less."""
    half, capital = Problem("1", "", "$0.5$"), Problem("2", "", "B", {"options": CHOICE["options"]})
    with_box, without = r"It is \boxed{\frac12}.", "The answer is 1/2."
    with MathJudge() as judge:
        answers = [judge.answer(half, text, lenient) for text in (with_box, without) for lenient in (False, True)]
        assert judge.right([half] * 4, answers) == [True, True, False, True]
    chosen = [r"\boxed{B}", "The answer is Rome."]
    read = [ChoiceJudge().answer(capital, text, lenient) for text in chosen for lenient in (False, True)]
    assert ChoiceJudge().right([capital] * 4, read) == [True, True, False, True]


def test_few_rows_may_lack_an_answer(tmp_path: Path) -> None:
    write(tmp_path / "math.jsonl", [*numbered(198), {"problem": "x", "answer": None}, {"problem": "y", "answer": " "}])
    assert len(load_problems("math", "train", str(tmp_path))) == 198
    write(tmp_path / "math.jsonl", [*numbered(10), {"problem": "x", "answer": None}])
    with pytest.raises(
        ConfigError, match="math: expected rows with an answer, found 10 of 11, the first without at .*math.jsonl:11"
    ):
        load_problems("math", "train", str(tmp_path))


@pytest.mark.parametrize(
    "name, row",
    [
        ("gsm8k", {"question": "a", "answer": "So it is. #### "}),
        ("mmlu_pro", {**CHOICE, "options": ["Paris", "Rome", "Rome "]}),
        ("gpqa", {**HUB_ROWS["gpqa"], "Incorrect Answer 2": "2 "}),
    ],
)
def test_no_answer_is_right(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    """Nothing follows the sign that the answer follows, or another option is the same."""
    write(tmp_path / f"{name}.jsonl", [row])
    with pytest.raises(ConfigError, match=f"{name}: .* found 0 of 1, the first without at .*{name}.jsonl:1"):
        load_problems(name, "train", str(tmp_path))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "a", "answer": "B"}, "expected a column 'question' or 'problem' .the problem., found text, answer"),
        ({"problem": "a", "options": []}, "expected a column 'answer' .the answer., found problem, options"),
        ({"problem": "a", "answer": "B"}, "expected a column 'options' .the options., found problem, answer"),
        ({**CHOICE, "options": "Paris"}, "expected list in 'options', found str"),
        ({**CHOICE, "options": ["Paris"]}, "expected 2 to 10 texts in 'options', found"),
        ({**CHOICE, "options": ["Paris", 2]}, "expected 2 to 10 texts in 'options', found"),
        (
            {**CHOICE, "options": ["Paris", "\ud800"]},
            r"expected 2 to 10 texts in 'options', found \['Paris', '.ud800'\]",
        ),
        ({**CHOICE, "answer": "D"}, "expected a letter from A to C, found 'D'"),
        ({**CHOICE, "answer": "Rome"}, "expected a letter from A to C, found 'Rome'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    write(tmp_path / "mmlu_pro.jsonl", [CHOICE, row])
    with pytest.raises(ConfigError, match=f"mmlu_pro.jsonl:2: {message}"):
        load_problems("mmlu_pro", "test", str(tmp_path))


@pytest.mark.parametrize(
    "error, name, message",
    [
        (
            ConnectionError("Couldn't reach it"),
            "math500",
            "math500: .* found 'HuggingFaceH4/MATH-500', subset None, split 'test': Couldn't reach it.*"
            "math500.jsonl .*--data FOLDER",
        ),
        (caused(OSError("no such split"), ValueError("bad JSON")), "mmlu_pro", r"no such split \(bad JSON\)"),
        (FileNotFoundError("gated"), "gpqa", "'Idavidrein/gpqa', subset 'gpqa_diamond'.*accept its terms.*HF_TOKEN"),
        (ValueError("no such split"), "mmlu_pro", "no such split.*problem, answer and options"),
    ],
)
def test_a_hub_out_of_reach(error: Exception, name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, subset: str | None, split: str) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("g2rl.tasks.rows.no_connection", lambda *asked: None)
    with pytest.raises(ConfigError, match=message):
        load_problems(name, DATA_SETS[name].test)


def test_without_a_connection_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`datasets` alone would ask for half a minute; what it keeps on this machine it finds without asking."""
    addresses: list[str] = []

    def metadata(url: str) -> None:
        addresses.append(url)
        raise HTTPError("no route")

    monkeypatch.setattr("g2rl.hub.get_hf_file_metadata", metadata)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    found = r"found 'HuggingFaceH4/MATH-500'.*: no connection to the hub \(HTTPError: no route\), and Couldn't reach"
    with pytest.raises(ConfigError, match=found):
        load_problems("math500", "test")
    assert addresses == ["https://huggingface.co/datasets/HuggingFaceH4/MATH-500/resolve/main/README.md"]
    assert not datasets.config.HF_HUB_OFFLINE
    with pytest.raises(ConfigError, match="found 'a b/c'.*: Repo id must use"):
        task("jsonl", path="a b/c")
    assert len(addresses) == 1


def test_local_files_are_looked_for_by_name(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k_test.jsonl", numbered(3))
    with pytest.raises(ConfigError, match="expected gsm8k.jsonl or gsm8k_train.jsonl in .*, found gsm8k_test.jsonl"):
        task("gsm8k", data=str(tmp_path))
    with pytest.raises(ConfigError, match="expected a folder or a .jsonl file, found nothing at 'nowhere'"):
        task("gsm8k", data="nowhere")


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "gsm8k",
            {"path": "a"},
            "task.options.path: expected one of data, instruction, allow_number, found an unknown",
        ),
        ("gsm8k", {"data": 3}, "task.options.data: expected text or null, found 3"),
        ("mmlu_pro", {"allow_number": True}, "task.options.allow_number: expected false with mmlu_pro"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(name, **options)


@pytest.mark.parametrize(
    "asked, answer, right",
    [
        ("How many million tons of apples?", r"2.2 \text{ million}", True),
        ("How many million tons of apples?", "2.2", True),
        ("How many million tons of apples?", "22 million", False),
        ("How many tons of apples?", "2.2 million", False),
    ],
)
def test_a_number_may_repeat_the_unit_that_is_asked_for(asked: str, answer: str, right: bool) -> None:
    with MathJudge() as judge:
        assert judge.right([Problem("apples", asked, "2.2")], [answer]) == [right]
