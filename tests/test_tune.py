"""The tuner's own logic. Its runs are tested in the interpreter (ops/triton_interpreter_cases.py), tiles compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from g2rl_kernels.backends.triton import compilation, configs
from g2rl_kernels.backends.triton.candidates import KERNELS, candidates
from g2rl_kernels.backends.triton.compilation import Case, Compiled, parse_chip
from g2rl_kernels.backends.triton.configs import Chip, Tile

readme = pytest.importorskip("benchmarks.readme", reason="needs rich")
tune = pytest.importorskip("benchmarks.tune", reason="needs rich")

CHIPS: tuple[Chip, ...] = (80, 86, 89, 90, 100, 103, 120, "gfx90a", "gfx942", "gfx950")
SLOW, FAST, WRONG = Tile(64, 128, 64, 8, 4, USE_TMA=True), Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4)


def rows() -> list[dict[str, Any]]:
    taken = {"registers": 168, "stack": 0, "shared": 98304}
    return [
        {
            "tile": SLOW,
            "role": "table",
            "status": "ok",
            **taken,
            "median_s": 9e-3,
            "spread_s": 1e-5,
            "times_floor": 1.3,
        },
        {"tile": FAST, "role": "candidate", "status": "ok", **taken, "median_s": 7e-3, "spread_s": None},
        {"tile": WRONG, "role": "candidate", "status": "wrong", **taken, "reason": "phi_relative 1 > 1e-05"},
    ]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chip", CHIPS)
def test_candidates_start_with_the_table(kernel: str, chip: Chip) -> None:
    found = candidates(kernel, True, chip)
    assert found[0] == configs.tile_for(kernel, True, chip)
    assert len(found) == len(set(found)) > 1
    assert candidates(kernel, False, chip) == (configs.tile_for(kernel, False, chip),)
    # What a chip lacks is in none of its candidates.
    if isinstance(chip, str) or chip < 90 or chip >= 120:
        assert not any(tile.USE_TMA for tile in found)


def test_every_kernel_of_the_table_has_candidates() -> None:
    assert set(KERNELS) == {kernel for kernel, _, _ in configs.TILES} == {kernel for kernel, _ in configs.AMD_TILES}


def test_override_ends_with_the_block() -> None:
    h = torch.zeros(4, 8)
    chosen = configs.tile
    with pytest.raises(ZeroDivisionError), tune.overridden("residuals-softcap", FAST):
        assert configs.tile("residuals", h, h, work="softcap") == FAST
        assert configs.tile("residuals", h, h) == configs.tile("statistics", h, h, work="softcap") != FAST
        with tune.overridden("statistics", SLOW):
            assert configs.tile("statistics", h, h) == SLOW and configs.tile("residuals", h, h, work="softcap") == FAST
        _ = 1 / 0
    assert configs.tile is chosen


def test_table_shows_every_tile_and_names_the_fastest() -> None:
    console = tune.Console(width=160)
    with console.capture() as capture:
        console.print(tune.kernel_table("statistics-kept, [x]", rows()))
    lines = capture.get().splitlines()
    (slow,) = [line for line in lines if "64 x 128 x 64, 8, 4, TMA" in line]
    assert [cell.strip() for cell in slow.split("│")[2:-1]] == ["168", "0", "96", "9", "0.01", "1.300", "table"]
    (fast,) = [line for line in lines if "128 x 64 x 64, 8, 4 " in line]
    assert fast.rstrip("│ ").endswith("fastest")
    assert any("wrong: phi_relative 1 > 1e-05" in line for line in lines)


@pytest.mark.parametrize("tile", [SLOW, FAST], ids=["tma", "plain"])
def test_line_is_an_entry_of_the_table(tile: Tile) -> None:
    def entry(chip: Chip) -> object:
        return eval("{" + tune.configs_line("statistics-kept", True, chip, tile) + "}", {"Tile": Tile})

    assert entry(90) == {("statistics-kept", True, 90): tile}
    assert entry("gfx942") == {("statistics-kept", True): tile}


def test_report_is_written_after_each_kernel(tmp_path: Path) -> None:
    path = tmp_path / "tune.json"
    report = tune.Report(torch.device("cpu"), path, dtype="bf16")
    report.add("statistics-kept", "title", rows()[:2])
    assert json.loads(path.read_text())["kernels"]["statistics-kept"][1]["tile"]["BLOCK_V"] == 64
    assert not report.wrong
    report.add("residuals", "title", rows())
    assert report.wrong and len(json.loads(path.read_text())["kernels"]) == 2
    # Among the results of other runs, it does not disturb what is made of them.
    plots = pytest.importorskip("benchmarks.plots", reason="needs matplotlib")
    (written,) = readme.load(tmp_path)
    assert readme.details([written]) == "No files yet." and plots.draw_cases(written) is None


def test_tile_that_does_not_compile_or_fit_is_shown() -> None:
    by_tile = tune.cases(["statistics"], "bf16", 90)["statistics"]

    def compiled(case: Case) -> Compiled:
        sizes = dict(case.constants)
        if sizes["BLOCK_N"] == 256:
            raise RuntimeError("no such layout\nand more")
        return Compiled(168, 400 if sizes["BLOCK_V"] == 256 else 0, 98304, "", "")

    found = {(row["tile"].BLOCK_N, row["tile"].BLOCK_V): row for row in tune.compile_rows(by_tile, compiled)}
    assert found[256, 64]["reason"] == "RuntimeError: no such layout"
    assert found[64, 256]["reason"] == "spills 400 bytes"
    assert found[128, 128]["status"] == "ok" and "instructions" not in found[128, 128]


def test_instructions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the disassembler prints them: predicates aside, waits for tensor cores by name, encodings not at all."""
    sass = """
        /*0010*/              @!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R1+URZ], RZ ;   /* 0x032028ff80ff89a7 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;  /* 0x01e00000081879f0 */
                                                                                    /* 0x000fe80008701818 */
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/          @UP1 FADD R2, R2, R24 ;
        /*0050*/                   FADD R3, R3, R25 ;
    """
    monkeypatch.setattr(compilation, "_dump", lambda cubin, what: sass)
    found = compilation.instructions(Compiled(168, 0, 98304, "", "", b"code"))
    assert found == {"SYNCS": 1, "HGMMA": 1, "WARPGROUP.DEPBAR": 1, "FADD": 2}
    assert not compilation.instructions(Compiled(168, 0, 98304, "", "amdgcn"))
    by_tile = tune.cases(["statistics"], "bf16", 90)["statistics"]
    row = tune.compile_rows(by_tile, lambda case: Compiled(168, 0, 98304, "", "", b"code"), counted=True)[0]
    assert row["instructions"] == {"HGMMA": 1, "WARPGROUP.DEPBAR": 1, "FADD": 2}


def test_chips_have_names() -> None:
    assert [parse_chip(name) for name in ("sm_90", "sm100", "gfx90a")] == [90, 100, "gfx90a"]
    with pytest.raises(ValueError, match=r"chip: expected a name such as sm_90 or gfx942, found 'hopper'"):
        parse_chip("hopper")
