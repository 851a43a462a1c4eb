"""Tasks: which problems they make, what they hold out, what counts as right, and what they say of wrong options."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from g2rl.config import ConfigError, TaskConfig
from g2rl.tasks import make_task
from g2rl.tasks.base import Task, sample_indices
from g2rl.tasks.data_sets import load_problems
from g2rl.tasks.reasoning_gym import ReasoningGymTask
from g2rl.types import Problem


def task(name: str = "arithmetic", held_out: int = 64, seed: int = 0, **options: Any) -> Task:
    return make_task(TaskConfig(name=name, options=options, held_out=held_out), seed)


def prompts(problems: list[Problem]) -> list[str]:
    return [problem.prompt for problem in problems]


def test_importing_tasks_does_not_import_torch() -> None:
    # Workers that judge answers import the package; torch would make their start take seconds.
    imports = "import g2rl.tasks.judges, g2rl.tasks.verifier; assert 'torch' not in sys.modules"
    code = f"import sys; sys.path[:] = {sys.path!r}; {imports}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TestArithmetic:
    def test_default_is_every_two_digit_plus_one_digit_addition(self) -> None:
        made = task()
        held_out = made.held_out()
        train = [made.train_problem(i) for i in range(810 - 64)]
        expected = {
            f"What is {a} + {b}? Answer with just the number.": str(a + b) for a in range(10, 100) for b in range(1, 10)
        }
        assert {p.prompt: p.answer for p in held_out + train} == expected
        assert len(held_out) == 64
        assert len({p.id for p in held_out + train}) == 810

    def test_epochs_are_permutations_in_new_orders(self) -> None:
        made = task(held_out=10)
        size = 800
        epochs = [[made.train_problem(e * size + i).id for i in range(size)] for e in range(3)]
        assert [sorted(epoch) for epoch in epochs] == [sorted(epochs[0])] * 3
        assert epochs[0] != epochs[1] != epochs[2]

    def test_a_problem_depends_on_seed_and_index_only(self) -> None:
        first, second, other = task(seed=3), task(seed=3), task(seed=4)
        backwards = [second.train_problem(i) for i in reversed(range(0, 3000, 100))]
        assert [first.train_problem(i) for i in range(0, 3000, 100)] == backwards[::-1]
        assert prompts([first.train_problem(i) for i in range(20)]) != prompts(
            [other.train_problem(i) for i in range(20)]
        )
        assert first.held_out() == other.held_out()  # the same evaluation whatever the seed

    def test_operations_and_digits(self) -> None:
        made = task(digits=[1, 2, 1], operations="+-*", held_out=100, template="{expression} = ?")
        for problem in made.held_out():
            expression = problem.prompt.removesuffix(" = ?")
            assert problem.answer == str(eval(expression))  # our own text, digits and operators only
            assert [len(part) for part in expression.split()] == [1, 1, 2, 1, 1]
        assert {c for p in made.held_out() for c in p.prompt} >= set("+-*")

    def test_a_large_space_is_sampled_without_repeats(self) -> None:
        made = task(digits=[18] * 8, operations="*")
        ids = {made.train_problem(i).id for i in range(50_000 - 64)} | {p.id for p in made.held_out()}
        assert len(ids) == 50_000
        problem = made.held_out()[0]
        assert len(problem.answer) > 130
        assert made.judge([problem, problem], [problem.answer, problem.answer + "0" * 5_000]) == [True, False]

    @pytest.mark.parametrize(
        "response, right, reason",
        [
            ("32", True, "the bare number"),
            ("27 + 5 = 32.", True, "the last number"),
            (r"\boxed{32}", True, "the box"),
            (r"\boxed{32}, not 33", True, "the box before a later number"),
            (r"32, so \boxed{33}", False, "a wrong box before a right number"),
            ("32 or 33", False, "the last number counts"),
            (r"\boxed{33} or \boxed{32}", False, "two boxes to choose from"),
            (r"\boxed{32} or \boxed{32.0}", True, "two boxes with one answer"),
            (r"27 is \boxed{27}, and 27 + 5 is \boxed{32}", True, "a box of a step"),
            (r"\boxed{32 apples}", True, "a unit"),
            (r"\boxed{32 dozen}", False, "a word that makes another number of it"),
            ("-32", False, "sign"),
            ("32.0", True, "the same value"),
            ("32.5", False, "not the same"),
            ("3 2", False, "two numbers"),
            ("132", False, "ends in the right digits"),
            ("thirty-two", False, "no number"),
            ("", False, "nothing"),
            ("9" * 100_000, False, "beyond the limit of Python's conversion"),
        ],
    )
    def test_judge(self, response: str, right: bool, reason: str) -> None:
        problem = Problem("27+5", "What is 27 + 5? Answer with just the number.", "32")
        assert task().judge([problem], [response]) == [right]

    def test_negative_answers(self) -> None:
        assert task().judge([Problem("5-27", "", "-22")] * 3, ["-22", "5 - 27 = -22", "22"]) == [True, True, False]

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"digit": [2, 1]}, "task.options.digit: expected one of digits, operations, template, found an unknown"),
            ({"digits": 2}, "task.options.digits: expected a list .* found 2"),
            ({"digits": [2]}, r"task.options.digits: .* found \[2\]"),
            ({"digits": [2, 0]}, "task.options.digits"),
            ({"digits": [2, 19]}, "task.options.digits"),
            ({"digits": [2, True]}, "task.options.digits"),
            ({"digits": [2, "1"]}, "task.options.digits"),
            ({"operations": "+/"}, r"task.options.operations: expected .* found '\+/'"),
            ({"operations": ""}, "task.options.operations"),
            ({"operations": "++"}, "task.options.operations"),
            ({"operations": ["+"]}, "task.options.operations"),
            ({"template": "What is it?"}, "task.options.template: expected text that contains {expression}"),
            ({"template": None}, "task.options.template"),
        ],
    )
    def test_options_are_checked(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            task(**options)

    def test_something_must_be_left_to_train_on(self) -> None:
        with pytest.raises(ConfigError, match="task.held_out: expected fewer than the task's 810 .* found 810"):
            task(held_out=810)
        assert task(held_out=809).train_problem(5) == task(held_out=809).train_problem(0)
        assert task(held_out=0).held_out() == []

    def test_indices_start_at_zero(self) -> None:
        with pytest.raises(IndexError, match="found -1"):
            task().train_problem(-1)


def test_sample_indices_are_distinct_whatever_the_size() -> None:
    assert sorted(sample_indices(10, 20)) == list(range(10))
    for total in (10**6, 10**30):
        drawn = sample_indices(total, 1000)
        assert len(set(drawn)) == 1000
        assert drawn == sample_indices(total, 1000)
        assert max(drawn) > total / 2


ROWS = [{"problem": f"Problem {i}?", "answer": rf"\frac{{{i}}}{{7}}"} for i in range(20)]
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


class TestJsonl:
    def test_problems_prompt_and_split(self, tmp_path: Path) -> None:
        path = write(tmp_path / "set.jsonl", ROWS)
        with task("jsonl", held_out=5, path=path) as made:
            train = [made.train_problem(i) for i in range(15)]
            problems = {p.prompt: p.answer for p in train + made.held_out()}
            assert problems == {row["problem"] + INSTRUCTION: row["answer"] for row in ROWS}
            assert len(made.held_out()) == 5
            assert {p.id for p in train + made.held_out()} == {f"{path}:{line}" for line in range(1, 21)}

    def test_the_split_does_not_depend_on_the_seed(self, tmp_path: Path) -> None:
        path = write(tmp_path / "set.jsonl", ROWS)
        first, second = (task("jsonl", held_out=5, seed=seed, path=path) for seed in (0, 1))
        assert first.held_out() == second.held_out()
        assert [first.train_problem(i) for i in range(15)] != [second.train_problem(i) for i in range(15)]

    def test_judge(self, tmp_path: Path) -> None:
        path = write(tmp_path / "set.jsonl", [{"problem": "a", "answer": "0.5"}, {"problem": "b", "answer": "2x"}])
        with task("jsonl", held_out=0, path=path) as made:
            half, double = sorted((made.train_problem(i) for i in range(2)), key=lambda p: p.answer)
            responses = [r"It is \boxed{\frac12}.", "It is 0.5.", r"\boxed{x+x}", r"\boxed{x}", ""]
            assert made.judge([half, half, double, double, double], responses) == [True, False, True, False, False]
            assert made.extract(responses[0]) == r"\frac12"
            assert made.extract(responses[1]) is None
            choices = [r"$\boxed{x}$ or $x=\boxed{2x}$", r"$\boxed{x+x} = \boxed{2x}$", r"\boxed{x}. Both: \boxed{2x}"]
            assert made.judge([double] * 3, choices) == [False, True, True]
        with task("jsonl", held_out=0, path=path, allow_number=True) as made:
            assert made.judge([half, half], ["It is 0.5.", "It is 1/2, or 3."]) == [True, False]

    def test_numbers_of_json_have_no_exponent(self, tmp_path: Path) -> None:
        rows = [{"problem": f"{i}?", "answer": answer} for i, answer in enumerate([1e-5, 2e16, 5.0, 10**20])]
        with task("jsonl", held_out=0, path=write(tmp_path / "set.jsonl", rows)) as made:
            problems = sorted((made.train_problem(i) for i in range(4)), key=lambda p: p.prompt)
            assert [p.answer for p in problems] == ["0.00001", "20000000000000000", "5.0", "1" + "0" * 20]
            right = [r"\boxed{10^{-5}}", r"\boxed{2 \times 10^{16}}", r"\boxed{5}", r"\boxed{10^{20}}"]
            assert made.judge(problems, right) == [True] * 4
            assert made.judge(problems[:1], [r"\boxed{e-5}"]) == [False]
        write(tmp_path / "amc23.jsonl", rows[:1])
        assert [p.answer for p in load_problems("amc23", "test", str(tmp_path)).values()] == ["0.00001"]

    def test_a_list_is_no_number(self, tmp_path: Path) -> None:
        golds = ["10, 100", "100, 200", "3, 5", "1{,}234"]
        rows = [{"problem": f"Problem {i}?", "answer": gold} for i, gold in enumerate(golds)]
        with task("jsonl", held_out=0, path=write(tmp_path / "set.jsonl", rows)) as made:
            problems = sorted((made.train_problem(i) for i in range(4)), key=lambda p: p.prompt)
            responses = [rf"\boxed{{{answer}}}" for answer in ("10100", "200, 100", "5, 3", "1234")]
            assert made.judge(problems, responses) == [False, True, True, True]

    def test_equal_problems_are_kept_once(self, tmp_path: Path) -> None:
        rows = [{"problem": "How  many?", "answer": "1"}, {"problem": " How many?\n", "answer": 1}, *ROWS[:3]]
        made = task("jsonl", held_out=1, path=write(tmp_path / "set.jsonl", rows))
        assert len({made.train_problem(i).prompt for i in range(30)}) + 1 == 4

    def test_problems_of_an_evaluation_set_are_not_trained_on(self, tmp_path: Path) -> None:
        evaluation = [*ROWS[:4], {"problem": "Another?", "answer": "1"}]
        options: dict[str, Any] = {
            "path": write(tmp_path / "set.jsonl", ROWS),
            "eval_path": write(tmp_path / "eval.jsonl", evaluation),
        }
        made = task("jsonl", held_out=64, **options)
        assert sorted(prompts(made.held_out())) == sorted(row["problem"] + INSTRUCTION for row in evaluation)
        assert {made.train_problem(i).prompt for i in range(16)} == {row["problem"] + INSTRUCTION for row in ROWS[4:]}
        assert len(task("jsonl", held_out=2, **options).held_out()) == 2

    def test_an_evaluation_set_must_leave_something(self, tmp_path: Path) -> None:
        path = write(tmp_path / "set.jsonl", ROWS)
        with pytest.raises(ConfigError, match="task.options.eval_path: expected other problems"):
            task("jsonl", path=path, eval_path=path)

    def test_keys_instruction_and_answer_after(self, tmp_path: Path) -> None:
        rows = [{"question": "How many?", "solution": "3 #### 4 = 7\n#### 7 "}]
        made = task(
            "jsonl", held_out=0, path=write(tmp_path / "set.jsonl", rows), problem_key="question",
            answer_key="solution", answer_after="####", instruction="",
        )  # fmt: skip
        problem = made.train_problem(0)
        assert (problem.prompt, problem.answer) == ("How many?", "7")

    def test_a_reward_sees_all_columns(self, tmp_path: Path) -> None:
        row = {"problem": "How many?", "answer": 7, "tests": ["a", {"b": None}], "difficulty": 0.5}
        made = task("jsonl", held_out=0, path=write(tmp_path / "set.jsonl", [row]))
        assert made.train_problem(0).data == {"row": row}

    def test_a_folder_is_loaded_as_a_hub_data_set_with_its_splits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "data"
        folder.mkdir()
        write(folder / "train.jsonl", ROWS)
        write(folder / "test.jsonl", [{"problem": "Another?", "answer": "1"}])
        made = task("jsonl", path=str(folder), eval_split="test")
        assert prompts(made.held_out()) == ["Another?" + INSTRUCTION]
        assert made.held_out()[0].id == f"{folder}[test]:1"
        assert len({made.train_problem(i).prompt for i in range(20)}) == 20
        with pytest.raises(ConfigError, match="task.options.path: .* split 'nowhere'"):
            task("jsonl", path=str(folder), split="nowhere")

    @pytest.mark.parametrize(
        "line, message",
        [
            ("{", "expected a JSON object, found Expecting"),
            ("[1]", "expected a JSON object, found list"),
            ('{"answer": "1"}', r"expected a column 'problem' \(task.options.problem_key\), found answer"),
            ('{"problem": "a"}', r"expected a column 'answer' \(task.options.answer_key\), found problem"),
            ('{"problem": 1, "answer": "1"}', "expected str in 'problem', found int"),
            ('{"problem": "a", "answer": null}', "expected str or int or float in 'answer', found NoneType"),
            ('{"problem": "a", "answer": true}', "expected .* found bool"),
            ('{"problem": "a", "answer": " "}', "expected an answer in 'answer', found none"),
            ("[" * 100_000, "expected a JSON object"),
        ],
    )
    def test_a_bad_row_is_named_by_file_and_line(self, tmp_path: Path, line: str, message: str) -> None:
        path = write(tmp_path / "set.jsonl", [ROWS[0], "", line])  # the blank line is skipped, but counts
        with pytest.raises(ConfigError, match=f"set.jsonl:3: {message}"):
            task("jsonl", path=path)

    def test_text_that_is_not_unicode_is_named_by_file_and_line(self, tmp_path: Path) -> None:
        (tmp_path / "set.jsonl").write_bytes(b'{"problem": "a", "answer": "1"}\n{"problem": "\xff"}\n')
        with pytest.raises(ConfigError, match="set.jsonl:2"):
            task("jsonl", path=str(tmp_path / "set.jsonl"))

    @pytest.mark.parametrize("key", ["path", "eval_path"])
    def test_files_are_named_jsonl(self, tmp_path: Path, key: str) -> None:
        path = write(tmp_path / "own.json", ROWS)
        expected = f"^task.options.{key}: expected a file named .jsonl, with one JSON object a line, found .*own.json'$"
        with pytest.raises(ConfigError, match=expected):
            task("jsonl", **{"path": write(tmp_path / "set.jsonl", ROWS), key: path})

    def test_answer_after_must_be_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="set.jsonl:1: expected '####' in 'answer', found none"):
            task("jsonl", path=write(tmp_path / "set.jsonl", ROWS), answer_after="####")

    @pytest.mark.parametrize(
        "options, message",
        [
            ({}, "task.options.path: expected a .jsonl file .* found nothing"),
            ({"path": 3}, "task.options.path: .* found 3"),
            ({"path": "nowhere.jsonl"}, "task.options.path: expected a file, found nothing at 'nowhere.jsonl'"),
            ({"path": "a.jsonl", "file": "b"}, "task.options.file: expected one of path, .* found an unknown option"),
            (
                {"path": "a.jsonl", "allow_number": "yes"},
                "task.options.allow_number: expected true or false, found 'yes'",
            ),
            ({"path": "a.jsonl", "instruction": None}, "task.options.instruction: expected text, found None"),
            ({"path": "a.jsonl", "eval_split": ""}, "task.options.eval_split"),
            ({"path": "a.jsonl", "split": "test"}, "task.options.split: .* file, .* found 'test' with 'a.jsonl'"),
            ({"path": "a.jsonl", "eval_split": "test"}, "task.options.eval_split: .* found 'test' with 'a.jsonl'"),
            (
                {"path": "set", "eval_path": "b.jsonl", "eval_split": "test"},
                "eval_split: .* found 'test' with 'b.jsonl'",
            ),
            ({"path": "a.jsonl", "eval_path": "b.jsonl", "subset": "main"}, "task.options.subset: .* found 'main'"),
        ],
    )
    def test_options_are_checked(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            task("jsonl", **options)

    def test_an_empty_file_and_too_many_held_out(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="task.options.path: expected problems, found none"):
            task("jsonl", path=write(tmp_path / "empty.jsonl", []))
        with pytest.raises(ConfigError, match="task.held_out: expected fewer than the task's 20 .* found 20"):
            task("jsonl", held_out=20, path=write(tmp_path / "set.jsonl", ROWS))


class TestReasoningGym:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("reasoning_gym")

    @pytest.fixture(scope="class")
    def chain_sum(self) -> Iterator[Task]:
        pytest.importorskip("reasoning_gym")
        with task("chain_sum", held_out=8, max_terms=3, max_digits=2) as made:
            yield made

    def test_problems(self, chain_sum: Task) -> None:
        train = [chain_sum.train_problem(i) for i in range(600)]  # past the end of one chunk
        held_out = chain_sum.held_out()
        assert len(set(prompts(held_out))) == 8
        assert not set(prompts(held_out)) & set(prompts(train))
        assert len(set(prompts(train))) > 500
        for problem in held_out + train[:20]:
            question = problem.data["entry"]["question"]
            assert problem.prompt == question + "\nPut your final answer within \\boxed{}."
            assert problem.prompt == f"{question}\n{chain_sum.instruction}"
            expression = question.partition(":")[2].removesuffix("=").strip()
            assert problem.answer == str(eval(expression))  # the library's text, digits and operators only

    def test_a_problem_depends_on_seed_and_index_only(self, chain_sum: Task) -> None:
        with task("chain_sum", held_out=8, seed=1, max_terms=3, max_digits=2) as other:
            again = [chain_sum.train_problem(i) for i in (999, 3, 0)]
            assert [chain_sum.train_problem(i) for i in (999, 3, 0)] == again
            assert prompts([other.train_problem(i) for i in range(9)]) != prompts(
                [chain_sum.train_problem(i) for i in range(9)]
            )
            assert other.held_out() == chain_sum.held_out()
        with pytest.raises(IndexError, match="found -1"):
            chain_sum.train_problem(-1)

    def test_held_out_problems_of_a_small_space_are_not_trained_on(self) -> None:
        # One-digit sums of two terms: 200 distinct problems at most, so that most indices meet a held-out one.
        with task("chain_sum", held_out=100, min_terms=2, max_terms=2, max_digits=1) as made:
            held_out = set(prompts(made.held_out()))
            assert len(held_out) == 100
            assert not held_out & {made.train_problem(i).prompt for i in range(300)}
        with pytest.raises(ConfigError, match="task.held_out: expected at most 20?0,? "):
            task("chain_sum", held_out=300, min_terms=2, max_terms=2, max_digits=1)

    @pytest.mark.parametrize(
        "wrap, right, reason",
        [
            (r"\boxed{{{}}}", True, "box"),
            (r"\boxed{{\text{{{}}}}}", True, "box around text"),
            ("so\n<answer>{}</answer>", True, "answer element"),
            ("so\n{}\n", True, "last line"),
            ("It is {}.", False, "a sentence that contains it"),
            (r"{} \boxed{{no}}", False, "a wrong box"),
            (r"\boxed{{0}} or \boxed{{{}}}", False, "two boxes to choose from"),
            (r"\boxed{{{}}}, \boxed{{{}}}", True, "the same box twice"),
            ("<think>\\boxed{{0}}</think>\n{}", True, "the last line after thinking"),
            (r"<think>\boxed{{{}}}</think> So it is.", False, "a box in thinking"),
            ("", False, "nothing"),
        ],
    )
    def test_where_the_answer_is_found(self, chain_sum: Task, wrap: str, right: bool, reason: str) -> None:
        problem = chain_sum.held_out()[0]
        assert chain_sum.judge([problem], [wrap.format(problem.answer, problem.answer)]) == [right]

    def test_no_answer_and_the_empty_one_are_judged_apart(self) -> None:
        with task("ab", held_out=200) as made:
            empty = next(problem for problem in made.held_out() if problem.answer == "")
            other = next(problem for problem in made.held_out() if problem.answer)
            responses = [
                "",
                "<answer></answer>",
                r"So nothing is left: \boxed{}.",
                r"\boxed{} \boxed{A#}",
                r"\boxed{\text{}}",
            ]
            for order in (responses, responses[::-1]):
                right = dict(zip(responses, [False, True, True, False, True], strict=True))
                assert made.judge([empty] * 5, order) == [right[response] for response in order]
            assert made.judge([other] * 3, responses[:3]) == [False] * 3

    def test_an_answer_that_merely_contains_the_right_one_is_wrong(self) -> None:
        with task("letter_counting", held_out=4) as made:
            problems = made.held_out()
            assert made.judge(problems, [rf"\boxed{{{p.answer}}}" for p in problems]) == [True] * 4
            assert made.judge(problems, [rf"\boxed{{{p.answer} or so}}" for p in problems]) == [False] * 4

    def test_the_library_decides_where_text_does_not(self) -> None:
        # Products of polynomials: any spelling of the right one scores 1. Also the judgement that calls sympy's parser.
        with task("polynomial_multiplication", held_out=2) as made:
            first, second = made.held_out()
            responses = [rf"\boxed{{0 + ({first.answer})}}", rf"\boxed{{1 + ({second.answer})}}", r"\boxed{open('x')}"]
            assert made.judge([first, second, second], responses) == [True, False, False]

    def test_scoring_is_bounded_in_time_and_kept_from_the_interpreter(self, tmp_path: Path) -> None:
        # This data set passes the answer to `eval`.
        with task("spiral_matrix", held_out=1) as made:
            assert isinstance(made, ReasoningGymTask)
            made._pool.limit_s = 1.0  # instead of three, to be done sooner
            (problem,) = made.held_out()
            touched = tmp_path / "touched"
            attack = f"open({str(touched)!r}, 'w') and []"
            bomb = "[sum(i * i for i in range(10**12))]"
            assert made.judge([problem] * 3, [rf"\boxed{{{a}}}" for a in (attack, bomb, problem.answer)]) == [
                False,
                False,
                True,
            ]
            assert not touched.exists()

    @pytest.mark.parametrize(
        "name, options, message",
        [
            ("chain_sums", {}, "task.name: .* found 'chain_sums'; close names: chain_sum"),
            ("aritmetic", {}, "close names: arithmetic"),
            ("mat500", {}, "close names: math500"),
            ("zzzzzz", {}, "task.name: expected one of arithmetic, .* or a reasoning-gym data set, found 'zzzzzz'$"),
            ("chain_sum", {"terms": 3}, "task.options.terms: expected one of min_terms, .* found an unknown option"),
            ("chain_sum", {"seed": 3}, "task.options.seed: .* found an unknown option"),
            ("chain_sum", {"min_terms": 0}, "task.options.min_terms: min_terms must be positive, found min_terms=0"),
            ("chain_sum", {"min_terms": "many"}, "task.options.* found min_terms='many'"),
            ("chain_sum", {"instruction": 3}, "task.options.instruction: expected text, found 3"),
            # Its judge compares the truth of texts, and every text but the empty one is true.
            ("game_of_life_halting", {}, "tells right answers from others, found 'game_of_life_halting'"),
        ],
    )
    def test_names_and_options_are_checked(self, name: str, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            make_task(TaskConfig(name=name, options=options), seed=0)


def test_without_reasoning_gym_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("reasoning_gym", "reasoning_gym.factory"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it now fails
    with pytest.raises(ConfigError, match=r"task.name: .*'chain_sum'.* pip install 'reasoning-gym>="):
        task("chain_sum")


class TestFaultsOfDataSets:
    """What a campaign of faulty data found."""

    @pytest.mark.parametrize(
        "line, message",
        [
            ('{"problem": " ", "answer": "1"}', "expected a question in 'problem', found none"),
            ('{"problem": "a", "answer": NaN}', "expected a finite number in 'answer', found nan"),
            ('{"problem": "a", "answer": 1e999}', "expected a finite number in 'answer', found inf"),
            ('{"problem": "\\ud800", "answer": "1"}', "expected text in 'problem', found half of a surrogate pair"),
            (" " * 17_000_000 + "{", "expected a line of at most 16777216 bytes, found a longer one"),
            ('{"problem": "' + "a" * 17_000_000, "expected a line of at most 16777216 bytes, found a longer one"),
        ],
    )
    def test_a_row_that_no_run_can_use(self, tmp_path: Path, line: str, message: str) -> None:
        path = write(tmp_path / "set.jsonl", [ROWS[0], line])
        with pytest.raises(ConfigError, match=f"set.jsonl:2: {message}"):
            task("jsonl", held_out=0, path=path)

    def test_what_is_in_both_sets_is_said_whatever_its_spelling(self, tmp_path: Path) -> None:
        train = [
            {"problem": r"What is $\dfrac{1}{2}\, x$?", "answer": "1"},
            {"problem": "What is ２ + ２?", "answer": "4"},  # full-width digits
            *ROWS[:3],
        ]
        held_out = [{"problem": r"what is \frac{1}{2} x", "answer": "1"}, {"problem": "What is 2 + 2 ?", "answer": "4"}]
        options = {"path": write(tmp_path / "set.jsonl", train), "eval_path": write(tmp_path / "e.jsonl", held_out)}
        said = "task.options.eval_path: 2 of 5 problems to train on .*, such as .*set.jsonl:1 and .*e.jsonl:1"
        with pytest.warns(RuntimeWarning, match=said):
            made = task("jsonl", **options)
        assert {made.train_problem(i).prompt for i in range(10)} == {row["problem"] + INSTRUCTION for row in ROWS[:3]}

    def test_equal_problems_with_different_answers_are_said(self, tmp_path: Path) -> None:
        rows = [{"problem": "Half?", "answer": answer} for answer in ("1/2", "0.5", 2)]
        path = write(tmp_path / "set.jsonl", rows)
        with pytest.warns(RuntimeWarning, match="path: 1 problems .*set.jsonl:3 has '2', .*set.jsonl:1 '1/2'"):
            made = task("jsonl", held_out=0, path=path)
        assert made.train_problem(0).answer == "1/2"

    def test_other_problems_are_not_taken_for_the_same(self) -> None:
        from g2rl.tasks.base import likeness

        pairs = [("1.5 x", "15 x"), ("x - 1", "x + 1"), ("12", "1 2"), ("a b", "ab"), ("x^2", "x_2"), ("f(x)", "f x")]
        assert not [pair for pair in pairs if likeness(pair[0]) == likeness(pair[1])]
