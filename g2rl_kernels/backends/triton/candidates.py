"""Tiles that `benchmarks.tune` times beside those of the table in configs.py; no op ever runs with one.

The tests compile all of them: none spills or takes more than its chip has, in Triton 3.6 and 3.9. 128 x 256 does, since
sums are held twice (`tiles.dot_rows`).
"""

from __future__ import annotations

from g2rl_kernels.backends.triton.configs import Chip, Tile, tile_for

# Four warps, or at most 128 registers in eight, and half of the shared memory leave room for a second block.
_LIGHT_90 = (
    Tile(128, 128, 64, 8, 3, USE_TMA=True),
    Tile(128, 128, 128, 8, 3, USE_TMA=True),
    Tile(64, 256, 64, 8, 4, USE_TMA=True),
    Tile(256, 64, 64, 8, 4, USE_TMA=True),
    Tile(64, 128, 64, 8, 4, USE_TMA=True),
    Tile(64, 128, 64, 4, 4, USE_TMA=True),
    Tile(64, 128, 128, 4, 3, USE_TMA=True),
)
_HEAVY_90 = (
    Tile(64, 128, 128, 8, 3, USE_TMA=True),
    Tile(128, 64, 64, 8, 4, USE_TMA=True),
    Tile(128, 64, 128, 8, 3, USE_TMA=True),
    Tile(64, 64, 64, 4, 4, USE_TMA=True),
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

# Kernel, chip whose tiles a chip can use -> tiles. For 16-bit inputs alone: fp32 products run on CUDA cores.
_CANDIDATES: dict[tuple[str, Chip], tuple[Tile, ...]] = {
    ("statistics", 80): _LIGHT_80,
    ("statistics", 90): _LIGHT_90,
    ("statistics", 100): _LIGHT_100,
    ("statistics", "gfx942"): _LIGHT_AMD,
    ("statistics+", 80): _HEAVY_80,
    ("statistics+", 90): _HEAVY_90,
    ("statistics+", 100): _HEAVY_100,
    ("statistics+", "gfx942"): _HEAVY_AMD,
    ("residuals", 80): _LIGHT_80,
    ("residuals", 90): _LIGHT_90,
    ("residuals", 100): _HEAVY_100,
    ("residuals", "gfx942"): _LIGHT_AMD,
    ("residuals+", 80): _HEAVY_80[:2],
    ("residuals+", 90): _HEAVY_90,
    ("residuals+", 100): _HEAVY_100[:1],
    ("residuals+", "gfx942"): _HEAVY_AMD,
    ("grad_logits", 80): _LIGHT_80,
    ("grad_logits", 90): _LIGHT_90,
    ("grad_logits", 100): _LIGHT_100,
    ("grad_logits", "gfx942"): _LIGHT_AMD,
    ("grad_logits+", 80): _HEAVY_80,
    ("grad_logits+", 90): _HEAVY_90,
    ("grad_logits+", 100): _HEAVY_100,
    ("grad_logits+", "gfx942"): _HEAVY_AMD,
    ("projection", 80): _PROJECTION,
    ("projection", 90): _PROJECTION,
    ("projection", 100): _PROJECTION,
    ("projection", "gfx942"): _PROJECTION_AMD,
}
KERNELS = tuple(dict.fromkeys(kernel for kernel, _ in _CANDIDATES))


def candidates(kernel: str, half: bool, chip: Chip) -> tuple[Tile, ...]:
    """The table's tile, then others, none twice."""
    others = _CANDIDATES[kernel, _like(chip)] if half else ()
    return tuple(dict.fromkeys((tile_for(kernel, half, chip), *others)))


def _like(chip: Chip) -> Chip:
    if isinstance(chip, str):
        return "gfx942"
    return 80 if chip < 90 or chip >= 120 else 90 if chip < 100 else 100
