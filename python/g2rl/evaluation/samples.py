"""Sampled responses in a file that grows batch by batch, so that an evaluation killed at any moment goes on.

A file's first line says what it was sampled with, each further line is a `Sample`. Every response has a seed of its
own, and the batches are cut the same way every time: what is missing after a kill comes out as it would have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from g2rl.config import ConfigError
from g2rl.evaluation.suite import Settings
from g2rl.files import writing
from g2rl.rollout import Sampler
from g2rl.types import Episode, Problem


@dataclass(frozen=True)
class Sample:
    """One response.

    Attributes:
        problem: the problem's id.
        sample: its number, 0 to n - 1.
        text: without special tokens.
        tokens: its length, the end-of-sequence token included.
        finished: False when the token limit cut it off.
    """

    problem: str
    sample: int
    text: str
    tokens: int
    finished: bool


def problems_digest(problems: Sequence[Problem]) -> str:
    """Return what tells problems from others."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.id, problem.prompt, problem.answer]).encode())
    return digest.hexdigest()[:16]


def provenance(settings: Settings, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be equal for samples to belong to one file: all but how many there are.

    Args:
        model: what tells the model from others, such as a digest of its weights.
    """
    keys = ("name", "temperature", "top_p", "max_tokens", "system_prompt", "seed", "batch_size", "problems")
    return {**{key: getattr(settings, key) for key in keys}, **model}


def sample_all(
    path: Path,
    sampler: Sampler,
    problems: Sequence[Problem],
    settings: Settings,
    made_with: Mapping[str, Any],
    advance: Callable[[int], None],
) -> list[list[Sample]]:
    """Sample what a file lacks, and return all samples of each problem, in order.

    Args:
        path: the file; created with its folder, continued if it is there.
        problems: those to sample, `settings.samples` times each.
        made_with: see `provenance`.
        advance: called with the number of samples that were found or made, again and again.

    Raises:
        ConfigError: the file was made with other settings, or is damaged before its last line.
        StorageError: it cannot be written; what it holds already counts next time.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        done = _open(path, made_with)
    wanted = [(problem, i) for problem in problems for i in range(settings.samples)]
    for start in range(0, len(wanted), settings.batch_size):
        batch = wanted[start : start + settings.batch_size]
        missing = [i for i, (problem, number) in enumerate(batch) if (problem.id, number) not in done]
        if missing:
            seeds = [_seed(settings, problem, number) for problem, number in batch]
            drawn = sampler.sample([p for p, _ in batch], 1, settings.temperature, settings.top_p, seeds)
            made = [_sample(drawn[i], batch[i][1]) for i in missing]
            with _writing(path), path.open("a", encoding="ascii") as file:
                file.write("".join(json.dumps(asdict(sample)) + "\n" for sample in made))
            done |= {(sample.problem, sample.sample): sample for sample in made}
        advance(len(batch))
    return [[done[problem.id, i] for i in range(settings.samples)] for problem in problems]


def _writing(path: Path) -> AbstractContextManager[None]:
    """Around what writes alone: a sampler's server may be out of reach, which is an OSError as well."""
    return writing(f"out: {str(path)!r}")


def _seed(settings: Settings, problem: Problem, number: int) -> int:
    text = f"{settings.seed} {settings.name} {problem.id} {number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def _sample(episode: Episode, number: int) -> Sample:
    return Sample(episode.problem.id, number, episode.text, len(episode.response_ids), episode.finished)


def _open(path: Path, made_with: Mapping[str, Any]) -> dict[tuple[str, int], Sample]:
    """Return the samples of a file, without its last line if that was cut off; start one where there is none."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        with path.open("r+b") as file:
            file.truncate(sum(map(len, lines)))
    if not lines:
        path.write_text(json.dumps(dict(made_with)) + "\n", encoding="ascii")
        return {}
    check_same(path, _parse(path, 1, lines[0], dict), made_with)
    rows = [(number, line) for number, line in enumerate(lines[1:], 2) if line.strip()]
    samples = [_parse(path, number, line, lambda row: Sample(**row)) for number, line in rows]
    return {(sample.problem, sample.sample): sample for sample in samples}


def _parse(path: Path, number: int, line: bytes, make: Callable[[Any], Any]) -> Any:
    try:
        return make(json.loads(line))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}:{number}: expected a sample as a JSON object, found {line[:60]!r}") from error


def check_same(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ConfigError if what is in `path` was made with other settings than those expected."""
    differing = [key for key in expected if found.get(key) != expected[key]]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"out: expected samples with {key} = {expected[key]!r}, found {found.get(key)!r} in {path}; "
            "name another folder with --out, or remove the file"
        )
