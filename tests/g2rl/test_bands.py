"""Models side by side in ``g2rl geometry``: which of them make a band, and a band's numbers by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from written_runs import write_run

from g2rl.analysis.bands import Band, Measured, Model, bands_of, entropy_bits
from g2rl.analysis.measures import Pairs
from g2rl.cli import main
from g2rl.manifest import write_manifest
from g2rl.parallel.ranks import ALONE
from tests.g2rl.conftest import build_model


def pairs(cosines: Sequence[float]) -> Pairs:
    """Pairs of different responses with these cosines, all wrong and of four tokens."""
    n = len(cosines)
    return Pairs(
        cosine=np.array(cosines),
        semantic=np.full(n, np.nan),
        identical=np.zeros(n, dtype=bool),
        kind=np.ones(n, dtype=int),
        tokens=np.full(n, 4.0),
        dimensions=(2.0, 2.0),
        correct=np.zeros(3, dtype=bool),
        lengths=np.full(3, 4.0),
    )


def model(label: str, *problems: Sequence[float], run: Path | None = None) -> Model:
    return Model(label, f"path/{label}", run, "digest", [pairs(cosines) for cosines in problems])


@pytest.fixture
def models(tmp_path: Path) -> list[Model]:
    """The start, two seeds of GRPO and one of G2RL, not in order; two problems each."""

    def run(method: str, seed: int) -> Path:
        return write_run(tmp_path / f"{method}-{seed}", [{"step": 1}], f"method={method}", f"seed={seed}")

    return [
        model("start", [0.25, 0.25], [0.5]),
        model("grpo-1", [0.0], [-0.5, 0.5], run=run("grpo", 1)),
        model("g2rl-0", [-1.0], [0.0, 0.5], run=run("g2rl", 0)),
        model("grpo-0", [0.5, -0.25], [0.75], run=run("grpo", 0)),
    ]


def test_runs_that_differ_in_their_seed_are_one_band(models: list[Model]) -> None:
    start, grpo_1, g2rl_0, grpo_0 = models
    found = bands_of(models)
    assert [(band.label, band.models) for band in found] == [
        ("start", [start]), ("grpo", [grpo_0, grpo_1]), ("g2rl", [g2rl_0]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "labels"),
    [
        ([0, 1], ["start", "grpo-1"]),  # a single run is called what it is
        ([1, 1], ["grpo-1", "grpo-1 later"]),  # two checkpoints of one run
        ([1, 3, 2], ["grpo", "g2rl"]),
    ],
)
def test_which_models_make_bands(models: list[Model], chosen: list[int], labels: list[str]) -> None:
    given = [models[i] for i in chosen]
    if given[0] is given[1]:
        given[1] = replace(given[1], label="grpo-1 later")
    assert [band.label for band in bands_of(given)] == labels


def test_runs_that_learned_otherwise_are_bands_of_their_own(tmp_path: Path) -> None:
    given = []
    for name, lr, seed in (("a", 1e-5, 0), ("b", 1e-5, 1), ("c", 1e-4, 0), ("d", 1e-4, 1)):
        run = write_run(tmp_path / name, [{"step": 1}], f"optim.lr={lr}", f"seed={seed}")
        given.append(model(name, [0.0], run=run))
    found = bands_of(given)
    assert [band.models for band in found] == [given[:2], given[2:]]
    assert [band.label for band in found] == ["g2rl, lr=1e-05", "g2rl, lr=0.0001"]


def test_a_model_called_as_a_band_goes_by_its_path(models: list[Model]) -> None:
    given = [replace(models[0], label="grpo"), models[1], models[3]]
    assert [band.label for band in bands_of(given)] == ["path/start", "grpo"]


def test_numbers_of_bands_by_hand(models: list[Model]) -> None:
    measured = Measured(bands_of(models), ["a", "b"], {})
    start, grpo, g2rl = measured.bands
    # Sums over pairs of all seeds: 0.5 - 0.25 + 0.75 + 0 - 0.5 + 0.5 of 6 pairs, two of them negative.
    estimates = measured.estimates(grpo)
    assert estimates["cosine"].value == pytest.approx(1 / 6)
    assert estimates["negative"].value == pytest.approx(2 / 6)
    assert estimates["both correct cosine"] is None and estimates["semantic"] is None
    assert measured.seeds(grpo)["cosine"] == pytest.approx([1 / 3, 0])
    assert measured.seeds(grpo)["negative"] == pytest.approx([1 / 3, 1 / 3])
    assert measured.seeds(grpo)["semantic"] == [None, None]
    # Against the start's 1 / 3 and G2RL's -0.5 / 3.
    assert measured.differences(grpo)["cosine"].value == pytest.approx(1 / 6 - 1 / 3)
    assert measured.differences(g2rl)["cosine"].value == pytest.approx(-1 / 6 - 1 / 3)
    assert measured.differences(start)["negative"].value == 0
    totals, counts = grpo.sums(measured.edges)["cosine"]
    assert totals == pytest.approx(np.array([[0.25, 0.75], [0.0, 0.0]]))
    assert counts.tolist() == [[2, 1], [1, 2]]
    # Bins of 0.05 from -1: -0.5, -0.25, 0, 0.5 twice and 0.75 are on left edges.
    assert np.flatnonzero(grpo.distribution()).tolist() == [10, 15, 20, 30, 35]
    assert grpo.distribution()[[10, 15, 20, 30, 35]].tolist() == [1, 1, 1, 2, 1]
    # Four bins of 1/6 and one of 1/3.
    assert entropy_bits(grpo.distribution()) == pytest.approx(4 / 6 * np.log2(6) + 1 / 3 * np.log2(3))


def test_cosines_beyond_1_by_rounding_are_counted() -> None:
    band = Band("a", [model("a", [1 + 3e-16, -1 - 3e-16, 1.0])])
    assert band.distribution()[[0, -1]].tolist() == [1, 2]


def test_checkpoints_of_different_tasks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless the command says which task is meant; refused before any model is loaded."""
    runs = []
    for name, digits in (("a", "[1, 1]"), ("b", "[2, 2]")):
        run = write_run(tmp_path / name, [{"step": 1}], f"task.options.digits={digits}")
        checkpoint = build_model(run / "checkpoints" / "step-000001")
        (checkpoint / "trainer.pt").touch()
        write_manifest(checkpoint, ALONE)
        runs.append(str(run))
    assert main(["geometry", *runs, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "task: expected runs of one task, found task.options.digits = [1, 1] in" in said
    assert "and task.options.digits = [2, 2] in" in said
    assert "task.options.digits=... chooses for all" in said
    assert not (tmp_path / "out").exists()
