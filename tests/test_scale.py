"""The forecast for many GPUs: by hand where a hand can, and what a user who edits the table may get wrong."""

from __future__ import annotations

from collections.abc import Callable
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
    """Qwen3-1.7B has 1,720,574,976 weights; two ranks wait for the one with more, after each mini-batch or both."""
    assert small.alone.parameters == 1_720_574_976
    assert small._cache_bytes == 2 * 28 * 8 * 128 * 2
    assert scale._slowest([[[5, 4], [3, 3]], [[1, 1], [2, 4]]], float) == (9 + 6, 12)
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


@pytest.fixture
def of(small: scale.Forecaster, monkeypatch: pytest.MonkeyPatch) -> Callable[..., scale.Forecaster]:
    """The small model's run on 8 GPUs with other settings, and the small run's activations."""
    monkeypatch.setattr(scale, "forecast", lambda *_: small.alone)
    table = scale.read(TABLE)

    def forecaster(*overrides: str) -> scale.Forecaster:
        run = replace(table.runs[0], gpus=[8], overrides=["rollout.prompts=128", *overrides])
        return scale.Forecaster(table, run)

    return forecaster


def test_groups_are_dealt_out_as_the_trainer_does(small: scale.Forecaster) -> None:
    """Whole, and side by side: 64 groups in each of two mini-batches, 8 to each of 8 ranks."""
    first, second = small._updates(8)
    assert sum(first + second, []) == small.lengths and len(small.lengths) == 128 * 16
    assert {len(own) for own in first + second} == {8 * 16} and first[1] == small.lengths[128:256]
    assert [small.step(gpus).groups for gpus in (1, 8, 64)] == [64, 8, 1]


def test_communication_by_hand(small: scale.Forecaster) -> None:
    """Weights are gathered in 16 bits for each pass, and gradients reduced in fp32 after each pass backwards."""
    passes = 0
    for ranks in small._updates(8):
        tokens = max(sum(own) + len(own) * 200 for own in ranks)
        passes += -(-tokens // 18432)
    # The first pass, that of the KL term, and the update's own forwards and backwards.
    moved = 7 / 8 * 1_720_574_976 * passes * (2 * 4 + 4)
    expected = moved / (450e9 * 0.8) * (1 - 0.5)
    assert small._communication(8)[0] == pytest.approx(expected, rel=1e-12)


def test_more_updates_cost_more_of_all_that_belongs_to_them(of: Callable[..., scale.Forecaster]) -> None:
    """Two passes of updates over the same rollouts; of the passes before the first update there is one."""
    once, twice = (of(f"objective.updates={n}").step(8).seconds for n in (1, 2))
    for stage in ("optimizer", "backward"):
        assert twice[stage] == pytest.approx(2 * once[stage])
    # For each micro-batch: gathered 4 times and reduced once; then 6 times and twice.
    assert twice["communication"] == pytest.approx(once["communication"] * (2 * 6 + 4 * 2) / (2 * 4 + 4), rel=1e-3)
    assert twice["rollout"] == once["rollout"]


def test_passes_before_the_first_update(of: Callable[..., scale.Forecaster]) -> None:
    """One for old log-probabilities where there are several updates, or groups that no micro-batch holds."""
    whole = ("objective.mini_batches=1", "objective.tokens_per_micro_batch=0", "objective.kl_coef=0")
    assert of(*whole).once == 0
    assert of(*whole, "objective.updates=2").once == of(*whole, "objective.kl_coef=0.001").once == 1
    assert of(*whole, "objective.tokens_per_micro_batch=18432").once == 1


@pytest.mark.parametrize(("groups", "rows"), [(1, 16), (2, 32)])
def test_micro_batches_of_whole_groups(of: Callable[..., scale.Forecaster], groups: int, rows: int) -> None:
    """`tokens_per_micro_batch=0` counts groups: residuals of each of their responses are held at a time."""
    setting = of("objective.tokens_per_micro_batch=0", f"objective.micro_batch_groups={groups}")
    assert setting.step(8).added_bytes == 4 * (2048 * 2048 + rows * 151936)
    # A mini-batch has two groups for each rank, and on 16 ranks one.
    assert [setting._micro_batches(own) for own in setting._updates(8)[0]] == [2 // groups] * 8
    assert setting.step(16).added_bytes == 4 * (2048 * 2048 + 16 * 151936)
    activations = [setting.step(gpus).training["activations"] for gpus in (8, 16)]
    assert activations[0] == groups * activations[1]


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
    assert "Ranks have whole groups, 8 of them in an update here" in text


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("slots: {value: 256", "slots: {value: 0", r"assumptions\.slots: expected a value above 0, found 0"),
        ("  overlap:", "  overlaps:", r"assumptions\.overlap: expected a value above 0, found None"),
        ("model: qwen3-4b,", "model: qwen3-5b,", r"runs\.model: expected one of .*, found 'qwen3-5b'"),
        ("engine_gpus: 4, gpus: [8,", "engine_gpus: 4, gpus: [6,", r"runs\.gpus: expected multiples .* = 4, found 6"),
        ("engine_gpus: 4, gpus: [8,", "engine_gpus: 4, gpus: [0,", r"runs\.gpus: expected multiples .* = 4, found 0"),
        ("engine_gpus: 4", "engine_gpus: 0", r"runs\.engine_gpus: expected 1 or more, found 0"),
        (
            "overlap: {value: 0.5",
            "overlap: {value: 1.5",
            r"assumptions\.overlap: expected a share of at most 1, found 1\.5",
        ),
        (
            "prompts=128",
            "prompts=64",
            r"runs, Qwen3-1\.7B: rollout\.prompts: expected a multiple of 128, 64 ranks .* 64$",
        ),
        (
            "prompts=128,",
            "prompts=128, model.lora.rank=8,",
            r"parallel\.strategy: expected ddp with model\.lora\.rank > 0",
        ),
        ("gpus: [8, 64]", "gpus: []", r"runs\.gpus: expected one number of GPUs or more, found none"),
        ("hidden_size: 2048", "hiden_size: 2048", r"models\.qwen3-1\.7b: expected .*unknown: hidden_size"),
        ("num_hidden_layers: 28", "num_hidden_layers: 0", r"models\..*num_hidden_layers: expected 1 or more, found 0"),
        ("features.json", "nothing.json", r"measured: expected a result file .* 'nvidia-.*nothing\.json'"),
        (
            "    - nvidia-h100-80gb-hbm3-backward.json\n",
            "",
            r"measured\.heads: .* with times of logprobs_backward, found nv",
        ),
        (
            "groups: nvidia-h100-80gb-hbm3-groups",
            "groups: cpu-2-cores-real",
            r"measured\.groups: .*times of g2rl_advantages",
        ),
    ],
)
def test_bad_tables(tmp_path: Path, old: str, new: str, error: str) -> None:
    text = TABLE.read_text()
    assert old in text
    (tmp_path / "table.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=error):
        table = scale.read(tmp_path / "table.yaml")
        scale.Forecaster(table, table.runs[0])


def test_a_table_needs_runs(tmp_path: Path) -> None:
    text = TABLE.read_text()
    (tmp_path / "table.yaml").write_text(
        text[: text.index("\nruns:")] + "\nruns: []\n" + text[text.index("\nmodels:") :]
    )
    with pytest.raises(ConfigError, match="runs: expected one or more, found none"):
        scale.read(tmp_path / "table.yaml")
