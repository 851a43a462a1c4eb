"""Training on several ranks: the numbers of one process, and what happens when a rank is gone or differs."""

from __future__ import annotations

import shutil
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from g2rl.checkpoint import checkpoints
from g2rl.cli import main
from g2rl.config import ModelConfig
from g2rl.model import load_model
from g2rl.parallel.sharding import place
from tests.g2rl.json_lines import read, untimed
from tests.g2rl.ranks import launch

# Groups that are cut, so that ranks have different numbers of micro-batches; groups that are asked for again; a
# reference that changes; evaluation of a number of problems that no number of ranks divides.
SETTINGS = """
steps: 3
model: {autocast: none}
rollout: {dtype: float32, prompts: 8, group_size: 4, max_new_tokens: 6, max_extra_groups: 3}
task: {options: {digits: [1, 1]}, held_out: 5}
objective: {aggregation: token_mean, mini_batches: 2, kl_coef: 0.1, reference_every: 2, entropy_coef: 0.01,
            tokens_per_micro_batch: 150, importance_cap: 2, overlong: filter}
eval: {every: 3, samples: 2, ks: [1, 2]}
checkpoint: {every: 1}
optim: {lr: 1e-3}
rewards: [{name: "ranks_reward:digits"}]
"""
REWARD = """
def digits(problem, response, finished):
    return 2 * sum(c.isdigit() for c in response) / max(len(response), 1) - 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """With a configuration, a reward, and models: embeddings and head share their weight, or do not; and another."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "settings.yaml").write_text(SETTINGS)
    (folder / "ranks_reward.py").write_text(REWARD)
    shutil.copytree(tiny_model, folder / "tied")
    for name, change in {"untied": {"tie_word_embeddings": False}, "narrow": {"intermediate_size": 40}}.items():
        config = AutoConfig.from_pretrained(tiny_model, **change)
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder / name)
    return folder


@pytest.fixture(autouse=True)
def reward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)


def train(folder: Path, name: str, model: str, *overrides: str) -> list[str]:
    paths = [f"model.path={folder / model}", f"runs_dir={folder / 'runs'}", f"name={name}"]
    return ["train", str(folder / "settings.yaml"), *paths, *overrides]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The folder of runs of one process, named as their models."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(folder)
        patched.setattr("g2rl.cli._report", lambda run_dirs: 0)
        for model in ("tied", "untied"):
            assert main(train(folder, model, model)) == 0
    return folder / "runs"


def groups(rows: list[dict], key: str) -> torch.Tensor:
    return torch.tensor([row[key] for row in rows], dtype=torch.float64).view(-1, 4)


def assert_same(found: Path, expected: Path) -> None:
    """The same responses and rewards; all else within fp32's sums in another order.

    Scores inside a group are stretched to [0, 1], and shaped rewards to a deviation of 1, which stretches rounding.
    """
    theirs, ours = read(expected / "completions.jsonl"), read(found / "completions.jsonl")
    keys = ("step", "problem", "prompt", "response", "reward", "correct")
    assert [[row[key] for key in keys] for row in ours] == [[row[key] for key in keys] for row in theirs]
    scores, shaped = groups(theirs, "score"), groups(theirs, "shaped")
    # Cosines, their sum and its root are rounded to fp32, in the difference of two scores. Groups whose scores span
    # less than min_range, 1e-2, are not shaped.
    of_score = torch.full((len(scores), 1), 6 * 2**-24)
    of_shaped = of_score / (scores.amax(1) - scores.amin(1)).clamp(min=1e-2)[:, None] * shaped.abs()
    of_advantage = 3 * of_shaped.amax(1, keepdim=True) / shaped.std(1, keepdim=True)
    for key, bound in {"score": of_score, "shaped": of_shaped, "advantage": of_advantage}.items():
        error = (groups(ours, key) - groups(theirs, key)).abs()
        assert bool((error <= 1e-5 + bound).all()), f"{key}: {error.max()}"
    for record, want in zip(untimed(found), untimed(expected), strict=True):
        assert record == pytest.approx(want, rel=1e-4, abs=1e-5)


def weights(run: Path) -> torch.Tensor:
    """Of its last checkpoint, as `g2rl export` reads them."""
    model, _ = load_model(ModelConfig(path=str(checkpoints(run)[-1][1])))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# The op takes the gathered weight itself, and between forward and backward passes there is nothing but parts.
ONE_WEIGHT = """
from torch.distributed.tensor import DTensor
from g2rl import policy, update
make, clip = policy.lm_head, update.clip_grad_norm_
def lm_head(model, temperature, dtype):
    head, weight = make(model, temperature, dtype), model.get_output_embeddings().weight
    assert not isinstance(weight, DTensor) and head.weight.data_ptr() == weight.data_ptr()
    return head
def clip_grad_norm_(parameters, norm):
    parameters = list(parameters)
    split = {isinstance(tensor, DTensor) for p in parameters for tensor in (p, p.grad)}
    assert len(split) == 1
    return clip(parameters, norm)
policy.lm_head, update.clip_grad_norm_ = lm_head, clip_grad_norm_
"""
CASES = [(strategy, model) for strategy in ("ddp", "fsdp2") for model in ("tied", "untied")]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_do_what_one_process_does(folder: Path, alone: Path, size: int) -> None:
    commands = [
        train(folder, f"{strategy}-{model}-{size}", model, f"parallel.strategy={strategy}") for strategy, model in CASES
    ]
    ended = launch([commands] * size, folder / f"printed-{size}", before=ONE_WEIGHT)
    assert [rank.status for rank in ended] == [0] * size, ended
    assert all("held-out pass@1" in line for line in ended[0].printed.splitlines() if "step 3/3" in line)
    assert [rank.printed for rank in ended[1:]] == [""] * (size - 1)
    for strategy, model in CASES:
        run = alone / f"{strategy}-{model}-{size}"
        assert_same(run, alone / model)
        expected = weights(alone / model)
        assert (weights(run) - expected).norm() <= 1e-4 * expected.norm()


# ---- a rank that is gone ---------------------------------------------------------------------------------------------

ANOTHER = "resume: expected the run's model, with model.layers.0.mlp.down_proj.weight [32, 40], found [32, 64] in "


def another_model(run: Path, folder: Path) -> int:
    """Status of a run that goes on with a model that is not the checkpoint's."""
    return main(["train", f"resume={run}", f"model.path={folder / 'narrow'}", "parallel.strategy=ddp"])


KILLED = {
    # In the middle of step 3: while the other rank samples, or waits for what this one has sampled.
    "step": """
import os, signal
from g2rl import ahead, collect
judge, begin, steps = collect.judge_episodes, ahead.collect, []
def counted(*arguments):
    steps.append(1)
    return begin(*arguments)
def killed(*arguments):
    if RANK == 1 and len(steps) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return judge(*arguments)
ahead.collect, collect.judge_episodes = counted, killed
""",
    # While the checkpoint of step 2 is written: this rank's part is there, and nothing says that all parts are.
    "save": """
import os, signal
from torch.distributed.checkpoint import FileSystemWriter
write, calls = FileSystemWriter.write_data, []
def killed(self, *arguments):
    written = write(self, *arguments)
    written.wait()
    calls.append(1)
    if RANK == 1 and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return written
FileSystemWriter.write_data = killed
""",
}


@pytest.mark.parametrize("moment", KILLED)
def test_a_killed_rank(
    folder: Path, alone: Path, moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other one stops with a word, within a minute; the run goes on with one rank, or two, to the same numbers."""
    command = train(folder, f"killed-{moment}", "untied", "parallel.strategy=fsdp2")
    ended = launch([[command]] * 2, folder / f"printed-{moment}", before=KILLED[moment])
    assert ended[0].time - ended[1].time < 60
    assert [rank.status for rank in ended] == [1, -signal.SIGKILL], ended
    assert "g2rl: rank 1 is gone without a word" in ended[0].printed
    run = alone / f"killed-{moment}"
    assert f"by resume={run} the run goes on from its last checkpoint" in ended[0].printed
    left = {"step": [1, 2], "save": [1]}[moment]
    assert [step for step, _ in checkpoints(run)] == left
    for name in ("one", "two"):
        shutil.copytree(run, alone / f"{run.name}-{name}")
    monkeypatch.setattr("g2rl.cli._report", lambda run_dirs: 0)
    assert main(["train", f"resume={run}-one", "parallel.strategy=ddp"]) == 0
    ended = launch([[["train", f"resume={run}-two"]]] * 2, folder / f"printed-{moment}-two", reports=True)
    assert [rank.status for rank in ended] == [0, 0], ended
    assert (alone / f"{run.name}-two" / "report" / "report.md").is_file()
    for name in ("one", "two"):
        assert_same(alone / f"{run.name}-{name}", alone / "untied")
    # What ranks have written is a model like any other, and no other model's.
    assert main(["export", f"{run}-two", f"{run}-exported"]) == 0
    assert main(["push", f"{run}-two", "owner/name", "--dry-run"]) == 0
    for plain in (f"{run}-exported", f"{run}-two/hub"):
        model = AutoModelForCausalLM.from_pretrained(plain)
        found = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        assert torch.equal(found, weights(Path(f"{run}-two")))
    assert another_model(Path(f"{run}-two"), folder) == 2
    assert ANOTHER in capsys.readouterr().err


def test_the_first_rank_is_killed(folder: Path, tmp_path: Path) -> None:
    """With it goes what the ranks share."""
    command = train(folder, "killed-first", "tied")
    ended = launch([[command]] * 2, tmp_path, before=KILLED["step"].replace("RANK == 1", "RANK == 0"))
    assert [rank.status for rank in ended] == [-signal.SIGKILL, 1], ended
    assert ended[1].time - ended[0].time < 60
    assert "g2rl: rank 1: rank 0, or the launcher, cannot be reached" in ended[1].printed


# Rank 0 writes its last checkpoint and closes trackers, for longer than a rank may be silent.
SLOW_END = """
import time
from g2rl import trainer
from g2rl.parallel import watch
watch.INTERVAL, watch.LIMIT = 0.1, 1.5
class Trainer:
    def __init__(self, config, ranks): ...
    def run(self):
        time.sleep(0 if RANK else 2.5)
trainer.Trainer = Trainer
"""


def test_the_first_rank_ends_last(folder: Path, tmp_path: Path) -> None:
    ended = launch([[train(folder, "slow-end", "tied")]] * 2, tmp_path, before=SLOW_END)
    assert [rank.status for rank in ended] == [0, 0], ended


# ---- ranks that cannot work together ---------------------------------------------------------------------------------

OTHER_CODE = """
from g2rl.parallel import agree
agree.code = lambda: f"of rank {RANK}"
"""
OTHER_WEIGHTS = """
import torch
from g2rl import trainer
load = trainer.load_model
def loaded(config):
    model, tokenizer = load(config)
    with torch.no_grad():
        model.lm_head.weight[3, 4] += RANK
    return model, tokenizer
trainer.load_model = loaded
"""
FAILS_ALONE = """
from g2rl import collect
def judge_episodes(*arguments):
    if RANK == 1:
        raise ZeroDivisionError("a reward function's own")
    return judge(*arguments)
judge, collect.judge_episodes = collect.judge_episodes, judge_episodes
"""


@pytest.mark.parametrize(
    ("overrides", "of_rank_1", "before", "status", "message"),
    [
        (["rollout.prompts=6"], [], "", 2, "rollout.prompts: expected a multiple of 4, 2 ranks with whole groups in "),
        ([], ["optim.lr=1e-5"], "", 2, "optim.lr: expected the same on every rank, found 0.001 on rank 0 and 1e-05 on"),
        ([], ["optim.lr=-1"], "", 2, "rank 1: optim.lr: expected a value greater than 0, found -1.0"),
        (
            [],
            [],
            OTHER_CODE,
            2,
            "code: expected the same on every rank, found 'of rank 0' on rank 0 and 'of rank 1' on",
        ),
        ([], [], OTHER_WEIGHTS, 2, "model.path: expected the same weights on every rank, found others on rank 1 than"),
        (["dry_run=true"], [], "", 2, "dry_run: expected a process of its own, found a launcher"),
        ([], [], FAILS_ALONE, 1, "rank 1: ZeroDivisionError: a reward function's own; by resume="),
    ],
    ids=["prompts", "configuration", "bad configuration", "code", "weights", "dry run", "failure"],
)
def test_told_by_rank_0(
    folder: Path, tmp_path: Path, overrides: list[str], of_rank_1: list[str], before: str, status: int, message: str
) -> None:
    """Once, and before any rollout."""
    command = train(folder, "refused", "tied", f"runs_dir={tmp_path}", *overrides)
    ended = launch([[command], [[*command, *of_rank_1]]], tmp_path, before=before)
    assert [rank.status for rank in ended][0] == status, ended
    assert ended[0].printed.count(message) == 1
    assert "g2rl: " not in ended[1].printed
    assert "Traceback" not in ended[0].printed
    assert not (tmp_path / "refused" / "metrics.jsonl").exists() or status == 1


def test_a_port_in_use(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (ended,) = launch([[train(folder, "refused", "tied")]], tmp_path, ports=[port])
    assert ended.status == 2
    assert f"g2rl: rank 0: MASTER_PORT: expected a free port at 127.0.0.1:{port}, found" in ended.printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.strategy=fsdp2"], "parallel.strategy: expected ddp in a process of its own, found fsdp2"),
        (
            ["parallel.strategy=fsdp2", "model.lora.rank=2", "objective.reference_every=0"],
            "parallel.strategy: expected ddp with model.lora.rank > 0",
        ),
        (["parallel.strategy=fsdp2", "model.dtype=bfloat16"], "model.dtype: expected float32 with parallel.strategy"),
        (["parallel.strategy=fsdp2", "optim.name=adamw_8bit"], "optim.name: expected adamw with parallel.strategy"),
    ],
)
def test_refused_alone(folder: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train(folder, "refused", "tied", *overrides)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
def test_seeds_of_ranks(seed: int) -> None:
    """Any seed that a configuration may have has one for each rank."""
    ranks: Any = SimpleNamespace(size=1, rank=1, first=False, sharded=False)
    torch.manual_seed(seed)
    place(torch.nn.Linear(1, 1), None, None, ModelConfig(), torch.device("cpu"), ranks)
    assert torch.initial_seed() == (seed + 1) % 2**64


def test_a_whole_checkpoint_goes_on_split(
    folder: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process stops after step 2; two ranks with split weights take the last one."""
    run = shutil.copytree(alone / "tied", alone / "goes-on")
    shutil.rmtree(checkpoints(run)[-1][1])
    assert [step for step, _ in checkpoints(run)] == [2]
    assert another_model(run, folder) == 2
    assert ANOTHER in capsys.readouterr().err
    ended = launch([[["train", f"resume={run}", "parallel.strategy=fsdp2"]]] * 2, tmp_path)
    assert [rank.status for rank in ended] == [0, 0], ended
    assert_same(run, alone / "tied")
    assert main(["train", f"resume={run}", "steps=5"]) == 2
    told = capsys.readouterr().err
    assert f"needs a launcher: torchrun --nproc-per-node=K -m g2rl train resume={run}; once that is mended, " in told
    assert told.endswith(f"continue with: g2rl train resume={run} parallel.strategy=ddp\n")
