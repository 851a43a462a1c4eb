"""What benchmarks.kernels makes of a profile; the profile itself needs a GPU."""

from __future__ import annotations

import pytest

kernels = pytest.importorskip("benchmarks.kernels", reason="needs rich")

STATISTICS = (
    "void g2rl::cuda::sm90::(anonymous namespace)::statistics_kernel<g2rl::cuda::bf16, false, true>(CUtensorMap_st, "
    "CUtensorMap_st, g2rl::cuda::sm90::(anonymous namespace)::StatisticsArguments)"
)


def profile(*kernels_of_rounds: tuple[tuple[str, float], ...]) -> list:
    """Launches in microseconds, one after another: a product and then the call's kernels in each round."""
    found, now = [], 0.0
    for of_round in kernels_of_rounds:
        for name, duration in (("spin_kernel(long)", 1.0), *of_round[:1], ("spin_kernel(long)", 1.0), *of_round[1:]):
            found.append(kernels.Launch(name, now, duration))
            now += duration + 2.0
    return found


def test_rows() -> None:
    mm = "nvjet_tst_128x256_64x4_2x1_v_bz_TNT"
    rounds = (
        ((mm, 6000.0), (STATISTICS, 7500.0), ("merge", 10.0), ("merge", 20.0)),
        ((mm, 6500.0), (STATISTICS, 7200.0), ("merge", 20.0), ("merge", 30.0)),
        ((mm, 6400.0), (STATISTICS, 7000.0), ("merge", 20.0), ("merge", 20.0), (mm, 100.0)),
    )
    # A profiler tells of launches in any order.
    rows = kernels.rows_of(reversed(profile(*rounds)))
    assert [(row.name, row.launches) for row in rows] == [
        ("torch.mm", 1),
        ("sm90::statistics_kernel<bf16, false, true>", 1),
        ("merge", 2),
        (mm, 0),
        ("sum", 3),
    ]
    assert [row.ms for row in rows] == pytest.approx([6.4, 7.2, 0.04, 0.0, 7.25])
    assert [row.times_mm for row in rows] == pytest.approx([row.ms / 6.4 for row in rows])


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (STATISTICS, "sm90::statistics_kernel<bf16, false, true>"),
        ("void at::native::(anonymous namespace)::fill<float>(float*, int)", "fill<float>"),
        ("_group_kernel", "_group_kernel"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert kernels.short(name) == short
