"""Geometry of responses and true gradients: by hand, by explicit autograd, and end to end on a tiny model."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from g2rl.analysis.agreement import GradientGroup, agreement, coarse, pair_table, response_table
from g2rl.analysis.gradient_report import cell as gradient_cell
from g2rl.analysis.gradients import gradient_products, gram_cosines, model_parts, response_logp
from g2rl.analysis.held import Held
from g2rl.analysis.measures import KINDS, Pairs, effective_dimensions, limits_of, measure_pairs, sums
from g2rl.analysis.report import cell
from g2rl.analysis.representations import bags, cosines, representations, rounded_features, truncated_features
from g2rl.analysis.responses import Sampled, Subject
from g2rl.analysis.statistics import average_ranks, correlation, difference, ratio
from g2rl.cli import main
from g2rl.config import load_config, save_config
from g2rl.rewards import judge_episodes
from g2rl.types import Episode, Problem
from g2rl_kernels import LMHead, sequence_features
from tests.g2rl.conftest import build_model

PROMPT = (5, 9, 3, 12)
RESPONSES = ((7, 7, 20, 1), (30, 4, 1), (7, 21, 8, 9, 1))


def episodes(responses: Any = RESPONSES) -> list[Episode]:
    return [Episode(Problem("p", "?", "1"), PROMPT, tokens, f"text {tokens}", True) for tokens in responses]


def subject_of(path: Path) -> Subject:
    """The model in float64."""
    subject = Subject(load_config(None, [f"model.path={path}", "rollout.temperature=1.25"]))
    subject.model.double()
    return subject


class TestStatistics:
    def test_ratio_and_difference(self) -> None:
        totals, counts = np.array([[1.0, 4.0, 0.0]]), np.array([[2.0, 3.0, 0.0]])
        found = ratio(totals, counts)
        assert found is not None and found.value == 1.0  # 5 of 5; a problem without pairs has no part in it
        # Two problems with values 1/2 and 4/3: resamples lie between, and reach both.
        assert (found.low, found.high) == (0.5, pytest.approx(4 / 3))
        assert ratio(np.zeros((1, 2)), np.zeros((1, 2))) is None
        # Two seeds on one problem, 0 of 1 and 9 of 9: seeds are drawn again, too, and rescaled beyond 1.
        seeds = ratio(np.array([[0.0], [9.0]]), np.array([[1.0], [9.0]]), (0.0, 1.0))
        assert seeds is not None and (seeds.value, seeds.low, seeds.high) == (0.9, 0.0, 1.0)
        # The same problems are drawn for both: of a constant difference, as of one problem, resamples say nothing.
        shifted = difference((totals + 2 * counts, counts), (totals, counts))
        assert shifted is not None and (shifted.value, shifted.low) == pytest.approx((2.0, np.nan), nan_ok=True)
        one = ratio(np.array([[0.4]]), np.array([[1.0]]))
        assert one is not None and (one.value, one.high) == pytest.approx((0.4, np.nan), nan_ok=True)
        assert (cell(one), gradient_cell(one), cell(found)) == ("0.400", "0.40", "1.000 [0.500, 1.333]")
        # Ends are cut to what a difference of shares can be, here -1 to 1.
        wide = (totals + np.array([[0.0, 3.0, 0.0]]), counts)
        cut = difference(wide, (np.zeros((1, 3)), counts), (0.0, 1.0))
        assert cut is not None and (cut.low, cut.high) == (0.5, 1.0)

    def test_ranks(self) -> None:
        assert average_ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]

    @pytest.mark.parametrize(
        "how, expected",
        [
            # x within problems: -1 0 1 and -1 0 1; y: -1 0 1 and 2 0 -2, so r = (2 - 4) / sqrt(4 * 10).
            ({"within": True}, -2 / 40**0.5),
            # Ranks within problems agree in the first and are reversed in the second.
            ({"within": True, "ranks": True}, 0.0),
            # Over all pairs x has 1 2 3 11 12 13 and y 1 2 3 12 10 8: numpy's own number.
            ({"within": False}, np.corrcoef([1, 2, 3, 11, 12, 13], [1, 2, 3, 12, 10, 8])[0, 1]),
            # Ranks 1 to 6 against 1 2 3 6 5 4: 1 - 6 * 8 / (6 * 35).
            ({"within": False, "ranks": True}, 1 - 48 / 210),
        ],
    )
    def test_correlation(self, how: dict[str, bool], expected: float) -> None:
        x, y = np.array([1.0, 2, 3, 11, 12, 13]), np.array([1.0, 2, 3, 12, 10, 8])
        found = correlation(x, y, np.array([0, 0, 0, 1, 1, 1]), **how)
        assert found is not None and found.value == pytest.approx(expected, abs=1e-12)
        if how["within"]:  # resamples of the first problem alone, of the second alone
            assert (found.low, found.high) == pytest.approx((-1, 1))

    def test_no_spread_has_no_correlation(self) -> None:
        assert correlation(np.ones(3), np.arange(3.0), np.zeros(3, dtype=int)) is None
        # A mean of equal values is off by rounding: 0.1 of three is 0.10000000000000002.
        alike, groups = np.repeat([0.1, 0.7], [3, 5]), np.repeat([0, 1], [3, 5])
        assert correlation(alike, np.arange(8.0), groups) is None
        assert correlation(alike, alike, groups) is None
        assert correlation(np.full(3, 0.1), np.arange(3.0), np.zeros(3, dtype=int), within=False) is None


class TestMeasures:
    @pytest.mark.parametrize(
        "similarity, expected",
        [
            (np.eye(3), (3, 3)),
            (np.ones((3, 3)), (1, 1)),
            # Eigenvalues 3/2 and 1/2 of two: shares 3/4 and 1/4.
            (np.array([[1, 0.5], [0.5, 1]]), (1 / (9 / 16 + 1 / 16), np.exp(0.75 * np.log(4 / 3) + 0.25 * np.log(4)))),
            (np.zeros((2, 2)), (np.nan, np.nan)),
            (np.zeros((0, 0)), (np.nan, np.nan)),
        ],
    )
    def test_effective_dimensions(self, similarity: np.ndarray, expected: tuple[float, float]) -> None:
        assert effective_dimensions(similarity) == pytest.approx(expected, nan_ok=True)

    def test_limits(self) -> None:
        expected = {"both wrong negative": (0, 1), "long cosine": (-1, 1), "semantic": (-1, 1), "correct": (0, 1)}
        expected |= {"participation": (1, 16), "entropy dimension": (1, 16), "tokens": (0, np.inf)}
        assert {name: limits_of(name, 16) for name in expected} == expected

    def test_sums_by_hand(self) -> None:
        """Four responses: two right ones with the same tokens, two wrong ones."""
        pairs = Pairs(
            cosine=np.array([1.0, 0.5, -0.25, 0.5, -0.25, 0.125]),
            semantic=np.array([1.0, 0.9, 0.8, 0.9, 0.8, np.nan]),
            identical=np.array([True, False, False, False, False, False]),
            kind=np.array([0, 2, 2, 2, 2, 1]),
            tokens=np.array([4.0, 5.0, 6.0, 5.0, 6.0, 7.0]),
            dimensions=(2.0, 2.5),
            correct=np.array([True, True, False, False]),
            lengths=np.array([4.0, 4.0, 6.0, 8.0]),
        )
        found = sums(pairs, (5.0, 6.0))
        expected = {
            "cosine": (0.625, 5),
            "negative": (2, 5),
            "all pairs cosine": (1.625, 6),
            "identical": (1, 6),
            "participation": (2, 1),
            "entropy dimension": (2.5, 1),
            "semantic": (3.4, 4),
            "both correct cosine": (0, 0),
            "both wrong cosine": (0.125, 1),
            "one of each cosine": (0.5, 4),
            "one of each negative": (2, 4),
            "short cosine": (1.0, 2),
            "middle cosine": (-0.5, 2),
            "long cosine": (0.125, 1),
            "correct": (2, 4),
            "tokens": (22, 4),
        }
        for name, value in expected.items():
            assert found[name] == pytest.approx(value), name

    def test_pairs_of_a_group(self, tiny_model: Path) -> None:
        """An empty response has no pair, and a repeated one is told apart from a like one."""
        subject = subject_of(tiny_model)
        given = episodes((RESPONSES[0], (), RESPONSES[1], RESPONSES[0]))
        found = measure_pairs(subject, Sampled(given[0].problem, given, [True, True, False, True], [1, 1, -1, 1]), None)
        assert found.identical.tolist() == [False, True, False]
        assert [KINDS[k] for k in found.kind] == ["one of each", "both correct", "one of each"]
        assert found.tokens.tolist() == [3.5, 4.0, 3.5]
        assert found.lengths.tolist() == [4, 0, 3, 4] and np.isnan(found.semantic).all()
        assert found.cosine[1] == pytest.approx(1.0) and found.cosine[0] == pytest.approx(found.cosine[2])


class TestRepresentations:
    @pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.5}])
    def test_coarse_features_are_exact_where_nothing_is_left_out(self, options: dict[str, float]) -> None:
        torch.manual_seed(0)
        hidden, targets = torch.randn(7, 16).double(), torch.randint(40, (7,))
        head = LMHead(torch.randn(40, 16).double(), bias=torch.randn(40).double(), temperature=1.5, **options)
        each = torch.arange(8)
        exact = sequence_features(hidden, head, targets, each).features
        torch.testing.assert_close(truncated_features(hidden, head, targets, top=40), exact, rtol=1e-10, atol=1e-10)
        # p over the likeliest word and the target alone.
        weight, logits = head.weight, torch.nn.functional.linear(hidden, head.weight, head.bias)
        if not options:
            two = torch.stack([logits.argmax(1), targets], dim=1)
            p = (logits / 1.5).gather(1, two).softmax(1)
            p[two[:, 0] == two[:, 1]] = 0.5
            expected = weight[targets] - (p[:, :, None] * weight[two]).sum(1)
            torch.testing.assert_close(truncated_features(hidden, head, targets, top=1), expected)
        rounded = rounded_features(hidden, head, targets).double()
        assert 1e-4 < float((rounded - exact).norm() / exact.norm()) < 5e-2  # a few roundings of 2^-9 each

    def test_representations_by_hand(self, tiny_model: Path) -> None:
        subject = subject_of(tiny_model)
        with torch.no_grad():
            states = subject.states(episodes())
            found = representations(states, subject.head(states.hidden), episodes(), None)
            spans = [slice(0, 4), slice(4, 7), slice(7, 12)]
            means = torch.stack([states.hidden[span].mean(0) for span in spans])
            logits = states.hidden @ subject.model.lm_head.weight.T / 1.25
            p = logits.softmax(1)
            phi = subject.model.lm_head.weight[states.targets] - p @ subject.model.lm_head.weight
            entropy = -(p * p.log()).sum(1)
        sums = {
            "phi": phi,
            "phi, entropy": phi * entropy[:, None],
            "phi, unit": phi / phi.norm(dim=1, keepdim=True),
        }
        for name, tokens in sums.items():
            expected = cosines(torch.stack([tokens[span].sum(0) for span in spans]))
            torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6, msg=name)
        torch.testing.assert_close(found["mean hidden"], cosines(means))
        assert found["length"].tolist() == [[1, 0.75, 0.8], [0.75, 1, 0.6], [0.8, 0.6, 1]]
        # Tokens 1, 4, 7, 8, 9, 20, 21, 30: <(1 0 2 0 0 1 0 0), (1 1 0 0 0 0 0 1)> = 1 of norms sqrt 6 and sqrt 3.
        assert float(found["bag of tokens"][0, 1]) == pytest.approx(18**-0.5)
        assert bags(episodes()).sum(1).tolist() == [4, 3, 5]


class TestGradients:
    @pytest.mark.parametrize("tied", [True, False])
    def test_products_are_those_of_explicit_gradients(self, tmp_path: Path, tied: bool) -> None:
        """The whole gradient as backward() leaves it; a tied head has one gradient, counted once."""
        subject = subject_of(build_model(tmp_path, tie_word_embeddings=tied))
        found = gradient_products(subject, episodes())
        gradients = []
        for episode in episodes():
            ids = torch.tensor([episode.prompt_ids + episode.response_ids])
            logps = (subject.model(ids).logits[0, :-1] / 1.25).log_softmax(1).gather(1, ids[0, 1:, None])
            subject.model.zero_grad()
            logps[len(PROMPT) - 1 :].sum().backward()
            gradients.append({name: weight.grad.flatten() for name, weight in subject.model.named_parameters()})
        parts = model_parts(subject.model)
        assert set(parts.values()) == {
            *(f"layer {i} {kind}" for i in range(2) for kind in ("attention", "mlp")),
            *(["embedding and head"] if tied else ["embedding", "head"]),
            "other",
        }
        for part in ("all", *set(parts.values())):
            names = [name for name in parts if part in ("all", parts[name])]
            whole = torch.stack([torch.cat([one[name] for name in names]) for one in gradients])
            # fp32 is what the rotary embedding's angles come in, and the head's own bound is 1e-5.
            torch.testing.assert_close(found[part], whole @ whole.T, rtol=1e-5, atol=1e-7, msg=part)
        assert parts["model.layers.0.input_layernorm.weight"] == "layer 0 attention"
        assert parts["model.layers.0.post_attention_layernorm.weight"] == "layer 0 mlp"

    def test_parts_add_up(self, tiny_model: Path) -> None:
        subject = subject_of(tiny_model)
        products = gradient_products(subject, episodes())
        found = coarse(products)
        torch.testing.assert_close(found["all layers"], found["layer 0"] + found["layer 1"])
        torch.testing.assert_close(found["all layers"], found["all attention"] + found["all mlp"])
        rest = found["all layers"] + found["embedding and head"] + found["other"]
        torch.testing.assert_close(found["all"], rest)

    def test_log_p_is_that_of_the_temperature(self, tiny_model: Path) -> None:
        subject = subject_of(tiny_model)
        ids = torch.tensor([PROMPT + RESPONSES[1]])
        logps = (subject.model(ids).logits[0, 3:-1] / 1.25).log_softmax(1)
        expected = logps.gather(1, ids[0, 4:, None]).sum()
        torch.testing.assert_close(response_logp(subject, episodes()[1]), expected, rtol=1e-6, atol=1e-6)

    def test_gram_cosines(self) -> None:
        vectors = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
        expected = torch.tensor([[1, 0.96, 0], [0.96, 1, 0], [0, 0, 0]], dtype=torch.float64)
        torch.testing.assert_close(gram_cosines(vectors @ vectors.T), expected)


def planted(problems: int = 6) -> list[GradientGroup]:
    """Gradients whose cosines are those of Phi in the layers, and of lengths elsewhere."""
    torch.manual_seed(0)
    groups = []
    for _ in range(problems):
        vectors = torch.nn.functional.normalize(torch.randn(4, 8).double(), dim=1)
        phi = vectors @ vectors.T
        given = episodes([(2,) * n for n in (1, 2, 3, 4)])
        group = Sampled(given[0].problem, given, [True, False, False, True], [1.0, -1.0, -1.0, 1.0])
        products = {"all": phi * 4, "layer 0 attention": phi, "layer 0 mlp": 2 * phi, "other": torch.eye(4).double()}
        groups.append(GradientGroup(group, {"phi": phi, "length": phi**3}, torch.ones(4).double() * 3, products))
    return groups


class TestAgreement:
    def test_tables_and_correlations(self) -> None:
        groups = planted()
        pairs, responses = pair_table(groups), response_table(groups)
        assert len(pairs["phi"]) == 6 * 6 and len(responses["tokens"]) == 6 * 4
        i, j = int(pairs["i"][7]), int(pairs["j"][7])
        phi = float(groups[1].similarities["phi"][i, j])
        assert pairs["problem"][7] == 1 and pairs["gradient layer 0"][7] == pytest.approx(phi)
        # |Phi| = 3 for all, <g, g> = 4 cos; lengths are i + 1 and j + 1.
        assert pairs["phi product mean"][7] == pytest.approx(9 * phi)
        assert pairs["phi product sum"][7] == pytest.approx(9 * phi * (i + 1) * (j + 1))
        assert pairs["product mean"][7] == pytest.approx(4 * phi / ((i + 1) * (j + 1)))
        found = agreement(pairs, responses)
        for way in found["predictors"]["phi"].values():
            assert way.value == pytest.approx(1.0)
        assert found["predictors"]["length"]["spearman within"].value == pytest.approx(1.0)
        assert found["predictors"]["length"]["pearson within"].value < 0.99
        assert found["parts"]["other"]["pearson within"] is None  # orthogonal all over
        assert found["scores"]["phi"].value == pytest.approx(1.0)


ARGUMENTS = ["task.system_prompt=", *"--problems 3 --samples 4 --max-tokens 6 --encoder none --gradients".split()]


class TestCommand:
    def test_two_models_side_by_side(self, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture) -> None:
        other = build_model(tmp_path / "other", seed=1)
        out = tmp_path / "out"
        assert main(["geometry", str(tiny_model), str(other), *ARGUMENTS, "--out", str(out)]) == 0
        assert "mean cosine of Φ" in capsys.readouterr().out
        record = json.loads((out / "geometry.json").read_text())
        labels = [band["label"] for band in record["bands"]]
        assert labels == [tiny_model.name, "other"] and record["settings"]["max_tokens"] == 6
        first, second = record["bands"]
        assert first["measures"]["cosine"]["value"] != second["measures"]["cosine"]["value"]
        gap = second["measures"]["cosine"]["value"] - first["measures"]["cosine"]["value"]
        assert second["minus first"]["cosine"]["value"] == pytest.approx(gap, abs=1e-4)
        assert first["measures"]["semantic"] is None
        with (out / "problems.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["model"] for row in rows] == [labels[0]] * 3 + ["other"] * 3
        with (out / "other-pairs.csv").open() as file:
            pairs = list(csv.DictReader(file))
        assert len(pairs) == record["gradients"]["other"]["pairs"]
        report = (out / "report.md").read_text()
        counts = [sum(int(row["pairs"]) for row in rows if row["model"] == label) for label in labels]
        assert f"| pairs | {counts[0]} | {counts[1]} |\n| pairs, both correct | " in report
        assert f"| models of other | `{other}` |" in report
        for name in ("cosines.png", "kinds.png", "other-pairs.png", "other-predictors.png", "other-layers.png"):
            assert (out / name).is_file() and f"({name})" in report

    def test_a_terminal_without_greek_letters(
        self, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        printed = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
        assert main(["geometry", str(tiny_model), *ARGUMENTS[:-1], "--out", str(tmp_path / "out")]) == 0
        sys.stdout.flush()
        assert b"mean cosine of ?" in printed.getvalue()

    def test_a_folder_that_cannot_be_written(
        self, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture
    ) -> None:
        """Where responses are kept, and where the report goes."""
        (tmp_path / "file").write_text("")
        (tmp_path / "out" / "cosines.png").mkdir(parents=True)
        for out, said in ((tmp_path / "file" / "x", "'{}/held/tiny"), (tmp_path / "out", "out: '{}' cannot")):
            assert main(["geometry", str(tiny_model), *ARGUMENTS[:-1], "--out", str(out)]) == 1
            error = capsys.readouterr().err
            assert f"g2rl: {said.format(out)}" in error
            assert "cannot be written: [Errno" in error

    def test_what_was_found_is_read_again(
        self, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ["geometry", str(tiny_model), *ARGUMENTS, "--out", str(tmp_path)]
        assert main(command) == 0
        before = (tmp_path / "geometry.json").read_text()
        monkeypatch.setattr("g2rl.analysis.agreement.gradient_products", None)  # would fail if it were called
        assert main(command) == 0
        assert (tmp_path / "geometry.json").read_text() == before

    def test_what_was_found_of_something_else_is_not(
        self, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same line of a file with another problem. The same responses are judged by another answer or reward."""
        path, kept = tmp_path / "set.jsonl", tmp_path / "held" / tiny_model.name / "responses" / "0000.json"
        train = tmp_path / "train.jsonl"
        train.write_text(json.dumps({"problem": "2 + 2?", "answer": "4"}) + "\n")
        options = ["task.name=jsonl", f"task.options={{path: {train}, eval_path: {path}}}", "task.system_prompt="]
        sizes = "--problems 1 --samples 2 --max-tokens 3 --encoder none".split()

        def found(prompt: str, answer: str, *rewards: str) -> dict:
            path.write_text(json.dumps({"problem": prompt, "answer": answer}) + "\n")
            assert main(["geometry", str(tiny_model), *options, *rewards, *sizes, "--out", str(tmp_path)]) == 0
            return json.loads(kept.read_text())

        first = found("1 + 1?", "2")
        other = found("1 + 2?", "2")
        assert other["found"]["prompt_ids"] != first["found"]["prompt_ids"]
        drawn: list[Any] = []
        judge = judge_episodes
        monkeypatch.setattr("g2rl.analysis.responses.judge_episodes", lambda *a: drawn.append(judge(*a)) or drawn[-1])
        monkeypatch.setattr("g2rl.rollout.TransformersSampler.sample", None)  # would fail if it were called
        assert found("1 + 2?", "3") == found("1 + 2?", "2", "rewards=[{name: boxed}]") == other
        assert [[verdict.reward for verdict in verdicts] for verdicts in drawn] == [[-1, -1], [0, 0]]

    @pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"found": 1}', b"\xff"])
    def test_a_damaged_record_is_not_there(self, tmp_path: Path, damage: bytes) -> None:
        held = Held(tmp_path, {"weights": "w"})
        held.write(0, "p", {"value": 1})
        assert held.read(0, "p") == {"value": 1}
        (tmp_path / "0000.json").write_bytes(damage)
        assert held.read(0, "p") is None

    @pytest.mark.parametrize(
        "keys, found",
        [
            (["held_out=32"], "task.held_out = 64 in {} and task.held_out = 32 in {}; task.held_out=... chooses"),
            (
                ["options.digits=[1,1]", "system_prompt=Add."],
                "task.options.digits = None, task.system_prompt = None in {} and task.options.digits = [1, 1], "
                "task.system_prompt = 'Add.' in {}; task.options.digits=... task.system_prompt=... chooses",
            ),
        ],
    )
    def test_runs_of_different_tasks(
        self, tmp_path: Path, capsys: pytest.CaptureFixture, keys: list[str], found: str
    ) -> None:
        folders = [tmp_path / name / "checkpoints" / "step-000001" for name in "ab"]
        for folder, settings in zip(folders, ([], [f"task.{key}" for key in keys]), strict=True):
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            save_config(load_config(overrides=settings), folder.parents[1] / "config.yaml")
        assert main(["geometry", *map(str, folders)]) == 2
        said = f"g2rl: task: expected runs of one task, found {found.format(*folders)} for all\n"
        assert capsys.readouterr().err == said

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--problems", "65"], "problems: expected 1 to the 64 that arithmetic holds out"),
            (["--samples", "1"], "samples: expected 2 or more, found 1"),
            (
                ["rewards=[{name: away:f}]", "model.attention=flash_attention_2"],
                "rewards[0].name: expected a module that can be",
            ),
            (["backend=cuda", "model.device=cpu"], "backend: expected auto or one that runs here, found 'cuda': "),
            (["no/such/folder"], "model.path: expected a causal language model"),
        ],
    )
    def test_bad_requests(
        self, tiny_model: Path, capsys: pytest.CaptureFixture, tmp_path: Path, arguments: list[str], message: str
    ) -> None:
        given = ["geometry", str(tiny_model), "--encoder", "none", "--out", str(tmp_path / "out"), *arguments]
        if arguments[0].startswith("no"):
            given[1:2] = ["./no-such-folder"]
            given.pop()
        assert main(given) == 2
        assert message in capsys.readouterr().err
