"""Problems with final answers from a JSON Lines file or a data set of the Hugging Face hub."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g2rl.config import ConfigError
from g2rl.tasks.answers import extract_answer
from g2rl.tasks.base import (
    FiniteTask,
    check_held_out,
    content,
    option,
    read_options,
    sample_indices,
    text_option,
)
from g2rl.tasks.verifier import MathVerifier
from g2rl.types import Problem


@dataclass(frozen=True)
class JsonlOptions:
    path: str = option(None, "a .jsonl file or the name of a hub data set", lambda v: isinstance(v, str) and v != "")
    """File whose name ends in .jsonl, one JSON object a line; anything else is a data set for `datasets`."""
    split: str = text_option("train")
    """Split of a hub data set."""
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
    instruction: str = text_option("Please reason step by step, and put your final answer within \\boxed{}.")
    """Text added to each problem, on a line of its own."""
    allow_number: bool = option(False, "true or false", lambda v: isinstance(v, bool))
    """Accept the last number of a response that has no box."""


class JsonlTask(FiniteTask):
    """A data set of problems, judged by `MathVerifier`.

    Problems equal but for blanks are kept once, and none that is held out is trained on.

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
        problems = _load(read, "path", read.path, read.split)
        if read.eval_path or read.eval_split:
            key = "eval_path" if read.eval_path else "eval_split"
            source = _load(read, key, read.eval_path or read.path, read.eval_split or read.split)
            chosen = _sample(source, held_out)
            if not problems.keys() - chosen.keys():
                raise ConfigError(f"task.options.{key}: expected other problems than those of path, found the same")
        else:
            check_held_out(held_out, len(problems))
            chosen = _sample(problems, held_out)
        train = [problem for key, problem in problems.items() if key not in chosen]
        super().__init__("jsonl", train, list(chosen.values()), seed)
        self._allow_number = read.allow_number
        self._verifier = MathVerifier()

    def extract(self, response: str) -> str | None:
        return extract_answer(response, self._allow_number)

    def judge(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[bool]:
        pairs = [(p.answer, self.extract(response)) for p, response in zip(problems, responses, strict=True)]
        return self._verifier.judge(pairs)

    def close(self) -> None:
        self._verifier.close()


def _sample(problems: Mapping[str, Problem], count: int) -> dict[str, Problem]:
    keys = list(problems)
    return {keys[i]: problems[keys[i]] for i in sample_indices(len(keys), count)}


def _load(options: JsonlOptions, key: str, path: str, split: str) -> dict[str, Problem]:
    """Read all problems of one source by their content, the first of equal ones."""
    rows = _file_rows(path, key) if path.endswith(".jsonl") else _hub_rows(path, split, options.subset, key)
    problems: dict[str, Problem] = {}
    for place, row in rows:
        problem = _problem(options, place, row)
        problems.setdefault(content(problem.prompt), problem)
    if not problems:
        raise ConfigError(f"task.options.{key}: expected problems, found none in {path!r}")
    return problems


def _file_rows(path: str, key: str) -> Iterator[tuple[str, Any]]:
    """Rows of a file, each with where it stands. Blank lines are skipped."""
    if not Path(path).is_file():
        raise ConfigError(f"task.options.{key}: expected a file, found nothing at {path!r}")
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, a number beyond limits
                raise ConfigError(f"{path}:{number}: expected a JSON object, found {error}") from error


def _hub_rows(path: str, split: str, subset: str | None, key: str) -> Iterator[tuple[str, Any]]:
    """Rows of a hub data set, or of a local folder that `datasets` can read, each with where it stands."""
    try:
        rows: Iterable[Any] = importlib.import_module("datasets").load_dataset(path, subset, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # no such set, split or subset; no network
        found = f"{path!r}, subset {subset!r}, split {split!r}"
        raise ConfigError(
            f"task.options.{key}: expected a .jsonl file or a data set that `datasets` can load, found {found}: {error}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{path}[{split}]:{number}", row


def _problem(options: JsonlOptions, place: str, row: Any) -> Problem:
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: expected a JSON object, found {type(row).__name__}")
    question = _column(row, options.problem_key, place, "task.options.problem_key", (str,))
    answer = str(_column(row, options.answer_key, place, "task.options.answer_key", (str, int, float)))
    if options.answer_after is not None:
        before, found, answer = answer.rpartition(options.answer_after)
        if not found:
            raise ConfigError(f"{place}: expected {options.answer_after!r} in {options.answer_key!r}, found none")
    if not answer.strip():
        raise ConfigError(f"{place}: expected an answer in {options.answer_key!r}, found none")
    prompt = f"{question}\n{options.instruction}" if options.instruction else question
    return Problem(id=place, prompt=prompt, answer=answer.strip())


def _column(row: dict[str, Any], column: str, place: str, key: str, kinds: tuple[type, ...]) -> Any:
    if column not in row:
        raise ConfigError(f"{place}: expected a column {column!r} ({key}), found {', '.join(row) or 'none'}")
    value = row[column]
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"{place}: expected {wanted} in {column!r}, found {type(value).__name__}")
    return value
