"""Tasks from outside: what a class has to say, what is said of mistakes in it, and every command with one."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from g2rl.cli import main
from g2rl.config import ConfigError, RewardConfig, TaskConfig, load_config
from g2rl.dry_run import dry_run
from g2rl.plugins import PluginError
from g2rl.rewards import judge_episodes
from g2rl.tasks import make_task
from g2rl.tasks.base import Task
from g2rl.types import Episode, Problem
from tests.g2rl.json_lines import read, untimed
from tests.g2rl.ranks import launch

ROOT = Path(__file__).parents[2]
HEAD = """
import itertools, os, random, signal, time
from dataclasses import dataclass
from pathlib import Path
from g2rl.tasks.custom import CustomTask
from g2rl.types import Problem
"""
# A random model earns something: any last digit will do that is even where the sum is.
PARITY = f"""{HEAD}
@dataclass
class Options:
    largest: int = 5
    path: str | None = None

    def __post_init__(self):
        if self.largest < 1:
            raise ValueError(f"largest: expected 1 or more, found {{self.largest}}")

class Parity(CustomTask):
    Options = Options

    def problems(self):
        path = self.options.path
        numbers = list(map(int, Path(path).read_text().split())) if path else range(1, self.options.largest + 1)
        for a in numbers:
            for b in numbers:
                yield Problem(f"{{a}}+{{b}}", f"Even or odd, {{a}} + {{b}}?", str(a + b), {{"sum": a + b}})

    def answer(self, problem, response):
        digits = [character for character in response if character in "0123456789"]
        return digits[-1] if digits else None

    def right(self, problem, answer):
        return int(answer) % 2 == problem.data["sum"] % 2

calls = itertools.count(1)

class Killed(Parity):
    def answer(self, problem, response):
        if next(calls) == 100 and os.environ.get("KILLED"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(problem, response)

class OfARank(Parity):
    def problems(self):
        return reversed(list(super().problems())) if os.environ.get("RANK") == "1" else super().problems()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the test's folder, also for processes that it starts, and of no other test's."""
    (tmp_path / "parity.py").write_text(PARITY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    for name in ("parity", "own"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def task(name: str = "parity:Parity", held_out: int = 5, seed: int = 0, **options: Any) -> Task:
    return make_task(TaskConfig(name=name, options=options, held_out=held_out), seed)


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Task]:
    """Makes a task of a class body; without `problems` those of ten numbers."""

    def make(body: str, held_out: int = 2) -> Task:
        if not re.search("^(def )?problems", body, re.MULTILINE):
            body += '\nproblems = lambda self: [Problem(f"{n}", f"Say {n}.", f"{n}") for n in range(10)]'
        (tmp_path / "own.py").write_text(HEAD + "class Own(CustomTask):\n    " + body.replace("\n", "\n    ") + "\n")
        return task("own:Own", held_out)

    return make


def judged(made: Task, *responses: str) -> list[bool]:
    """Judgement of responses to the first training problem, as a step judges them."""
    problem = made.train_problem(0)
    episodes = [Episode(problem, (1,), (2,), text, True) for text in responses]
    return [verdict.correct for verdict in judge_episodes(episodes, made, [RewardConfig()])]


# ---- what a class says -----------------------------------------------------------------------------------------------


def test_problems_are_split_as_those_of_other_tasks() -> None:
    with task() as made, task(seed=1) as other:
        train = [made.train_problem(i) for i in range(20)]
        assert {p.id: p.answer for p in train + made.held_out()} == {
            f"{a}+{b}": str(a + b) for a in range(1, 6) for b in range(1, 6)
        }
        assert (made.name, len(made.held_out())) == ("parity:Parity", 5)
        assert other.held_out() == made.held_out()
        assert [other.train_problem(i) for i in range(20)] != train == [made.train_problem(i) for i in range(20)]
        assert task(largest=2, held_out=1).train_problem(0).data["sum"] <= 4


def test_its_own_judge() -> None:
    with task() as made:
        odd = Problem("1+2", "", "3", {"sum": 3})
        assert made.judge([odd] * 4, ["4 or 5", "5 or 4", "", "none"]) == [True, False, False, False]
        assert [made.extract(text, odd) for text in ("4 or 5", "none")] == ["5", None]


ASYNC = """
at_once = 2
started = most = 0
async def right(self, problem, answer):
    import asyncio
    Own.started += 1
    Own.most = max(Own.most, Own.started)
    await asyncio.sleep(0.1)
    Own.started -= 1
    return {"x": None}.get(answer, answer == problem.answer)
"""


def test_an_async_judge_judges_many_at_a_time(own: Callable[..., Task]) -> None:
    made = own(ASYNC.strip())
    gold = made.train_problem(0).answer
    box = rf"\boxed{{{gold}}}"
    assert judged(made, box, "none", r"\boxed{77}", box) == [True, False, False, True]
    assert sys.modules["own"].Own.most == 2
    with pytest.raises(PluginError, match="task.name: expected own:Own.right to return True or False, found None for"):
        judged(made, box, r"\boxed{x}")


def test_without_a_judge_the_box_is_compared(own: Callable[..., Task]) -> None:
    made = own("limit_s = 0.1")
    gold = made.train_problem(0).answer
    responses = (rf"\boxed{{{gold}}}", rf"\boxed{{{gold}.0}}", gold, rf"\boxed{{{gold}}} or \boxed{{77}}", "")
    assert judged(made, *responses) == [True, True, False, False, False]


def test_held_out_problems_of_its_own_are_not_trained_on(own: Callable[..., Task]) -> None:
    body = (
        "problems = lambda self: [Problem(f'{n}', f'Say {n}.', f'{n}') for n in range(10)]\n"
        "held_out_problems = lambda self: [Problem(f'e{n}', f'Say {n}.', f'{n}') for n in range(8, 12)]"
    )
    with pytest.warns(RuntimeWarning, match="task.name: 2 of 10 problems to train on are held out as well, such as 8"):
        made = own(body, held_out=64)
    assert sorted(problem.id for problem in made.held_out()) == ["e10", "e11", "e8", "e9"]
    assert {made.train_problem(i).id for i in range(8)} == {str(n) for n in range(8)}


def test_what_it_needs_is_made_before_its_problems_and_closed(own: Callable[..., Task], tmp_path: Path) -> None:
    body = (
        "def __init__(self, options):\n    super().__init__(options)\n    self.numbers = range(3)\n"
        "problems = lambda self: [Problem(f'{n}', f'Say {n}.', '') for n in self.numbers]\n"
        f"def close(self):\n    Path({str(tmp_path / 'closed')!r}).touch()"
    )
    with own(body) as made:
        assert len({made.train_problem(i).id for i in range(5)}) == 1
        assert not (tmp_path / "closed").exists()
    (tmp_path / "closed").unlink()
    with pytest.raises(ConfigError, match="task.held_out: expected fewer than the task's 3 distinct problems, found 3"):
        sys.modules.pop("own") and own(body, held_out=3)
    assert (tmp_path / "closed").exists()


def test_a_name_that_a_package_announces(tmp_path: Path) -> None:
    metadata = tmp_path / "parity-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: parity\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[g2rl.tasks]\neven = parity:Parity\njsonl = parity:Parity\n")
    with task("even", largest=3) as made:
        assert (made.name, len({made.train_problem(i).id for i in range(4)})) == ("even", 4)
    with pytest.raises(ConfigError, match="task.options.path: expected a .jsonl file"):  # the package's own is meant
        task("jsonl")
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match="task.name: expected one of arithmetic, .*, even, .*close names: even"):
        task("evenn")


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("parity:", "expected module:Class, a class derived from g2rl.tasks.custom.CustomTask, found 'parity:'"),
        ("nowhere:Task", "expected a module that can be imported, found 'nowhere': ModuleNotFoundError"),
        ("parity.py:Parity", "a module is named as Python imports it, without folder and .py"),
        ("parity:Odd", "found no 'Odd' in parity"),
        ("parity:calls", r"expected module:Class, .*, found count\(1\)"),
        ("parity:Problem", "expected module:Class, .*, found <class 'g2rl.types.Problem'>"),
        ("parity:CustomTask", "expected a class with problems, found .*CustomTask'> without problems"),
    ],
)
def test_names_are_checked(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^task.name: .*{message}"):
        task(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"larges": 3}, r"task.options.larges: Key 'larges' not in 'Options'. Did you mean: 'largest'\?"),
        ({"largest": "many"}, "task.options.largest: expected a whole number, found 'many'"),
        ({"largest": 0}, "task.options.largest: expected 1 or more, found 0"),
        ({"largest": 2}, "task.held_out: expected fewer than the task's 4 distinct problems, found 5"),
        ({"path": "/nowhere"}, "to return problems, found FileNotFoundError: .*'/nowhere' in .*parity.py, line 22$"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}" if message.startswith("task.") else message):
        task(**options)


PROBLEMS = "task.name: expected own:Own.problems to return"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "@dataclass\nclass Options:\n    def __post_init__(self): 1 / 0",
            "task.options: expected what <class 'own.Own.Options'> takes, found ZeroDivisionError: division by zero",
        ),
        ("Options = 3", "task.options: expected a dataclass as Options, found 3"),
        (
            "def __init__(self): pass",
            "task.name: expected a class that is made of its options, found own:Own: too many",
        ),
        (
            "def __init__(self, options): 1 / 0",
            "task.name: expected own:Own to be made of its options, found ZeroDivisionError: .* in .*own.py, line 8$",
        ),
        ("problems = None", r"task.name: expected own:Own.problems to take \(\): None is not a callable object"),
        ("def problems(self): pass", f"{PROBLEMS} problems, found None$"),
        ("def problems(self): return []", f"{PROBLEMS} problems, found none$"),
        ("def problems(self): return 3", f"{PROBLEMS} problems, found TypeError: 'int' object is not iterable"),
        ("def problems(self): yield 1 / 0", f"{PROBLEMS} problems, found ZeroDivisionError: .* in .*own.py, line 8$"),
        ("def problems(self): yield 'a', 'b'", rf"{PROBLEMS} g2rl.types.Problem, found \('a', 'b'\) as number 1"),
        (
            "def problems(self): yield from [Problem('a', 'b', 'c'), Problem('b', 'c', 3)]",
            f"{PROBLEMS} problems with text as answer, found 3 in number 2",
        ),
        ("def problems(self): yield Problem(1, 'b', 'c')", f"{PROBLEMS} problems with text as id, found 1 in number 1"),
        ("def problems(self): yield Problem('a', ' ', 'c')", "problems with text as prompt, found ' ' in number 1"),
        (r"def problems(self): yield Problem('a', '\ud800', '')", "problems with text as prompt, found .*ud800' in"),
        ("def problems(self): yield Problem('a', 'b', '', 3)", "problems with a dict as data, found 3 in 'a'"),
        (
            "def problems(self): yield Problem('a', 'b', '', {'f': lambda: 3})",
            "problems with data to be pickled, found .*lambda.* in 'a'",
        ),
        (
            "def problems(self): yield from [Problem('a', 'b', ''), Problem('a', 'c', '')]",
            f"{PROBLEMS} problems with an id of their own, found 'a' again in number 2",
        ),
        (
            "def problems(self): yield from (Problem(str(n), f'{n} {random.random()}', '') for n in range(9))",
            f"{PROBLEMS} the same problems each time, found others; what is drawn needs a seed",
        ),
        ("def held_out_problems(self): return []", "own:Own.held_out_problems to return problems, found none$"),
        ("def held_out_problems(self, seed): pass", r"Own.held_out_problems to take \(\): missing a required .*'seed'"),
        ("at_once = 0", "task.name: expected Own.at_once of 1 or more, found 0$"),
        (
            "async def answer(self, problem, response): return ''",
            r"own:Own.answer to take \(problem, response\): it is async, and nothing would await it",
        ),
        (
            "def right(self, problem): return True",
            r"task.name: expected own:Own.right to take \(problem, answer\): too many positional arguments",
        ),
        (
            "def right(self, problem, answer): return problem.data['sum']",
            "own:Own.right to return True or False, found KeyError: 'sum' for problem '.' in .*own.py, line 8$",
        ),
        (
            "def right(self, problem, answer): return 1.0",
            "task.name: expected own:Own.right to return True or False, found 1.0 for problem '.'$",
        ),
        (
            "def answer(self, problem, response): return response.split()",
            r"task.name: expected own:Own.answer to return text or None, found \[\] for problem '.'$",
        ),
        (
            "limit_s = 0.2\ndef right(self, problem, answer): time.sleep(60)",
            "True or False within Own.limit_s = 0.2 s, found none for problem '.' in .*own.py, line 9$",
        ),
    ],
)
def test_mistakes_are_named_before_training(own: Callable[..., Task], body: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        own(body)
    assert not isinstance(raised.value, PluginError)  # of which one is told how the run goes on


def test_an_endless_generator(own: Callable[..., Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("g2rl.tasks.custom._MAX_PROBLEMS", 1000)
    with pytest.raises(ConfigError, match="at most 1000 problems, found more; itertools.islice ends a generator"):
        own("def problems(self): yield from (Problem(str(n), str(n), '') for n in itertools.count())")


def test_a_judge_that_takes_the_right_answer_for_wrong(own: Callable[..., Task]) -> None:
    with pytest.warns(RuntimeWarning, match="own:Own.right takes the answer of problem '.' itself for wrong"):
        own("def right(self, problem, answer): return answer == 3")


FAULTS = [
    ("x", "return {}['x']", "found KeyError: 'x' for problem '{}' in .*own.py, line 10$"),
    ("x", "raise SystemExit", "found SystemExit:  for problem '{}' in .*own.py, line 10$"),
    ("x", "time.sleep(60)", "within Own.limit_s = 0.2 s, found none for problem '{}' in .*own.py, line 10$"),
    ("x", "return None", "found None for problem '{}'$"),
]


@pytest.mark.parametrize(("answer", "line", "message"), FAULTS)
def test_a_judge_that_fails_on_an_answer(own: Callable[..., Task], answer: str, line: str, message: str) -> None:
    made = own(
        f"limit_s = 0.2\ndef right(self, problem, answer):\n    if answer == {answer!r}: {line}\n    return True"
    )
    assert judged(made, r"\boxed{y}", "none") == [True, False]
    expected = "^task.name: expected own:Own.right to return True or False.* " + message
    with pytest.raises(PluginError, match=expected.format(made.train_problem(0).id)):
        judged(made, r"\boxed{y}", r"\boxed{x}")


# ---- every command ---------------------------------------------------------------------------------------------------

SMALL = {
    "steps": 4,
    "model": {"autocast": "none"},
    "rollout": {"dtype": "float32", "prompts": 4, "group_size": 4, "max_new_tokens": 6},
    "task": {"name": "parity:Parity", "options": {"largest": 4}, "held_out": 6},
    "eval": {"every": 2, "samples": 2, "ks": [1, 2]},
    "checkpoint": {"every": 1},
    "optim": {"lr": 1e-3},
}


@pytest.fixture
def settings(tmp_path: Path, tiny_model: Path) -> list[str]:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return [str(tmp_path / "small.yaml"), f"model.path={tiny_model}", f"runs_dir={tmp_path}"]


def test_train_evaluate_report_and_geometry(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *settings, "name=run"]) == 0
    run = tmp_path / "run"
    for row in read(run / "completions.jsonl"):
        a, b = (int(n) for n in row["problem"].split("+"))
        digits = re.findall("[0-9]", row["response"])
        assert row["correct"] == (digits != [] and int(digits[-1]) % 2 == (a + b) % 2)
    rows = untimed(run)
    assert [row["step"] for row in rows if "eval/pass@1" in row] == [0, 2, 4]
    assert 0 < rows[-1]["train/accuracy"] < 1 and 0 < rows[-1]["eval/maj@2"] < 1
    assert len((run / "held_out.txt").read_text().split()) == 6
    assert "parity:Parity" in (run / "report" / "report.md").read_text()

    assert main(["eval", str(run)]) == 0
    kept = json.loads((run / "checkpoints" / "step-000004" / "eval.json").read_text())
    assert kept["metrics"] == {key: value for key, value in rows[-1].items() if key.startswith("eval/")}
    assert "6 held-out problems of parity:Parity" in capsys.readouterr().out

    sizes = "--problems 3 --samples 4 --encoder none --out".split()
    assert main(["geometry", str(run), *sizes, str(tmp_path / "geometry")]) == 0
    found = json.loads((tmp_path / "geometry" / "geometry.json").read_text())
    assert (found["settings"]["task"], found["settings"]["options"]) == ("parity:Parity", {"largest": 4})
    with (tmp_path / "geometry" / "problems.csv").open() as table:
        assert {row["problem"] for row in csv.DictReader(table)} == set(kept["problems"][:3])


def test_a_killed_run_resumes_to_the_same_numbers(tmp_path: Path, settings: list[str]) -> None:
    killed = ["task={name: parity:Killed, options: {largest: 4}}", "name=killed"]
    environment = {**os.environ, "KILLED": "1"}
    command = [sys.executable, "-m", "g2rl", "train", *settings, *killed]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -9
    assert 0 < len(untimed(tmp_path / "killed")) < 5
    assert main(["train", f"resume={tmp_path / 'killed'}"]) == 0
    assert main(["train", *settings, "name=whole"]) == 0
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")


def test_two_ranks_do_what_one_process_does(tmp_path: Path, settings: list[str]) -> None:
    assert main(["train", *settings, "name=alone"]) == 0
    commands = [["train", *settings, "name=ranks"], ["train", *settings, "name=other", "task.name=parity:OfARank"]]
    ended = launch([commands] * 2, tmp_path / "printed")
    keys = ("step", "problem", "response", "correct")
    alone, ranks = (read(tmp_path / name / "completions.jsonl") for name in ("alone", "ranks"))
    assert [[row[key] for key in keys] for row in ranks] == [[row[key] for key in keys] for row in alone]
    for of_alone, of_ranks in zip(untimed(tmp_path / "alone"), untimed(tmp_path / "ranks"), strict=True):
        exact = [key for key in of_alone if key.startswith(("eval/", "train/accuracy"))]
        assert [of_ranks[key] for key in exact] == pytest.approx([of_alone[key] for key in exact])
    said = "task.name: expected the same problems of parity:OfARank on every rank, found others"
    assert any(rank.status == 2 and said in rank.printed for rank in ended), ended  # the other may be ended first
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def test_dry_run(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(load_config(settings[0], settings[1:]))
    assert "on parity:Parity works" in capsys.readouterr().out


def test_compare(tmp_path: Path, tiny_model: Path, settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    study = {
        "name": "own", "base": "small.yaml", "baseline": "grpo", "seeds": [0], "folder": str(tmp_path / "study"),
        "settings": {"model": {"path": str(tiny_model)}},
        "tasks": {"parity": {}, "sums": {"task": {"name": "parity:Nothing"}}},
        "methods": {"grpo": {"method": "grpo"}},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    assert main(["compare", str(tmp_path / "study.yaml")]) == 2
    assert "task sums, method grpo: task.name: expected module:Class, " in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "study.yaml"), "tasks=[parity]"]) == 0
    found = json.loads((tmp_path / "study" / "results.json").read_text())
    assert found["tasks"]["parity"]["held_out"] == 6
    assert 0 < found["tasks"]["parity"]["methods"]["grpo"]["scores"]["pass@1"]["value"] < 1


def test_a_failure_in_a_run_says_how_it_goes_on(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = PARITY.replace("return digits[-1]", "return {}[0] if next(calls) > 60 else digits[-1]")
    number = 1 + next(i for i, line in enumerate(source.splitlines()) if "return {}[0]" in line)
    (tmp_path / "parity.py").write_text(source)
    assert main(["train", *settings, "name=run", "eval.every=0"]) == 2
    said = capsys.readouterr().err
    assert re.search(
        f"task.name: expected parity:Parity.answer .* found KeyError: 0 for problem .* line {number};", said
    )
    assert f"once that is mended, continue with: g2rl train resume={tmp_path / 'run'}\n" in said
    (tmp_path / "parity.py").write_text(PARITY)
    del sys.modules["parity"]
    assert main(["train", f"resume={tmp_path / 'run'}"]) == 0
    assert [row["step"] for row in untimed(tmp_path / "run")] == [1, 2, 3, 4]

    (tmp_path / "parity.py").write_text(PARITY.replace('data["sum"]', 'data["total"]'))
    del sys.modules["parity"]
    assert main(["train", *settings, "name=broken"]) == 2
    said = capsys.readouterr().err
    assert "found KeyError: 'total' for problem" in said and "continue" not in said
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize(("numbers", "found"), [("1 2 3 4", 0), ("4 1 2 3", 4), ("1 2 3 9", 3)])
def test_what_was_trained_on_is_not_held_out(
    tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str], numbers: str, found: int
) -> None:
    """Its data are found from anywhere; changed in place, they may hold out what was trained on."""
    (tmp_path / "numbers").write_text("1 2 3 4")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path)
        assert main(["train", *settings, "name=run", "steps=1", "task.options={path: numbers}"]) == 0
    capsys.readouterr()
    (tmp_path / "numbers").write_text(numbers)
    assert main(["eval", str(tmp_path / "run")]) == (2 if found else 0)
    said = capsys.readouterr().err
    assert main(["train", f"resume={tmp_path / 'run'}", "steps=2"]) == (2 if found else 0)
    for told in (said, capsys.readouterr().err):
        assert (f"expected problems that the run held out before, found {found} of 6 others" in told) == (found > 0)


# ---- the documentation's own -----------------------------------------------------------------------------------------


def test_the_example(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of the page, as it stands there, and its command with a tiny model."""
    page = (ROOT / "docs" / "TRAINING.md").read_text()
    source = re.search(r"```python\n# multiples\.py\n(.*?)```", page, re.DOTALL).group(1)
    assert len([line for line in source.splitlines() if line.strip()]) <= 15
    (tmp_path / "multiples.py").write_text(source)
    command = re.search(r"^g2rl train (.*multiples:Multiples.*)$", page, re.MULTILINE).group(1).split()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    few = ["model.path=" + str(tiny_model), "steps=1", "rollout.prompts=2", "eval.every=0"]
    few += ["rollout.max_new_tokens=4"]
    assert main(["train", *command, *few, "name=multiples"]) == 0
    config = load_config("runs/multiples/config.yaml")
    with make_task(config.task, 0) as made:
        assert len(made.held_out()) + len({made.train_problem(i).id for i in range(2000)}) == 998
        problem = Problem("7", "", "", {"n": 7})
        answers = ["1001", "1002", "994", "7000", "seven", "9" * 6000, "-1001"]
        assert made.judge([problem] * 7, [rf"\boxed{{{answer}}}" for answer in answers]) == [
            True, False, False, True, False, False, False,
        ]  # fmt: skip
        assert made.judge([problem], ["1001"]) == [False]
