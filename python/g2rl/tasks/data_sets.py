"""Data sets by name: from the Hugging Face hub, or from a local JSON Lines file of the same name."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from g2rl.config import ConfigError
from g2rl.tasks.base import apart, check_held_out, distinct, option, read_options, sample, text_option
from g2rl.tasks.choice import LETTERS
from g2rl.tasks.grading import JUDGES, JudgedTask
from g2rl.tasks.jsonl import INSTRUCTION
from g2rl.tasks.rows import SURROGATE, column, file_rows, hub_rows, plain
from g2rl.types import Problem

CHOICE_INSTRUCTION = "Please reason step by step, and put the letter of the right option within \\boxed{}."
_DATA = "data (task.options.data, --data)"
_MISSING = 0.01  # share of rows that may have no answer, as two of MATH's; more point to a wrong column


@dataclass(frozen=True)
class DataSet:
    """Where a data set is on the hub, and what its columns hold.

    Attributes:
        path, subset: as `datasets.load_dataset` takes them.
        train, test: splits to train and to evaluate on; equal where there is one only.
        problem, answer: columns. Local files may have `problem` and `answer` instead.
        answer_after: the answer is what follows the last of these in its column, where there is one.
        judge: `math`, or `choice` with the options in a column `options` and their letter as the answer.
        wrong: columns of the wrong options, where `answer` holds the right one's text: their order is drawn.
        access: how to get access to a gated data set.
    """

    path: str
    train: str
    test: str
    problem: str
    answer: str = "answer"
    judge: Literal["math", "choice"] = "math"
    subset: str | None = None
    answer_after: str | None = None
    wrong: tuple[str, ...] = ()
    access: str = ""


DATA_SETS = {
    "math": DataSet("zwhe99/MATH", "train", "test", "problem", "expected_answer"),
    "math12k": DataSet("hiyouga/math12k", "train", "test", "problem"),
    "gsm8k": DataSet("openai/gsm8k", "train", "test", "question", subset="main", answer_after="####"),
    "math500": DataSet("HuggingFaceH4/MATH-500", "test", "test", "problem"),
    "amc23": DataSet("math-ai/amc23", "test", "test", "question"),
    "aime24": DataSet("HuggingFaceH4/aime_2024", "train", "train", "problem"),
    "aime25": DataSet("math-ai/aime25", "test", "test", "problem"),
    "minerva": DataSet("math-ai/minervamath", "test", "test", "question"),
    "mmlu_pro": DataSet("TIGER-Lab/MMLU-Pro", "test", "test", "question", judge="choice"),
    "gpqa": DataSet(
        "Idavidrein/gpqa", "train", "train", "Question", "Correct Answer", "choice", "gpqa_diamond",
        wrong=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        access="; the data set is gated: accept its terms on its page of the hub, then log in with `hf auth login` "
        "or set HF_TOKEN",
    ),
}  # fmt: skip
"""Every data set by its name in `task.name` and in suites."""


@dataclass(frozen=True)
class DataSetOptions:
    data: str | None = text_option(None)
    """Folder with NAME.jsonl or NAME_SPLIT.jsonl, or such a file; None takes the hub."""
    instruction: str | None = option(None, "text or null", lambda v: v is None or isinstance(v, str))
    """Text added to each problem, on a line of its own; None takes the judge's own."""
    allow_number: bool = option(False, "true or false", lambda v: isinstance(v, bool))
    """Accept the last number of a response that has no box; mathematics only."""


class DataSetTask(JudgedTask):
    """A data set of `DATA_SETS`, for training.

    Held-out problems come from its test split. They come from the training problems where it has none, or none beside
    the local training file.

    Args:
        name: key of `DATA_SETS`.
        options: see `DataSetOptions`.
        held_out: number of problems for evaluation; a test split may have fewer.
        seed: of the order of training.

    Raises:
        ConfigError: see `load_problems`; or an unknown option, or no problem left to train on.
    """

    def __init__(self, name: str, options: Mapping[str, Any], held_out: int, seed: int) -> None:
        read = read_options(DataSetOptions, options)
        spec = DATA_SETS[name]
        if read.allow_number and spec.judge != "math":
            raise ConfigError(f"task.options.allow_number: expected false with {name}, whose answers are letters")
        train = load_problems(name, spec.train, read.data, read.instruction)
        source, own = train, False
        if spec.test != spec.train and held_out and (read.data is None or _file(name, spec.test, read.data)):
            source, own = load_problems(name, spec.test, read.data, read.instruction), True
        if source.keys() == train.keys():
            check_held_out(held_out, len(source))
            own = False
        chosen = sample(source, held_out)
        judge = JUDGES[spec.judge](**({"allow_number": True} if read.allow_number else {}))
        super().__init__(name, apart(train, chosen, "task.held_out", own), [*chosen.values()], seed, judge)
        self.instruction = _instruction(spec, read.instruction)


def load_problems(name: str, split: str, data: str | None = None, instruction: str | None = None) -> dict[str, Problem]:
    """Return the distinct problems of a data set by their content, in its order.

    Args:
        name: key of `DATA_SETS`.
        split: of the hub's data set.
        data, instruction: see `DataSetOptions`.

    Raises:
        ConfigError: no such file, no access to the hub, a row without the columns or with a value they cannot hold.
    """
    spec = DATA_SETS[name]
    instruction = _instruction(spec, instruction)
    read = {
        place: _problem(spec, f"{name}/{split}:{number}", place, row, instruction)
        for number, (place, row) in enumerate(_rows(name, split, data), 1)
    }
    problems = distinct(filter(None, read.values()), f"{name}, split {split}")
    missing, total = [place for place, problem in read.items() if problem is None], len(read)
    if len(missing) > _MISSING * total or not problems:
        where = f", the first without at {missing[0]}" if missing else ""
        raise ConfigError(f"{name}: expected rows with an answer, found {total - len(missing)} of {total}{where}")
    return problems


def _instruction(spec: DataSet, given: str | None) -> str:
    if given is not None:
        return given
    return INSTRUCTION if spec.judge == "math" else CHOICE_INSTRUCTION


def _rows(name: str, split: str, data: str | None) -> Iterable[tuple[str, Any]]:
    spec = DATA_SETS[name]
    options = " and options" if spec.judge == "choice" else ""
    if data is not None:
        file = _file(name, split, data)
        if file is None:
            found = ", ".join(sorted(p.name for p in Path(data).glob(f"{name}*"))) or "neither"
            raise ConfigError(f"{_DATA}: expected {name}.jsonl or {name}_{split}.jsonl in {data!r}, found {found}")
        return file_rows(str(file), _DATA)
    way_out = (
        f"{spec.access}. Without the hub: put the rows, one JSON object a line with problem, answer{options}, into "
        f"{name}.jsonl and name its folder: --data FOLDER, or task.options.data=FOLDER in training"
    )
    return hub_rows(spec.path, spec.subset, split, f"{name}: expected a data set that `datasets` can load", way_out)


def _file(name: str, split: str, data: str) -> Path | None:
    """Return the file of a split: `data` itself, ``NAME_SPLIT.jsonl``, ``NAME.jsonl``, or one that says its rows."""
    path = Path(data)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"{_DATA}: expected a folder or a .jsonl file, found nothing at {data!r}")
    for stem in (f"{name}_{split}", name):
        if (path / f"{stem}.jsonl").is_file():
            return path / f"{stem}.jsonl"
    counted = [p for p in path.iterdir() if re.fullmatch(rf"{name}(_{split})?_[0-9]+\.jsonl", p.name)]
    return counted[0] if len(counted) == 1 else None


def _problem(spec: DataSet, id: str, place: str, row: Any, instruction: str) -> Problem | None:
    """Return the problem in a row, None where it has no answer, or an option that another one equals."""
    question = column(row, (spec.problem, "problem"), place, "the problem", (str,))
    answer = column(row, (spec.answer, "answer"), place, "the answer", (str, int, float, type(None)))
    if not question.strip():
        raise ConfigError(f"{place}: expected a question, found none")
    text = "" if answer is None else plain(answer)
    if spec.answer_after is not None:
        text = text.rpartition(spec.answer_after)[2]
    if not text.strip():
        return None
    parts = [question]
    options: list[str] = []
    if spec.judge == "choice":
        options, text = _options(spec, question, text, place, row)
        texts = [option.strip() for option in options]
        if texts.count(texts[LETTERS.index(text)]) > 1:
            return None  # the same as another: no letter is right
        parts.append("\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)))
    parts += [instruction] if instruction else []
    return Problem(id, "\n".join(parts), text.strip(), {"options": options} if options else {})


def _options(spec: DataSet, question: str, answer: str, place: str, row: dict[str, Any]) -> tuple[list[str], str]:
    """Return a row's options and the letter of the right one."""
    if spec.wrong and spec.wrong[0] in row:
        wrong = [column(row, (name,), place, "a wrong option", (str,)) for name in spec.wrong]
        options = [text.strip() for text in (answer, *wrong)]
        random.Random(question).shuffle(options)  # the same order in every run
        return options, LETTERS[options.index(answer.strip())]
    options = column(row, ("options",), place, "the options", (list,))
    are_texts = all(isinstance(text, str) and not SURROGATE.search(text) for text in options)
    if not 2 <= len(options) <= len(LETTERS) or not are_texts:
        raise ConfigError(f"{place}: expected 2 to {len(LETTERS)} texts in 'options', found {str(options)[:80]}")
    letter = answer.strip()
    if letter not in LETTERS[: len(options)]:
        raise ConfigError(f"{place}: expected a letter from A to {LETTERS[len(options) - 1]}, found {letter[:80]!r}")
    return options, letter
