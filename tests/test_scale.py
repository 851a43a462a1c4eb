"""The forecast for many GPUs: by hand where a hand can, and what a user who edits the table may get wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scale
from g2rl.config import ConfigError

TABLE = scale.HERE / "scaling" / "assumptions.yaml"


@pytest.fixture(scope="module")
def small() -> scale.Forecaster:
    table = scale.read(TABLE)
    return scale.Forecaster(table, table.runs[0])


def test_rollout_by_hand(small: scale.Forecaster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots, responses of 10, 20 and 30 tokens: the third starts when the first ends, and ends at step 40."""
    monkeypatch.setitem(small.a, "slots", 2)
    a, prompt = small.a, small.a["prompt_tokens"]
    weights = small._body + small.shape.vocab_size * small.shape.hidden_size
    # Tokens in the cache, summed over steps: each response's prompt, and half of its own length on average.
    cached = sum(n * (prompt + n / 2) for n in (10, 20, 30)) * small._cache_bytes
    expected = (40 * 2 * weights + cached) / (a["bandwidth"] * a["bandwidth_share"]) + 40 * a["decode_overhead"]
    expected += 3 * prompt * 2 * small._body / (a["peak_flops"] * a["prefill_share"])
    assert small._engine([10, 20, 30], 1e12) == pytest.approx(expected, rel=1e-12)


def test_sizes_and_work(small: scale.Forecaster) -> None:
    """Qwen3-1.7B has 1,720,574,976 weights; two ranks of five responses wait for the longer half."""
    assert small.alone.parameters == 1_720_574_976
    assert small._cache_bytes == 2 * 28 * 8 * 128 * 2
    assert scale._slowest([5, 4, 3, 3, 1], 2) == 8
    assert scale._slowest([5, 4], 64) == 5
    one, eight = small.step(1), small.step(8)
    assert one.seconds["communication"] == 0
    # 16 bytes a weight, shared; and the pass over all responses takes an eighth but for what one waits for.
    assert one.training["weights, gradients, AdamW (fp32)"] == 16 * 1_720_574_976
    assert eight.training["weights, gradients, AdamW (fp32)"] == 2 * 1_720_574_976
    assert one.seconds["optimizer"] == pytest.approx(8 * eight.seconds["optimizer"])
    # sequence_features instead of token_logprobs, measured on 8192 tokens.
    added = sum(small.lengths) * small._head_size * (small.head["sequence_features"] - small.head["token_logprobs"])
    assert one.added_seconds["features"] == pytest.approx(added)
    assert 0 < sum(eight.added_seconds.values()) < 0.01 * eight.total


def test_page_says_what_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = scale.read(TABLE)
    smaller = replace(table, runs=[replace(table.runs[0], gpus=[8])])
    steps = [scale.Forecaster(smaller, run).step(8) for run in smaller.runs]
    text = scale.page(smaller, steps)
    assert all(f"| {name} | {a.value:g} | {a.source} |" in text for name, a in table.assumptions.items())
    scale.draw(steps, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    # The page that is kept has the row as well: nobody edited it, or the table, alone.
    row = next(line for line in text.splitlines() if line.startswith("| Qwen3-1.7B | 8 |"))
    assert row in (scale.HERE / "SCALING.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("slots: {value: 256", "slots: {value: 0", r"assumptions\.slots: expected a value above 0, found 0"),
        ("  overlap:", "  overlaps:", r"assumptions\.overlap: expected a value above 0, found None"),
        ("model: qwen3-4b,", "model: qwen3-5b,", r"runs\.model: expected one of .*, found 'qwen3-5b'"),
        ("engine_gpus: 4, gpus: [8,", "engine_gpus: 4, gpus: [6,", r"runs\.gpus: expected multiples .* = 4, found 6"),
        ("features.json", "nothing.json", r"measured: expected a result file .* 'nvidia-.*nothing\.json'"),
    ],
)
def test_bad_tables(tmp_path: Path, old: str, new: str, error: str) -> None:
    text = TABLE.read_text()
    assert old in text
    (tmp_path / "table.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=error):
        table = scale.read(tmp_path / "table.yaml")
        scale.Forecaster(table, table.runs[0])
