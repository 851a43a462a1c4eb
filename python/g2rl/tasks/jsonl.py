"""Problems with final answers from a JSON Lines file or a data set of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g2rl.config import ConfigError
from g2rl.tasks.base import apart, check_held_out, distinct, option, read_options, sample, text_option
from g2rl.tasks.grading import JudgedTask, MathJudge
from g2rl.tasks.rows import column, file_rows, hub_rows, plain
from g2rl.types import Problem

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class JsonlOptions:
    path: str = option(None, "a .jsonl file or the name of a hub data set", lambda v: isinstance(v, str) and v != "")
    """File whose name ends in .jsonl, one JSON object a line; anything else is a data set for `datasets`."""
    split: str | None = text_option(None)
    """Split of a hub data set; None takes its `train`."""
    subset: str | None = text_option(None)
    """Configuration name of a hub data set."""
    eval_path: str | None = text_option(None)
    """File or data set of the held-out problems; None takes `path`."""
    eval_split: str | None = text_option(None)
    """Split of the held-out problems; None takes `split`. Without this and `eval_path` they come from `path`."""
    problem_key: str = text_option("problem")
    """Column of the question."""
    answer_key: str = text_option("answer")
    """Column of the final answer, text or number."""
    answer_after: str | None = text_option(None)
    """Keep what follows the last occurrence of this in the answer column: `####` for GSM8K's solutions."""
    instruction: str = text_option(INSTRUCTION)
    """Text added to each problem, on a line of its own."""
    allow_number: bool = option(False, "true or false", lambda v: isinstance(v, bool))
    """Accept the last number of a response that has no box."""


class JsonlTask(JudgedTask):
    """A data set of problems, judged by `MathVerifier`.

    Problems equal but for blanks are kept once, and none that is held out, or spelled like one, is trained on; a
    warning says how many are in both, and how many equal problems have different answers.

    Args:
        options: see `JsonlOptions`.
        held_out: number of problems for evaluation; an evaluation set of its own may have fewer.
        seed: of the order of training.

    Raises:
        ConfigError: an unknown option, a value out of range, data that cannot be loaded, or a row without the
            columns; the message names the file and line.
    """

    def __init__(self, options: Mapping[str, Any], held_out: int, seed: int) -> None:
        read = read_options(JsonlOptions, options)
        eval_path = read.eval_path or read.path
        _check_of_data_sets(read, eval_path)
        problems = _load(read, "path", read.path, read.split)
        if read.eval_path or read.eval_split:
            key = "eval_path" if read.eval_path else "eval_split"
            source = _load(read, key, eval_path, read.eval_split or read.split)
            chosen = sample(source, held_out)
            train = apart(problems, chosen, f"task.options.{key}", own=True)
        else:
            check_held_out(held_out, len(problems))
            chosen = sample(problems, held_out)
            train = apart(problems, chosen, "task.held_out", own=False)
        super().__init__("jsonl", train, list(chosen.values()), seed, MathJudge(read.allow_number))
        self.instruction = read.instruction


def _check_of_data_sets(options: JsonlOptions, eval_path: str) -> None:
    """Raise `ConfigError` for what chooses a part of a data set, and would count for nothing where a file is read."""
    sources = {"split": (options.path,), "eval_split": (eval_path,), "subset": (options.path, eval_path)}
    for key, paths in sources.items():
        if (value := getattr(options, key)) is not None and all(_is_file(path) for path in paths):
            raise ConfigError(
                f"task.options.{key}: expected none with a .jsonl file, which is read whole, found {value!r} with "
                f"{paths[0]!r}"
            )


def _is_file(path: str) -> bool:
    return path.endswith(".jsonl")


def _load(options: JsonlOptions, key: str, path: str, split: str | None) -> dict[str, Problem]:
    """Read all problems of one source by their content, the first of equal ones."""
    named = f"task.options.{key}"
    expected = f"{named}: expected a .jsonl file or a data set that `datasets` can load"
    is_file = _is_file(path)
    if not is_file and Path(path).is_file():  # of which `datasets` would say that there is none
        raise ConfigError(f"{named}: expected a file named .jsonl, with one JSON object a line, found {path!r}")
    rows = file_rows(path, named) if is_file else hub_rows(path, options.subset, split or "train", expected)
    problems = distinct((_problem(options, place, row) for place, row in rows), named)
    if not problems:
        raise ConfigError(f"{named}: expected problems, found none in {path!r}")
    return problems


def _problem(options: JsonlOptions, place: str, row: Any) -> Problem:
    question = column(row, (options.problem_key,), place, "task.options.problem_key", (str,))
    if not question.strip():
        raise ConfigError(f"{place}: expected a question in {options.problem_key!r}, found none")
    answer = plain(column(row, (options.answer_key,), place, "task.options.answer_key", (str, int, float)))
    if options.answer_after is not None:
        before, found, answer = answer.rpartition(options.answer_after)
        if not found:
            raise ConfigError(f"{place}: expected {options.answer_after!r} in {options.answer_key!r}, found none")
    if not answer.strip():
        raise ConfigError(f"{place}: expected an answer in {options.answer_key!r}, found none")
    prompt = f"{question}\n{options.instruction}" if options.instruction else question
    return Problem(id=place, prompt=prompt, answer=answer.strip(), data={"row": row})
