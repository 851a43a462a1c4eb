"""Faulty data sets: the row is named with its file, and what is in both sets is said."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

from g2rl.config import ConfigError, TaskConfig
from g2rl.tasks import make_task
from g2rl.tasks.rows import MAX_LINE

GOOD = [{"problem": f"What is {i} times {i + 1}?", "answer": str(i * (i + 1))} for i in range(12)]
DEEP = "[" * 100_000
FAULTS: dict[str, bytes] = {
    "no question": b'{"answer": "1"}',
    "no answer": b'{"problem": "a"}',
    "other columns": b'{"text": "a", "label": 3}',
    "a number as question": b'{"problem": 1, "answer": "1"}',
    "a list as question": b'{"problem": ["a"], "answer": "1"}',
    "null as answer": b'{"problem": "a", "answer": null}',
    "a bool as answer": b'{"problem": "a", "answer": true}',
    "an object as answer": b'{"problem": "a", "answer": {"x": 1}}',
    "an empty answer": b'{"problem": "a", "answer": " \\n"}',
    "an empty question": b'{"problem": " ", "answer": "1"}',
    "NaN as answer": b'{"problem": "a", "answer": NaN}',
    "infinity as answer": b'{"problem": "a", "answer": -1e9999}',
    "an integer of 5,000 digits": b'{"problem": "a", "answer": ' + b"9" * 5_000 + b"}",
    "half a surrogate pair": b'{"problem": "a\\udc00", "answer": "1"}',
    "no UTF-8": b'{"problem": "\xff\xfe", "answer": "1"}',
    "UTF-16 in the middle": '{"problem": "a", "answer": "1"}'.encode("utf-16"),
    "cut off": b'{"problem": "a", "ans',
    "two objects": b'{"problem": "a", "answer": "1"}{"problem": "b", "answer": "1"}',
    "a list": b'["a", "1"]',
    "a text": b'"a"',
    "null": b"null",
    "a hundred thousand brackets": DEEP.encode(),
    "nested columns": b'{"problem": ' + b'{"a": ' * 50_000 + b"1" + b"}" * 50_000 + b', "answer": "1"}',
    "a NUL byte": b'{"problem": "a\x00", "answer": "1"}',
    "a comment": b"// problems",
    "CSV": b"problem,answer",
    "single quotes": b"{'problem': 'a', 'answer': '1'}",
}
LONG = {
    "a line of 100 MB": lambda: b'{"problem": "' + b"a" * 100_000_000 + b'", "answer": "1"}',
    "blanks of 100 MB": lambda: b" " * 100_000_000 + b"{",
    "100 MB of brackets": lambda: b"[" * 100_000_000,
}


def written(path: Path, draw: random.Random, line: bytes) -> int:
    """Write good rows with `line` among them; returns its number."""
    rows = [json.dumps(row).encode() for row in GOOD]
    for _ in range(draw.randrange(3)):
        rows.insert(draw.randrange(len(rows)), b"")
    at = draw.randrange(len(rows) + 1)
    rows.insert(at, line)
    path.write_bytes(draw.choice((b"\n", b"\r\n")).join(rows) + b"\n" * draw.randrange(2))
    return at + 1


def check_named(found: Any, path: Path, fault: str, line: bytes) -> None:
    number = written(path, found.random, line)
    name, option = found.random.choice((("jsonl", "path"), ("gsm8k", "data")))
    try:
        make_task(TaskConfig(name=name, options={option: str(path)}, held_out=2), seed=0).close()
        found.failed(f"{fault}: {name} said nothing")
    except ConfigError as error:
        if f"{path}:{number}" not in str(error) or "expected" not in str(error):
            found.failed(f"{fault}: {name} said {str(error)[:200]}, not {path.name}:{number}")
    except Exception as error:
        found.failed(f"{fault}: {name} raised {type(error).__name__}: {str(error)[:200]}")
    found.tried()


def test_faulty_rows(campaign: Any, tmp_path: Path) -> None:
    found = campaign("data sets", 540, f"{len(FAULTS)} kinds of faulty row anywhere in a file, in two tasks")
    kinds = list(FAULTS)
    for i in range(found.tries):
        fault = kinds[i % len(kinds)] if found.tries >= len(kinds) else found.random.choice(kinds)
        check_named(found, tmp_path / "set.jsonl", fault, FAULTS[fault])


def test_long_lines(campaign: Any, tmp_path: Path) -> None:
    found = campaign("data sets", 3, "lines of 100 MB")
    assert MAX_LINE < 100_000_000
    for fault in list(LONG)[: found.tries]:
        check_named(found, tmp_path / "set.jsonl", fault, LONG[fault]())


def respelled(draw: random.Random, question: str) -> str:
    """The same question as another file may have it."""
    return draw.choice(
        (
            question,
            question.upper(),
            question.replace(" ", "  ") + "\n",
            question.replace("times", r"$times\,$"),
            question.replace("?", " ?"),
            question.translate({ord(str(i)): chr(0xFF10 + i) for i in range(10)}),
            "\ufeff" + question,
        )
    )


def test_problems_in_both_sets(campaign: Any, tmp_path: Path) -> None:
    found = campaign("data sets", 200, "problems to train on among those held out, spelled alike or not")
    for _ in range(found.tries):
        shared = found.random.randrange(len(GOOD))
        rows = [
            {**row, "problem": respelled(found.random, row["problem"])} for row in found.random.sample(GOOD, shared)
        ]
        own = [{"problem": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(3)]
        for name, content in (("train", GOOD), ("eval", [*rows, *own])):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        options = {"path": str(tmp_path / "train.jsonl"), "eval_path": str(tmp_path / "eval.jsonl")}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with make_task(TaskConfig(name="jsonl", options=options, held_out=64), seed=0) as task:
                trained = len({task.train_problem(i).id for i in range(len(GOOD) - shared)})
        expected = f"{shared} of {len(GOOD)} problems to train on are held out as well"
        if trained != len(GOOD) - shared or (shared and not any(expected in str(one.message) for one in said)):
            found.failed(f"{shared} shared, {trained} trained on, said: {[str(one.message) for one in said]}")
        found.tried()


def test_whole_files(campaign: Any, tmp_path: Path) -> None:
    found = campaign("data sets", 6, "files that are none, empty, or folders")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n\n")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "zeros.jsonl").write_bytes(bytes(1_000_000))
    names = ("empty", "blank", "folder", "loop", "zeros", "nowhere")
    for name in names[: found.tries] if found.tries < len(names) else names:
        path = str(tmp_path / f"{name}.jsonl")
        try:
            make_task(TaskConfig(name="jsonl", options={"path": path}, held_out=0), seed=0).close()
            found.failed(f"{name}: said nothing")
        except ConfigError as error:
            if path not in str(error):
                found.failed(f"{name}: said {error}")
        except Exception as error:
            found.failed(f"{name}: raised {type(error).__name__}: {error}")
        found.tried()
