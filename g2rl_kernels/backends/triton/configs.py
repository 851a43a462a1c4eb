"""Launch configurations: tile sizes, warps and stages of every kernel, by chip and dtype.

Chosen by table and never by a timing at run time: the order of a sum, and with it the bits of a result, follows the
tile, so a choice that varies between runs or with the batch would break "same inputs, same bits". `benchmarks.tune`
times other tiles and prints lines for this table. The tests compile every entry for its chips and refuse one that
spills or does not fit.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

# Compute capability of an NVIDIA chip (90 for 9.0), architecture of an AMD one ("gfx942").
Chip = int | str


@dataclass(frozen=True)
class Tile:
    """Of kernels with a product inside: rows x columns x depth of a step, warps, stages, and TMA for loads.

    `N` counts tokens or responses, `V` vocabulary, `D` hidden; which of them are rows depends on the kernel.
    """

    BLOCK_N: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    USE_TMA: bool = False

    def kwargs(self) -> dict[str, Any]:
        return asdict(self) | {"enable_fp_fusion": True}


def warps(count: int) -> dict[str, Any]:
    """How kernels without such a product are launched.

    Products and sums are fused, which Triton will not do unasked from 3.10 on: half of the roundings, and of the time
    of a soft cap's series.
    """
    return {"num_warps": count, "enable_fp_fusion": True}


# Columns of one vocabulary split of the statistics pass and of the projection. They depend on nothing, so that a
# token's sums are grouped alike in every batch. At V = 152k they make 75 and 19 splits: enough programs for 128 tokens.
STATISTICS_SPLIT = 2048
PROJECTION_SPLIT = 8192
# Programs of so many row blocks are launched next to each other: 16 x 8 tiles of H and W are in L2 at one time.
GROUP = 16

# Kernel, 16-bit inputs or not, oldest capability -> tile. A kernel that does more after its product has a name of its
# own, as its registers may not suffice for the same tile: "-kept" stores logits, "-statistics" finds sums too,
# "-scaled" stores gradients twice, "-softcap" is for all that the kernel may do beside a soft cap. fp32 products run on
# CUDA cores.
#
# 9.0: 128 x 128 wherever registers allow, as 64 x 128 reads half as much again for each product. 128 deep, since each
# addition to the fp32 sum waits for the tensor cores, whose own sums keep to the bounds over 128 products
# (`tiles.dot_rows`).
# 10.0: sums of products live in tensor memory, and each addition reads them from there, so that wider tiles gain less
# than a second block on the chip's core, which works while the first waits: tiles take half of the registers and of the
# shared memory where they can. Not measured.
TILES: dict[tuple[str, bool, int], Tile] = {
    ("statistics", True, 80): Tile(128, 128, 32, 8, 4),
    ("statistics", True, 90): Tile(128, 128, 128, 8, 3, USE_TMA=True),
    ("statistics", True, 100): Tile(128, 128, 64, 8, 4, USE_TMA=True),
    ("statistics-kept", True, 80): Tile(64, 128, 32, 8, 4),
    ("statistics-kept", True, 90): Tile(128, 128, 128, 8, 3, USE_TMA=True),
    ("statistics-kept", True, 100): Tile(64, 128, 64, 8, 4, USE_TMA=True),
    ("statistics-softcap", True, 80): Tile(64, 128, 32, 8, 4),
    ("statistics-softcap", True, 90): Tile(64, 128, 128, 8, 3, USE_TMA=True),
    ("statistics-softcap", True, 100): Tile(64, 128, 64, 8, 4, USE_TMA=True),
    ("residuals", True, 80): Tile(128, 128, 32, 8, 4),
    ("residuals", True, 90): Tile(128, 128, 128, 8, 3, USE_TMA=True),
    ("residuals", True, 100): Tile(64, 128, 64, 8, 4, USE_TMA=True),
    ("residuals-statistics", True, 80): Tile(64, 128, 32, 8, 4),
    ("residuals-statistics", True, 90): Tile(128, 128, 64, 8, 4, USE_TMA=True),
    ("residuals-statistics", True, 100): Tile(64, 128, 64, 8, 4, USE_TMA=True),
    ("residuals-softcap", True, 80): Tile(64, 128, 32, 8, 4),
    ("residuals-softcap", True, 90): Tile(64, 128, 128, 8, 3, USE_TMA=True),
    ("residuals-softcap", True, 100): Tile(128, 64, 64, 8, 4, USE_TMA=True),
    ("grad_logits", True, 80): Tile(128, 128, 32, 8, 4),
    ("grad_logits", True, 90): Tile(128, 128, 128, 8, 3, USE_TMA=True),
    ("grad_logits", True, 100): Tile(128, 128, 64, 8, 4, USE_TMA=True),
    ("grad_logits-scaled", True, 80): Tile(64, 128, 32, 8, 4),
    ("grad_logits-scaled", True, 90): Tile(64, 128, 128, 8, 3, USE_TMA=True),
    ("grad_logits-scaled", True, 100): Tile(64, 128, 64, 8, 4, USE_TMA=True),
    ("grad_logits-softcap", True, 80): Tile(64, 128, 32, 8, 4),
    ("grad_logits-softcap", True, 90): Tile(64, 128, 128, 8, 3, USE_TMA=True),
    ("grad_logits-softcap", True, 100): Tile(64, 128, 64, 8, 4, USE_TMA=True),
    ("projection", True, 80): Tile(64, 64, 64, 4, 3),
    ("statistics", False, 80): Tile(64, 64, 16, 8, 2),
    ("statistics-kept", False, 80): Tile(64, 64, 16, 8, 2),
    ("statistics-softcap", False, 80): Tile(32, 64, 16, 4, 2),
    ("residuals", False, 80): Tile(64, 64, 16, 8, 2),
    ("residuals-statistics", False, 80): Tile(64, 64, 16, 8, 2),
    ("residuals-softcap", False, 80): Tile(32, 64, 16, 4, 2),
    ("grad_logits", False, 80): Tile(64, 64, 16, 8, 2),
    ("grad_logits-scaled", False, 80): Tile(64, 64, 16, 8, 2),
    ("grad_logits-softcap", False, 80): Tile(32, 64, 16, 4, 2),
    ("projection", False, 80): Tile(64, 32, 64, 8, 2),
}
# The same for AMD chips, whichever: warps of 64 lanes, 64 KB of shared memory, two stages, no TMA.
_AMD, _AMD_HEAVY, _AMD_FP32 = Tile(128, 128, 64, 8, 2), Tile(64, 128, 64, 8, 2), Tile(64, 64, 16, 8, 2)
AMD_TILES: dict[tuple[str, bool], Tile] = {
    (kernel, half): (_AMD_HEAVY if "-" in kernel else _AMD) if half else _AMD_FP32
    for kernel, half, _ in TILES
    if kernel != "projection"
} | {
    ("projection", True): Tile(64, 64, 64, 8, 2),
    ("projection", False): Tile(64, 32, 64, 8, 2),
}
# On chips with TMA, for rows that it cannot address.
_UNALIGNED = Tile(64, 64, 64, 8, 3)
# Chips of capability 12 have TMA, but neither wgmma nor the shared memory of 9.0 and 10.0.
_LIKE_AMPERE = 120
_TMA_ALIGNMENT = 16
# The interpreter takes a time per operation and not per element, but ragged edges need some tiles.
_INTERPRETED = Tile(16, 64, 32, 1, 1)
INTERPRETED_SPLIT = 256


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def tile(kernel: str, hidden: torch.Tensor, weight: torch.Tensor, work: str = "") -> Tile:
    """The tile in use for these inputs; `work` is what a name in the table has behind its dash."""
    tma = _tma_addressable(hidden) and _tma_addressable(weight)
    if not hidden.is_cuda:
        return replace(_INTERPRETED, USE_TMA=tma)
    name = f"{kernel}-{work}" if work else kernel
    return tile_for(name, hidden.element_size() == 2, chip_of(hidden.device), tma)


def chip_of(device: torch.device) -> Chip:
    if torch.version.hip is not None:
        # Features follow the name: gfx942:sramecc+:xnack-.
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tile_for(kernel: str, half: bool, chip: Chip, tma: bool = True) -> Tile:
    """The newest entry that a chip can use; `tma` says whether TMA can address the rows."""
    if isinstance(chip, str):
        return AMD_TILES[kernel, half]
    if chip >= _LIKE_AMPERE:
        chip = 80
    newest = max(oldest for name, is_half, oldest in TILES if (name, is_half) == (kernel, half) and oldest <= chip)
    tile = TILES[kernel, half, newest]
    return tile if tma or not tile.USE_TMA else _UNALIGNED


def _tma_addressable(x: torch.Tensor) -> bool:
    """Base and rows aligned, and rows that do not overlap, as those of an expanded tensor do."""
    row_bytes = x.stride(0) * x.element_size()
    return x.data_ptr() % _TMA_ALIGNMENT == 0 and row_bytes % _TMA_ALIGNMENT == 0 and x.stride(0) >= x.shape[1]


def statistics_split(like: torch.Tensor) -> int:
    return STATISTICS_SPLIT if like.is_cuda else INTERPRETED_SPLIT


def projection_split(like: torch.Tensor) -> int:
    return PROJECTION_SPLIT if like.is_cuda else INTERPRETED_SPLIT
