"""What campaigns of faults share: how often each tries, its draws, and a line of what came out.

A campaign is a file ``test_<campaign>.py``. Each of its tests asks for `campaign` and calls it once::

    def test_answers(campaign):
        found = campaign("answers", 50_000, "model text against the judges")
        for _ in range(found.tries):
            ...
            found.tried()
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.page import RECORDS
from tests.faults.planting import PLANTED, plant
from tests.faults.runs import REWARD, SETTINGS
from tests.g2rl.conftest import build_model

DEFAULT_SHARE = 0.02
"""Of the tries, in an ordinary run of the tests, which records nothing."""

_CALLED = pytest.StashKey[pytest.TestReport]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption(
        "--tries-share", type=float, help="share of a campaign's tries; what came out goes into build/faults"
    )
    group.addoption("--faults-seed", type=int, default=0, help="of the draws of all campaigns")


def pytest_configure() -> None:
    plant()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call":
        item.stash[_CALLED] = report
    return report


class Campaign:
    """One test's part of a campaign.

    Attributes:
        name: of the campaign.
        tries: how many are asked of this test, at least 1.
        seed: of all draws.
        random: draws of this test alone, whatever ran before it.
        failures: one line each; the test fails at its end if there are any.
    """

    def __init__(self, name: str, tries: int, what: str, seed: int, test: str) -> None:
        self.name = name
        self.tries = tries
        self.seed = seed
        self.random = random.Random(f"{seed} {test}")
        self.failures: list[str] = []
        self._what = what
        self._tried = 0
        self._start = time.monotonic()

    def tried(self, count: int = 1) -> None:
        """Count a try that has come to its end, well or not."""
        self._tried += count

    def failed(self, found: str) -> None:
        """Remember a failure and go on with the next try."""
        self.failures.append(found)

    def record(self, broken: bool) -> dict[str, Any]:
        """The line in ``build/faults``; a test that stopped at its first failure counts as one."""
        return {
            "campaign": self.name,
            "tries": self._tried,
            "failures": max(len(self.failures), int(broken)),
            "seconds": round(time.monotonic() - self._start, 1),
            "seed": self.seed,
            "what": self._what,
        }


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Iterator[Callable[[str, int, str], Campaign]]:
    """``campaign(name, tries, what)``: its `Campaign`, with the run's share of the tries."""
    # Without these folders on the command line their options are not known when it is read.
    share = request.config.getoption("tries_share", None)
    seed = request.config.getoption("faults_seed", 0)
    made: list[Campaign] = []

    def begin(name: str, tries: int, what: str) -> Campaign:
        scaled = max(1, round(tries * (DEFAULT_SHARE if share is None else share)))
        made.append(Campaign(name, scaled, what, seed, request.node.nodeid))
        return made[-1]

    yield begin
    report = request.node.stash.get(_CALLED, None)
    for each in made:
        if share is not None and PLANTED not in os.environ:
            RECORDS.mkdir(parents=True, exist_ok=True)
            with (RECORDS / f"{each.name}.json").open("a") as file:
                file.write(json.dumps(each.record(report is None or report.failed)) + "\n")
    failures = [failure for each in made for failure in each.failures]
    if failures:
        shown = "\n".join(failures[:20])
        pytest.fail(f"{len(failures)} tries failed, the first of them:\n{shown}", pytrace=False)


@pytest.fixture(scope="module")
def faults_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With what a tiny run needs: settings, a reward, which child processes find by this one's path, and a model."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "settings.yaml").write_text(SETTINGS)
    (folder / "faults_reward.py").write_text(REWARD)
    build_model(folder / "model")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def train(faults_folder: Path) -> Callable[..., list[str]]:
    """``train(name, *overrides)``: arguments of `g2rl`."""
    paths = [f"model.path={faults_folder / 'model'}", f"runs_dir={faults_folder / 'runs'}"]
    return lambda name, *overrides: ["train", str(faults_folder / "settings.yaml"), *paths, f"name={name}", *overrides]
