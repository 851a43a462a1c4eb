"""Tiles that `benchmarks.tune` times beside those of the table in configs.py; no op ever runs with one.

The tests compile all of them: none spills or takes more than its chip has, in Triton 3.6, 3.7 and 3.9 (3.8 spills 88
bytes of "residuals-statistics" on Hopper). 128 x 256 does, since sums are held twice (`tiles.dot_rows`).
"""

from __future__ import annotations

from g2rl_kernels.backends.triton.configs import AMD_TILES, Chip, Tile, tile_for

# Four warps, or at most 128 registers in eight, and half of the shared memory leave room for a second block.
_LIGHT_90 = (
    Tile(128, 128, 64, 8, 4, USE_TMA=True),
    Tile(128, 128, 64, 8, 3, USE_TMA=True),
    Tile(64, 256, 64, 8, 4, USE_TMA=True),
    Tile(256, 64, 64, 8, 4, USE_TMA=True),
    Tile(64, 128, 64, 4, 4, USE_TMA=True),
    Tile(64, 128, 128, 4, 3, USE_TMA=True),
)
_HEAVY_90 = (
    Tile(64, 128, 64, 8, 4, USE_TMA=True),
    Tile(64, 128, 128, 8, 3, USE_TMA=True),
    Tile(128, 64, 64, 8, 4, USE_TMA=True),
    Tile(128, 64, 128, 8, 3, USE_TMA=True),
)
_LIGHT_100 = (
    Tile(128, 128, 64, 8, 3, USE_TMA=True),
    Tile(128, 128, 128, 8, 3, USE_TMA=True),
    Tile(64, 128, 64, 8, 4, USE_TMA=True),
    Tile(128, 64, 64, 8, 4, USE_TMA=True),
)
_HEAVY_100 = (Tile(128, 64, 64, 8, 4, USE_TMA=True), Tile(64, 64, 64, 4, 4, USE_TMA=True))
_LIGHT_80 = (Tile(128, 128, 32, 8, 3), Tile(64, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 4))
_HEAVY_80 = (Tile(64, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 4))
_PROJECTION = (Tile(64, 64, 64, 4, 4), Tile(64, 64, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 32, 64, 4, 4))
_LIGHT_AMD = (Tile(128, 128, 32, 8, 2), Tile(64, 128, 64, 8, 2), Tile(128, 64, 64, 8, 2), Tile(64, 64, 64, 4, 2))
_HEAVY_AMD = (Tile(64, 128, 32, 8, 2), Tile(128, 64, 64, 8, 2), Tile(64, 64, 64, 4, 2))
_PROJECTION_AMD = (Tile(64, 64, 64, 4, 2), Tile(64, 32, 64, 4, 2), Tile(128, 64, 64, 8, 2))

# Of kernels with one name in the table, of those with more work, and of the projection, by chip whose tiles a chip can
# use. For 16-bit inputs alone: fp32 products run on CUDA cores.
_LIGHT: dict[Chip, tuple[Tile, ...]] = {80: _LIGHT_80, 90: _LIGHT_90, 100: _LIGHT_100, "gfx942": _LIGHT_AMD}
_HEAVY: dict[Chip, tuple[Tile, ...]] = {80: _HEAVY_80, 90: _HEAVY_90, 100: _HEAVY_100, "gfx942": _HEAVY_AMD}
_OF_PROJECTION: dict[Chip, tuple[Tile, ...]] = dict.fromkeys((80, 90, 100), _PROJECTION) | {"gfx942": _PROJECTION_AMD}
# Those of a kernel that others of its kind have registers for.
_OWN: dict[tuple[str, Chip], tuple[Tile, ...]] = {
    ("residuals", 100): _HEAVY_100,
    ("residuals-softcap", 80): _HEAVY_80[:2],
    ("residuals-statistics", 80): _HEAVY_80[:2],
    ("residuals-softcap", 100): (Tile(64, 64, 64, 8, 4, USE_TMA=True),),
}
KERNELS = tuple(dict.fromkeys(kernel for kernel, _ in AMD_TILES))


def candidates(kernel: str, half: bool, chip: Chip) -> tuple[Tile, ...]:
    """The table's tile, then others, none twice."""
    of_kind = _OF_PROJECTION if kernel == "projection" else _HEAVY if "-" in kernel else _LIGHT
    others = _OWN.get((kernel, _like(chip)), of_kind[_like(chip)]) if half else ()
    return tuple(dict.fromkeys((tile_for(kernel, half, chip), *others)))


def _like(chip: Chip) -> Chip:
    if isinstance(chip, str):
        return "gfx942"
    return 80 if chip < 90 or chip >= 120 else 90 if chip < 100 else 100
