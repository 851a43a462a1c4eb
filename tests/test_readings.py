"""What the programs of benchmarks/ write, refuse and say of it, on readings that take no time."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="tables")
plots = pytest.importorskip("benchmarks.plots", reason="needs matplotlib and the trainer")

from rich.console import Console  # noqa: E402

from benchmarks import bias, e2e, kernels, once, prefix_sharing, readme, rollout, run, trl_step, tune  # noqa: E402
from benchmarks.candidates import lineup  # noqa: E402
from benchmarks.candidates.lineup import Candidate, Case  # noqa: E402
from benchmarks.cases.registry import OPS, Shape  # noqa: E402
from benchmarks.measuring import measure as measuring  # noqa: E402
from benchmarks.measuring import timing  # noqa: E402
from benchmarks.measuring.measure import Settings  # noqa: E402
from benchmarks.reporting import reports  # noqa: E402
from benchmarks.reporting.reports import FOLDER, Report, load  # noqa: E402
from benchmarks.reporting.tables import case_cells, case_table  # noqa: E402
from tests.g2rl.conftest import build_model  # noqa: E402

CPU = torch.device("cpu")
TINY = Shape("tiny", "tiny", 24, 3, 32, 1105)
FACTS = {"device": "cpu", "name": "A processor", "isa": "AVX2", "cores": 2, "threads": 1, "memory_gb": 8.0}
FACTS |= {"torch": "2.13", "triton": None, "busy_cores": 0.0, "commit": None, "date": "2026-01-02"}


@pytest.fixture(autouse=True)
def a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "machine", lambda device: FACTS)
    monkeypatch.setattr(run, "best_rate", lambda dtype, device: 1e12)


def published(name: str, key: str) -> Any:
    return json.loads((FOLDER / f"cpu-2-cores-{name}.json").read_text())[key]


def call(program: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int | None:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    return program.main()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("tiny-model"))


# ---- files -----------------------------------------------------------------------------------------------------------


def runs_bias(monkeypatch: pytest.MonkeyPatch, file: Path, model: Path) -> None:
    monkeypatch.setattr(bias, "chain", lambda hidden, weight, promote: hidden @ weight.T)
    call(bias, monkeypatch, "--device", "cpu", "--d", "64", "--V", "128", "--json", file)


def runs_e2e(monkeypatch: pytest.MonkeyPatch, file: Path, model: Path) -> None:
    small = ("rollout.prompts=2", "rollout.group_size=2", "rollout.max_new_tokens=4", "task.system_prompt=null")
    monkeypatch.setattr(timing, "release_free_memory", lambda: None)
    call(e2e, monkeypatch, "--rounds", "3", "--json", file, f"model.path={model}", "model.device=cpu", *small)
    added = json.loads(file.read_text())["added"]["g2rl"]
    assert added["time_spread"] >= 0 and added["memory_spread"] >= 0
    memory = json.loads(file.read_text())["step"]["memory"]
    assert list(memory) == list(e2e.VARIANTS) and all(len(peaks) == 3 for peaks in memory.values())


def runs_trl_step(monkeypatch: pytest.MonkeyPatch, file: Path, model: Path) -> None:
    monkeypatch.setattr(trl_step, "measure", lambda *_: published("trl", "trl_step")["24"])
    call(trl_step, monkeypatch, "--tokens", "24", "--json", file)


def runs_prefix_sharing(monkeypatch: pytest.MonkeyPatch, file: Path, model: Path) -> None:
    monkeypatch.setattr(prefix_sharing, "measure", lambda *_: published("prefix", "prefix_sharing")["quickstart"])
    call(prefix_sharing, monkeypatch, "--case", "quickstart", "--json", file, f"model.path={model}", "model.device=cpu")


def runs_rollout(monkeypatch: pytest.MonkeyPatch, file: Path, model: Path) -> None:
    monkeypatch.setattr(rollout, "measure", lambda *_: published("rollout", "rollout")["quickstart"])
    call(rollout, monkeypatch, "--case", "quickstart", "--json", file, f"model.path={model}", "model.device=cpu")


def runs_tune(monkeypatch: pytest.MonkeyPatch, file: Path, model: Path) -> None:
    tile = {"tile": tune.Tile(64, 64, 64, 4, 4), "role": "table", "status": "ok"}
    monkeypatch.setattr(tune, "compile_all", lambda *_, **__: {"statistics": [tile]})
    call(tune, monkeypatch, "--compile", "sm_90", "--json", file)


def runs_run(monkeypatch: pytest.MonkeyPatch, file: Path, model: Path) -> None:
    small = ("--shape", "24x3x32x1105", "--kind", "random", "--rounds", "2", "--backend", "torch")
    assert call(run, monkeypatch, "--device", "cpu", "--op", "token_logprobs", *small, "--json", file) == 0


PROGRAMS = (runs_bias, runs_e2e, runs_trl_step, runs_prefix_sharing, runs_rollout, runs_tune, runs_run)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__.removeprefix("runs_"))
def test_files_of_every_program_lie_side_by_side(
    program: Callable, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README and plots are made of all that lies in the folder."""
    program(monkeypatch, tmp_path / "readings.json", tiny_model)
    (found,) = load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["readings.json"], "no part of a file is left"
    assert found.machine.startswith("A processor")
    assert ("token_logprobs" in readme.details([found])) == (program is runs_run)
    assert ("A training step" in readme.summary([found])) == (program is runs_e2e)
    assert ("a training step" in readme.summary([found])) == (program is runs_trl_step)
    assert ("Nothing" in readme.training([found])) == (program not in (runs_prefix_sharing, runs_rollout))
    assert (plots.draw_step if program is runs_e2e else plots.draw_cases)(found) is None or program is runs_e2e


@pytest.mark.parametrize("program", (bias, e2e, prefix_sharing, rollout, run, trl_step, tune), ids=lambda p: p.__name__)
def test_a_folder_that_is_missing_is_refused_at_once(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(program, monkeypatch, "--json", tmp_path / "missing" / "x.json")
    assert "argument --json: expected a file in a folder that exists, found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "arguments", "error"),
    [
        (run, ("--backend", "nativ"), "argument --backend: invalid choice: 'nativ'"),
        (bias, ("--d", "100"), "argument --d: expected a multiple of 64, found '100'"),
        (bias, ("--device", "cpu", "--V", "0"), "argument --V: expected a whole number of 1 or more, found '0'"),
        (bias, (), "argument --device: expected a GPU that torch sees, found none"),
        (run, ("--device", "cuda"), "argument --device: expected a GPU that torch sees, found none"),
        (run, ("--limit", "0"), "argument --limit: expected a number above 0, found '0'"),
        (run, ("--limit", "nan"), "argument --limit: expected a number above 0, found 'nan'"),
        (trl_step, ("--tokens", "24", "-1"), "argument --tokens: expected a whole number of 1 or more, found '-1'"),
        (trl_step, ("--steps", "1"), "argument --steps: expected a whole number of 2 or more, found '1'"),
        (run, ("--sweep", "N", "--shape", "smollm2"), "--sweep: expected no --shape and no --quick beside it"),
        (run, ("--sweep", "N", "--quick"), "--sweep: expected no --shape and no --quick beside it"),
        (once, ("--backend", "triton"), "error: expected a GPU that torch sees, found none"),
        *(
            (program, ("--rounds", found), f"argument --rounds: expected a whole number of 1 or more, found '{found}'")
            for program in (e2e, kernels, prefix_sharing, rollout, run, trl_step)
            for found in ("0", "-1", "1.5")
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    program: Any,
    arguments: tuple[str, ...],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        call(program, monkeypatch, *arguments)
    assert error in capsys.readouterr().err


def test_nothing_measured_is_no_success(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    asked = ("--device", "cpu", "--op", "token_logprobs", "--kind", "real", "--shape", "qwen3-4b")
    assert call(run, monkeypatch, *asked) == 1
    assert "real: real activations are those of SmolLM2-135M, not of Qwen3-4B" in capsys.readouterr().out


# ---- the floor, and what stands beside it ----------------------------------------------------------------------------


def head_case(op: str) -> Case:
    ((case, _),) = run.head_cases(TINY, "random", [OPS[op]], CPU, torch.float32)
    return case


@pytest.mark.parametrize("floor", (lineup._floor, lineup._floor_out))
def test_the_floor_multiplies_numbers(floor: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """With zeros, products take less time."""
    real, products = torch.mm, []

    def mm(a: torch.Tensor, b: torch.Tensor, **out: torch.Tensor) -> torch.Tensor:
        products.append((a.shape[0], a.shape[1], b.shape[1]))
        assert a.count_nonzero() == a.numel() and b.count_nonzero() == b.numel()
        return real(a, b, **out)

    monkeypatch.setattr(torch, "mm", mm)
    floor(head_case("logprobs_backward"))()
    N, d, V = TINY.N, TINY.d, TINY.V
    assert products == [(N, d, V), (N, V, d), (V, N, d)]


def test_no_floor_is_faster_than_the_best_product() -> None:
    ((case, expected),) = run.head_cases(TINY, "random", [OPS["token_logprobs"]], CPU, torch.float32)
    rows = measuring.measure(case, expected, Settings(rounds=3, backends=["torch"]), best=1.0)
    assert max(row["percent_of_best"] for row in rows if row["role"] == "floor") <= 100


def test_a_slow_candidate_is_timed_without_its_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass of a backward op, for one: by the first call, where that takes longer than all rounds may."""

    def prepare(case: Case) -> Callable:
        time.sleep(0.3)
        return lambda: time.sleep(0.02) or {}

    monkeypatch.setattr(measuring, "candidates", lambda *_: [Candidate("slow", "peer", prepare)])
    case, expected = next(run.head_cases(TINY, "random", [OPS["logprobs_backward"]], CPU, torch.float32))
    (row,) = measuring.measure(case, expected, Settings(rounds=3, limit_s=0.01), best=1.0)
    assert row["samples"] == 1 and 0.02 <= row["median_s"] < 0.3


def reading(candidate: str, role: str, seconds: float, **more: Any) -> dict[str, Any]:
    case = {"op": "token_logprobs", "sizes": TINY._asdict() | {"N": 1024}, "kind": "peaked", "dtype": "float32"}
    times = {"median_s": seconds, "times_floor": seconds / 0.002, "spread_s": None, "status": "ok", "note": "H W^T"}
    return case | times | {"candidate": candidate, "role": role, "errors": {}} | more


def test_no_number_of_a_table_is_cut() -> None:
    cases = [rows for report in load() for rows in report.cases()]
    assert cases
    for rows in cases:
        console = Console(width=run._WIDTH, record=True, file=io.StringIO())
        console.print(case_table(OPS[rows[0]["op"]], "", "", rows))
        assert "…" not in console.export_text()


def test_both_floors_stand_beside_a_time() -> None:
    rows = [
        reading("torch.mm", "floor", 0.002),
        reading("torch.mm, out=", "floor", 0.001),
        reading("g2rl native", "ours", 0.0015, percent_of_logits=103.2, errors={"logp_absolute": 2e-6}),
        reading("eager", "peer", 0.006, errors={"logp_absolute": 3e-2}),
    ]
    heads, _, out, ours, _ = case_cells(OPS["token_logprobs"], rows)
    assert heads[:5] == ["candidate", "ms", "± IQR", "x mm", "x out="]
    assert out[3:5] == ["0.5", "1"] and ours[3:5] == ["0.75", "1.5"]
    text = readme.summary([Report("x", {"machine": FACTS, "rows": rows})])
    assert "| `token_logprobs` | 0.75 | 1.50 | 4 x | 103 % | 2e-06 | 3e-02 |" in text
    del rows[1]
    assert case_cells(OPS["token_logprobs"], rows)[2][3:5] == ["0.75", ""]


@pytest.mark.parametrize(("baseline", "times"), [(True, ["1", "0.25"]), (False, [""])])
def test_a_step_through_trl_is_compared_with_plain_grpo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, baseline: bool, times: list[str]
) -> None:
    """Whatever is named first; without it there is nothing to compare with."""
    seconds = {"g2rl train": 1.0, trl_step.BASELINE: 4.0}

    def measure(tokens: int, rounds: int, steps: int, names: list[str]) -> dict[str, Any]:
        return {name: {"seconds": [seconds[name]] * 3, "peak_bytes": [2e9]} for name in names}

    monkeypatch.setattr(trl_step, "measure", measure)
    asked = ["--candidate", "g2rl train", *(("--candidate", trl_step.BASELINE) if baseline else ())]
    call(trl_step, monkeypatch, *asked, "--tokens", "24", "--json", tmp_path / "x.json")
    (found,) = load(tmp_path)
    measured = found.content["trl_step"]["24"]
    assert list(trl_step.table(24, measured).columns[3].cells) == times
    assert f"| g2rl train | 1 ({times[-1] or '-'}), 2 GB |" in readme.summary([found])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"time": 2.0, "time_spread": 0.5, "memory": -3.5}, ": +2.0 % time (spread 0.5). A processor"),
        (
            {"time": 0.2, "time_spread": 3.7, "memory": 1.0, "memory_spread": 1.5},
            "and +1.0 % memory (spread 1.5, within",
        ),
        ({"time": 0.2, "time_spread": None, "memory": 1.0, "memory_spread": None}, ": not known, of too few rounds. A"),
    ],
)
def test_what_a_step_pays_is_said_with_its_spread(change: dict[str, float | None], text: str) -> None:
    """Memory of older files has none: one reading in fixed order, which moved by more than what is added."""
    content = {"machine": FACTS, "step": {}, "added": {"g2rl": change}, "config": {"file": "x.yaml"}}
    assert text in readme.summary([Report("x", content)])
