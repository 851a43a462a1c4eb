"""A head whose vocabulary, or responses whose tokens, are split over two and three processes, against the unsplit op.

Backends without processes are in test_head_parts.py; what the processes run, in split_head_ranks.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from head_cases import check_gradients_of_parts

from g2rl_kernels import SequenceFeatures, distributed, sequence_features, testing
from g2rl_kernels.records import Gradients
from tests.ops.split_head_ranks import BACKENDS, CASES, sample

ROOT = Path(__file__).parents[2]


class Run(NamedTuple):
    """What each rank has saved."""

    ranks: list[dict[str, Any]]

    def of(self, name: str) -> list[Any]:
        return [rank[name] for rank in self.ranks]


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.ops.split_head_ranks"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(folder)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-6000:]
    return Run([torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)])


on_two_ranks = pytest.mark.parametrize("run", [2], indirect=True, ids=["two"])


def gradients(found: dict[str, torch.Tensor]) -> Gradients:
    return Gradients(*(found.get(f"grad_{name}") for name in Gradients._fields))


def results(found: dict[str, torch.Tensor]) -> SequenceFeatures:
    return SequenceFeatures(*(found[name] for name in SequenceFeatures._fields))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(run: Run, backend: str, name: str) -> None:
    of_ranks = [of_rank[f"{backend}-{name}"] for of_rank in run.of("split")]
    s = sample(name, len(of_ranks))
    first = of_ranks[0]
    for other in of_ranks:
        for which in (*SequenceFeatures._fields, "grad_hidden"):
            assert torch.equal(other[which], first[which]), which
        assert all(torch.equal(x, y) for x, y in zip(other["alone"], results(other)[1:], strict=True))
    testing.assert_bounds(results(first), testing.oracle(s), s.cu_seqlens)
    shares = [gradients(of_rank[f"{backend}-{name}-shares"]) for of_rank in run.of("split")]
    check_gradients_of_parts(s, shares, first["grad_hidden"])
    check_gradients_of_parts(s, shares, sum(share.hidden.double() for share in shares))
    for summed, share in zip(of_ranks, shares, strict=True):
        assert torch.equal(summed["grad_weight"], share.weight)


def test_parts_in_another_order(run: Run) -> None:
    s, of_ranks = sample("plain", len(run.ranks)), run.of("reversed_parts")
    testing.assert_bounds(results(of_ranks[0]), testing.oracle(s), s.cu_seqlens)
    check_gradients_of_parts(s, [gradients(x) for x in of_ranks[::-1]], of_ranks[0]["grad_hidden"])


def test_tied_weight(run: Run) -> None:
    """The embedding's gradient comes through hidden's. fp32 sums of N = 23 terms, in another order."""
    of_ranks = run.of("tied")
    assert relative(torch.cat([x["part"] for x in of_ranks]), of_ranks[0]["whole"]) < 1e-6


def test_dtensor(run: Run) -> None:
    s, of_ranks = sample("large", len(run.ranks)), run.of("dtensors")
    testing.assert_bounds(results(of_ranks[0]), testing.oracle(s), s.cu_seqlens)
    check_gradients_of_parts(s, [gradients(of_ranks[0])], of_ranks[0]["grad_hidden"])


def test_fsdp2_weight(run: Run) -> None:
    """By parts for tokens that ranks share; gathered, with a mean over ranks, for tokens of their own."""
    of_ranks = run.of("fsdp")
    for x in of_ranks:
        assert relative(x["by-parts"], x["whole"]) < 1e-6
        assert relative(x["gathered"], sum(y["own"].double() for y in of_ranks) / len(of_ranks)) < 1e-6
        assert torch.equal(x["features"], x["own-features"])


def test_tokens_split_over_ranks(run: Run) -> None:
    s, of_ranks = sample("bf16", len(run.ranks)), run.of("context")
    without_weights = sequence_features(s.hidden, s.head, s.targets, s.cu_seqlens)
    for name, expected in (("weighted", testing.oracle(s)), ("plain", without_weights)):
        for x in of_ranks:
            assert torch.equal(x[name], of_ranks[0][name])
        for found, want in zip(of_ranks[0][name], expected.features, strict=True):
            assert float((found - want).norm()) <= testing.PHI_RELATIVE * float(want.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_long_responses_are_summed_exactly(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one in fp32, terms of 0.1 lose 1e-3 of a sum of 300000. A sum is data, as features are."""
    sums = []
    for name in ("check_group", "check_alike"):
        monkeypatch.setattr(distributed, name, lambda *arguments: None)
    monkeypatch.setattr(distributed, "sum_features", lambda phi, weights, group: sums.append(weights) or phi)
    token_weights = torch.full((300_060,), 0.1, dtype=dtype, requires_grad=True)
    group: Any = SimpleNamespace(size=lambda: 1, group_name="")
    hidden, targets = torch.zeros(300_060, 1), torch.zeros(300_060, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, 60, 60, 300_060])
    sequence_features(hidden, torch.ones(1, 1), targets, cu_seqlens, token_weights, context_group=group)
    expected = token_weights.detach()[0].double() * cu_seqlens.diff()
    assert not sums[0].requires_grad and sums[0].dtype == torch.float64
    assert torch.equal(sums[0].float(), expected.float())


@pytest.mark.parametrize("scale", [1e-300, 1e-60, 1e60, 1e300])
def test_weights_of_any_scale(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond fp32's numbers, too, as without a group."""
    for name in ("check_group", "check_alike"):
        monkeypatch.setattr(distributed, name, lambda *arguments: None)
    monkeypatch.setattr(distributed, "all_reduce", lambda x, group: x)
    s = sample("bf16", 2)
    inputs = (s.hidden, s.head, s.targets, s.cu_seqlens, s.token_weights.double() * scale)
    group: Any = SimpleNamespace(size=lambda: 1, group_name="")
    found = sequence_features(*inputs, context_group=group).features
    # Multiplied and divided in float64, and rounded once more to fp32.
    torch.testing.assert_close(found, sequence_features(*inputs).features, rtol=2.0**-23, atol=0)


@on_two_ranks
def test_compiled_steps_equal_eager(run: Run) -> None:
    """One graph, collectives included, for batches of two sizes; the ops and their order are the same."""
    for steps in run.of("compiled"):
        for eager, compiled in zip(steps[::2], steps[1::2], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))


WHERE = "on every rank of the head (gather_weight is for ranks with tokens of their own)"
REFUSED = {
    "gap": "ValueError: head.vocab_start: expected parts that join up from word 0 on, found 0 to 4, 5 to 10",
    "overlap": "ValueError: head.vocab_start: expected parts that join up from word 0 on, found 0 to 4, 3 to 8",
    "one start": "ValueError: head.vocab_start: expected on every rank or on none, found 0 and 1",
    "d": "ValueError: head.weight: expected the same d on every rank, found 3 and 4",
    "bias": "ValueError: head.bias: expected on every rank or on none, found 0 and 1",
    "temperature": "ValueError: head.temperature: expected the same on every rank, found 1 and 1.1",
    "device": "ValueError: head.process_group: expected a group for cpu tensors, found one for cuda:gloo",
    "N": f"ValueError: hidden: expected the same N {WHERE}, found 2 and 3",
    "targets": f"ValueError: targets: expected the same checksum {WHERE}, found 2 and 4",
    "beyond": "IndexError: targets: expected values in [0, 9), found 9",
    "B": f"ValueError: cu_seqlens: expected the same B + 1 {WHERE}, found 2 and 3",
    "context": "ValueError: cu_seqlens: expected the same B + 1 on every rank of context_group, found 2 and 3",
    "backend": "ValueError: backend: expected the same on every rank, by number of "
    "['cuda', 'triton', 'native', 'torch', 'reference'], found 3 and 4",
    "columns": "ValueError: head.weight: expected a DTensor sharded once, on dimension 0, found (Shard(dim=1),)",
    "start": "ValueError: head.vocab_start: expected None with gather_weight, {}",
    "short bias": "ValueError: head.bias: expected shape [9], {}",
    "two groups": "ValueError: head.process_group: expected None beside a DTensor, which has its own, found a group",
    "hidden": "TypeError: hidden: expected a plain tensor, found a DTensor: pass its to_local()",
}


@on_two_ranks
def test_bad_input_is_refused_on_every_rank(run: Run) -> None:
    for rank, refused in enumerate(run.of("refused")):
        of_rank = {"start": f"found {5 * rank}", "short bias": f"found [{5 - rank}]"}
        assert refused == {name: said.format(of_rank.get(name)) for name, said in REFUSED.items()}
