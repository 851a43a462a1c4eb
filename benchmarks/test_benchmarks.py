"""Times of small shapes for tracking regressions: ``pytest benchmarks --benchmark-only``.

No time is asserted; results are, against float64. Every test uses the `benchmark` fixture, so that none is left out.
"""

from __future__ import annotations

import json
from functools import wraps
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import prefix_sharing, readme, rollout, run
from benchmarks.candidates.lineup import Case, candidates
from benchmarks.cases.registry import GROUP_OP, GROUPS, HEAD_OPS, OPS, Op, Shape
from benchmarks.cases.workloads import group_workload, head_workload, lengths
from benchmarks.measuring.accuracy import broken_bounds, errors, expected_groups, expected_head
from benchmarks.measuring.measure import Settings
from benchmarks.measuring.timing import machine
from benchmarks.plots import draw_cases, draw_sweep
from benchmarks.reporting.reports import Report
from g2rl.config import ModelConfig, load_config
from g2rl_kernels import testing
from tests.g2rl.conftest import build_model

CPU = torch.device("cpu")
SMALL = Shape("small", "small", 64, 4, 128, 8192)
TINY = Shape("tiny", "tiny", 24, 3, 32, 1105)
BACKENDS = testing.available_backends(CPU, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", HEAD_OPS, ids=lambda op: op.name)
def test_head_op(benchmark, op: Op, backend: str) -> None:
    ((case, expected),) = run.head_cases(SMALL, "peaked", [op], CPU, torch.bfloat16)
    call = _ours(case, backend)
    assert broken_bounds(errors(benchmark(call), expected)) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_group_op(benchmark, backend: str) -> None:
    sample = group_workload(GROUPS, CPU)
    results = benchmark(_ours(Case(GROUP_OP, sample), backend))
    assert broken_bounds(errors(results, expected_groups(sample.features, sample.rewards, sample.m))) == []


def _ours(case: Case, backend: str):
    (ours,) = [c for c in candidates(case, with_peers=False, backends=[backend]) if c.name == f"g2rl {backend}"]
    return ours.prepare(case)


@pytest.mark.parametrize("kind", ("random", "peaked"))
def test_oracle_agrees_with_token_by_token(benchmark, kind: str) -> None:
    sample = head_workload(TINY, kind, torch.float32, CPU)
    found = benchmark.pedantic(expected_head, (sample,), rounds=1).results
    for name, want in testing.oracle(sample)._asdict().items():
        torch.testing.assert_close(found[name], want, rtol=1e-10, atol=1e-12)


def test_bounds_have_the_rounding_of_the_product(benchmark) -> None:
    sample = head_workload(TINY, "peaked", torch.float32, CPU)
    rounding = benchmark.pedantic(expected_head, (sample,), rounds=1).rounding
    assert rounding == pytest.approx(float(testing.accumulation_error(sample).max()), rel=1e-9)
    found = {"logp_absolute": 1e-5 + rounding, "phi_relative": 1e-5 + rounding}
    assert broken_bounds(found, rounding) == broken_bounds({"phi_relative": found["phi_relative"]}) != []


def test_gradient_oracle_agrees_with_autograd(benchmark) -> None:
    sample = head_workload(TINY, "peaked", torch.float32, CPU)
    upstream = (torch.randn(TINY.N), torch.randn(TINY.N))
    found = benchmark.pedantic(expected_head, (sample, upstream), rounds=1)
    exact, _ = testing.oracle_gradients(sample, *upstream)
    torch.testing.assert_close(found.results["hidden"], exact.hidden, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.results["weight"], exact.weight, rtol=1e-6, atol=1e-7, check_dtype=False)
    # An error of a hundredth in one row is beyond the bounds of fp32, and found.
    wrong = {"hidden": found.results["hidden"].clone()}
    wrong["hidden"][3] *= 1.01
    assert "hidden_of_bound" in " ".join(broken_bounds(errors(wrong, found)))
    wrong["hidden"][3] = torch.nan
    assert "hidden_of_bound nan" in " ".join(broken_bounds(errors(wrong, found)))


def test_runner_reports_every_candidate(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run over all ops, its JSON, its tables and its plots."""
    plan = run.Plan(tuple(OPS.values()), (TINY,), ("random",))
    settings = Settings(rounds=2, limit_s=1.0, backends=["torch", "cuda"])
    path = tmp_path / "run.json"
    benchmark.pedantic(run.measure_all, (plan, settings, path), rounds=1)
    report = Report("run", json.loads(path.read_text()))
    assert len(report.cases()) == len(OPS)
    for rows in report.cases():
        status = {row["candidate"]: row["status"] for row in rows}
        assert status["g2rl torch"] == "ok"
        assert status["eager"] in ("ok", "outside bounds", "unavailable")
        assert status["g2rl cuda"] == "unavailable"
        ours = next(row for row in rows if row["candidate"] == "g2rl torch")
        assert ours["median_s"] >= ours["fastest_s"] > 0 and ours["gflops"] > 0
    monkeypatch.setattr(readme, "_SUMMARY_KIND", "random")
    monkeypatch.setattr(readme, "_SUMMARY_TOKENS", 1)
    assert "| bfloat16 | " in readme.summary([report])
    assert "Not timed" in readme.details([report])
    assert draw_cases(report) is not None
    report.content["sweep"] = "N"
    assert draw_sweep(report) is not None


def test_wrong_result_has_no_time(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend beyond its bounds is shown as failed, and the run's status says so."""
    import g2rl_kernels.backends.eager as eager

    right = eager.token_logprobs

    @wraps(right)  # which is known by its module
    def wrong(*arguments):
        logps, *others = right(*arguments)
        return logps - 1e-3, *others

    monkeypatch.setattr(eager, "token_logprobs", wrong)
    plan = run.Plan((OPS["token_logprobs"],), (TINY,), ("random",))
    settings = Settings(rounds=2, limit_s=1.0, backends=["torch"])
    report = benchmark.pedantic(run.measure_all, (plan, settings, None), rounds=1)
    (ours,) = [row for row in report["rows"] if row["role"] == "ours"]
    assert ours["status"] == "failed" and "logp_absolute" in ours["reason"] and "median_s" not in ours


def test_prefix_sharing(benchmark) -> None:
    """All ways of a two-layer model, and their sentence in docs/TRAINING.md."""
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    sizes = prefix_sharing.Sizes(groups=2, m=3, prompt=6, response=4, attention="sdpa")
    arguments = (model, ModelConfig(autocast="none"), sizes, 2)
    measured = benchmark.pedantic(prefix_sharing.measure, arguments, rounds=1)
    assert measured["gradient_difference_float32"] < 1e-5
    assert measured["faster"] > 0 and set(measured["median_s"]) == {"repeated", "packed", "shared"}
    report = Report("prefix", {"machine": machine(CPU), "prefix_sharing": {"small": measured}})
    assert "with 3 responses of 4 tokens to each prompt of 6" in readme.training([report])
    assert prefix_sharing.table({"small": measured}).row_count == 1


def test_rollouts(benchmark, tmp_path: Path) -> None:
    """By the same draws, `generate` and the embedded engine sample the same tokens; docs/TRAINING.md says so."""
    settings = [f"model.path={build_model(tmp_path)}", "rollout.dtype=float32", "rollout.max_new_tokens=6"]
    config = load_config(rollout.CONFIG, [*settings, "rollout.prompts=2"])
    samplers, reason = rollout.engines(config)
    ways = rollout.runs(samplers, rollout.prompts_of("quickstart", samplers[rollout.EMBEDDED], config))
    measured = benchmark.pedantic(rollout.measure, (ways, 2), rounds=1)
    assert measured["tokens"][rollout.SHARED] == measured["tokens"][rollout.EMBEDDED]
    assert all(0 < n <= 16 * 6 for counts in measured["tokens"].values() for n in counts)
    assert measured["rate"]["times"][rollout.GENERATE][rollout.GENERATE] == 1
    assert (rollout.VLLM in ways) == (reason == "")
    report = Report("rollout", {"machine": machine(CPU), "rollout": {"small": measured}, "without_vllm": reason})
    assert "| small | " in readme.training([report])
    assert rollout.table({"small": measured}).row_count == 1


def test_readme_block_is_replaced(benchmark) -> None:
    text = "before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n"
    replaced = benchmark.pedantic(readme.replaced, (text, "new", "README.md"), rounds=1)
    assert replaced == "before\n<!-- benchmarks -->\nnew\n<!-- /benchmarks -->\nafter\n"
    assert readme.replaced(replaced, "new", "README.md") == replaced
    with pytest.raises(ValueError, match="README.md: expected"):
        readme.replaced("no markers", "new", "README.md")


def test_study_in_the_readme(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row a method, a column a task, and the difference to the baseline."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.study("studies/methods") == "It has not been run on this version yet."
    grpo, g2rl = ({"pass@1": {"value": v, "low": v - 0.1, "high": v + 0.1}} for v in (0.4, 0.5))
    methods = {"grpo": {"scores": grpo, "differences": {}}, "g2rl": {"scores": g2rl, "differences": {}}}
    task = {"metrics": ["pass@1", "maj@4"], "steps": 30, "held_out": 48, "methods": methods}
    everywhere = {"g2rl": {"pass@1": {"value": 0.1, "low": -0.05, "high": 0.25, "p": 0.0625}}}
    content = {"baseline": "grpo", "seeds": [0, 1], "test": "signs", "runs": {"planned": 8, "finished": 7}}
    content |= {"tasks": {"sums": task, "gcds": task}, "all_tasks": everywhere, "environment": {"device": "cpu (x)"}}
    (tmp_path / "studies/methods").mkdir(parents=True)
    (tmp_path / "studies/methods/results.json").write_text(json.dumps(content))
    assert readme.again("studies/methods") == (
        "The same with 2 other seeds, question and seeds written down before they had ended: pass@1 over all tasks, "
        "g2rl +10.0 [-5.0, +25.0], p = 0.0625 against grpo. [What that says](studies/methods/README.md)."
    )
    lines = benchmark.pedantic(readme.study, ("studies/methods",), rounds=1).splitlines()
    assert lines[0] == "| held-out pass@1, % | sums | gcds | all tasks, against grpo |"
    assert lines[2] == "| grpo | 40.0 [30.0, 50.0] | 40.0 [30.0, 50.0] |  |"
    assert lines[3] == "| g2rl | 50.0 [40.0, 60.0] | 50.0 [40.0, 60.0] | +10.0 [-5.0, +25.0], p = 0.0625 |"
    assert "7 of 8 runs, 2 seeds, 30 steps, 48 held-out problems a task, cpu (x)." in lines[5]
    assert lines[-1] == "![Held-out pass@1 over training](studies/methods/overview.png)"


def test_lengths_sum_to_tokens(benchmark) -> None:
    benchmark.pedantic(lengths, (1024, 16), rounds=1)
    for N, B in ((1024, 16), (256, 8), (64, 16), (5, 8), (1, 1)):
        assert sum(lengths(N, B)) == N and len(lengths(N, B)) == B and min(lengths(N, B)) >= 0
