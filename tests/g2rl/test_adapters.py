"""LoRA: what is trained, what generates, what the KL term compares with, what is saved, and what is refused."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig

from g2rl.adapters import adapter_off, add_adapter, base_of
from g2rl.checkpoint import find_checkpoint
from g2rl.cli import main
from g2rl.config import ConfigError, LoraConfig, ModelConfig, load_config
from g2rl.dry_run import dry_run
from g2rl.heads import head_difference, lm_head
from g2rl.model import load_model
from g2rl.push import push
from g2rl.trainer import Trainer
from g2rl.types import Verdict
from g2rl_kernels import LMHead, token_logprobs
from tests.g2rl.architectures import SIZES
from tests.g2rl.json_lines import untimed

SMALL = (
    "steps=4",
    "model.autocast=none",
    "rollout.dtype=bfloat16",
    "model.lora.rank=4",
    "task.options={digits: [1, 1]}",
    "task.held_out=4",
    "rollout.prompts=2",
    "rollout.group_size=4",
    "rollout.max_new_tokens=6",
    "eval.every=0",
    "checkpoint.every=2",
    "optim.lr=2e-2",
    "objective.entropy_coef=0.5",  # a gradient where no response is right
)

NOISY = ("model.lora.dropout=0.1", "objective.kl_coef=0.1", "objective.tokens_per_micro_batch=150")


def start(tiny_model: Path, tmp_path: Path, *overrides: str) -> Trainer:
    return Trainer(load_config(None, [f"model.path={tiny_model}", f"runs_dir={tmp_path}", *SMALL, *overrides]))


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Four steps, with dropout, a KL term, and micro-batches cut by length."""
    folder = tmp_path_factory.mktemp("lora")
    trainer = start(tiny_model, folder, "name=whole", *NOISY)
    trainer.run()
    return trainer


def test_trains_the_adapter_alone(tiny_model: Path, trained: Trainer) -> None:
    """Two matrices for each of 7 linear layers in 2 layers; the reference is the initial model, in the same memory."""
    parameters = [p for p in trained.model.parameters() if p.requires_grad]
    assert len(parameters) == 2 * 7 * 2
    assert trained.reference._copy.model is trained.model
    initial = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, changed = initial(ids).logits, trained.model.eval()(ids).logits
        with adapter_off(trained.model):
            assert torch.equal(trained.model(ids).logits, expected)
    trained.model.train()
    assert (changed - expected).abs().max() > 1e-2
    kl = [record["train/kl"] for record in untimed(trained.config.run_dir)]
    assert kl[0] < 1e-3 < kl[-1]


def test_an_adapters_own_dropout_stays(tiny_model: Path) -> None:
    """While what the model brings is 0."""
    model, _ = load_model(ModelConfig(path=str(tiny_model)))
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    add_adapter(model, LoraConfig(rank=2, dropout=0.5))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # 0 at first
            torch.nn.init.normal_(parameter)
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_rollouts_have_the_adapter_merged(tiny_model: Path, trained: Trainer) -> None:
    """In the rollouts' own dtype, without adapter layers: one rounding to bf16 of the fp32 sum."""
    trained.sampler.sync()
    names = [name for name, _ in trained.sampler.model.named_parameters()]
    assert names == [name for name, _ in AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters()]
    layer = trained.model.model.layers[1].self_attn.q_proj
    weight = layer.base_layer.weight + 32 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = trained.sampler.model.model.layers[1].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.float(), weight, atol=0, rtol=2**-8)
    assert not torch.equal(merged, layer.base_layer.weight.bfloat16())


def test_checkpoints_resume_and_export(trained: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The adapter alone is saved; a run that continues repeats the numbers; the export is the merged model."""
    run_dir = trained.config.run_dir
    folder = find_checkpoint(run_dir)
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    assert main(["eval", str(run_dir), "eval.samples=1", "eval.ks=[1]"]) == 0
    assert main(["export", str(run_dir), str(tmp_path / "merged")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trained.model.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    trained.model.train()
    assert main(["export", str(run_dir), str(tmp_path / "merged")]) == 2
    assert "folder: expected a new one" in capsys.readouterr().err

    expected = untimed(run_dir)
    half = run_dir.parent / "half"
    start(Path(trained.config.model.path), run_dir.parent, "name=half", "steps=2", *NOISY).run()
    assert main(["train", f"resume={half}", "steps=4"]) == 0
    assert untimed(half) == expected
    assert main(["train", f"resume={half}", "steps=5", "model.lora.rank=2"]) == 2
    assert "model.lora: expected the rank and targets of the checkpoint" in capsys.readouterr().err
    assert main(["train", f"resume={half}", "steps=5", "model.lora.rank=0"]) == 2
    assert "model.lora.rank: expected the run's, which trains an adapter, found 0; a new" in capsys.readouterr().err


def test_a_relative_base_is_found_from_elsewhere(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    run = start(Path(tiny_model.name), tmp_path, "steps=1").config
    Trainer(run).run()
    monkeypatch.chdir(tmp_path)
    assert base_of(str(find_checkpoint(run.run_dir))) == str(tiny_model)
    assert main(["export", str(run.run_dir), "merged"]) == 0


def test_an_adapter_whose_base_is_gone(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another model that is told; the embedded one is where this user has it."""
    base = shutil.copytree(tiny_model, tmp_path / "smollm2-135m-instruct-0")
    run = start(base, tmp_path, "steps=1").config
    Trainer(run).run()
    base.rename(tmp_path / "elsewhere")
    monkeypatch.setattr("g2rl.model.smollm2_folder", lambda: tmp_path / "elsewhere")
    assert main(["export", str(run.run_dir), str(tmp_path / "merged")]) == 0
    monkeypatch.setattr("g2rl.model.SMOLLM2_NAME", "another name")
    assert main(["export", str(run.run_dir), str(tmp_path / "again")]) == 2
    said = capsys.readouterr().err
    assert "expected the model that the adapter in" in said and f"found nothing where it was, {str(base)!r}" in said


def test_an_adapter_on_a_local_model_is_pushed_merged(trained: Trainer) -> None:
    """Nobody else has the base, so that whoever loads what is uploaded gets the whole model, without its folder."""
    folder = Path(push(trained.config.run_dir, "somebody/adder", dry_run=True))
    assert not list(folder.glob("adapter_*"))
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trained.model.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    trained.model.train()
    texts = [path for path in folder.rglob("*") if path.suffix in (".json", ".md", ".jinja")]
    assert len(texts) >= 4
    assert not [path for path in texts if str(Path(trained.config.model.path).parent) in path.read_text()]
    assert "peft" not in (folder / "README.md").read_text()


def test_adapters_are_fp32_on_bf16_weights(tiny_model: Path, tmp_path: Path) -> None:
    trainer = start(tiny_model, tmp_path, "model.dtype=bfloat16", "steps=1", "checkpoint.every=0")
    trainer.run()
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    states = trainer.updater.optimizer.state.values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}


def test_gradient_checkpointing_changes_no_gradient(tiny_model: Path, tmp_path: Path) -> None:
    """Layers whose inputs need no gradient, since embeddings are frozen; to fp32's rounding."""
    found = []
    for checkpointing in ("false", "true"):
        trainer = start(tiny_model, tmp_path, f"model.gradient_checkpointing={checkpointing}")
        problems = [trainer.task.train_problem(i) for i in range(2)]
        episodes = trainer.sampler.sample(problems, 4, 1.0, 1.0, seed=1)
        trainer.updater.run(1, episodes, [Verdict(i % 2 * 2.0 - 1, i % 2 == 1, {}, None) for i in range(8)],
                            trainer._times())  # fmt: skip
        found.append(torch.cat([s["exp_avg"].flatten() for s in trainer.updater.optimizer.state.values()]))
    assert found[0].norm() > 0
    assert (found[1] - found[0]).norm() <= 1e-6 * found[0].norm()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["lm_head"], "expected modules other than the head, of whose weight features are made, found 'lm_head'"),
        (["embed_tokens"], "expected modules other than the head"),
        (
            ["q_proj", "query"],
            "expected names of the model's linear layers, down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, "
            "v_proj, found 'query'",
        ),
    ],
)
def test_bad_targets(tiny_model: Path, targets: list[str], message: str) -> None:
    """Embeddings are the head here, by tied weights."""
    model, _ = load_model(ModelConfig(path=str(tiny_model)))
    with pytest.raises(ConfigError, match=f"model.lora.targets: {message}"):
        add_adapter(model, LoraConfig(rank=4, targets=targets))


def test_another_ones_adapter_on_the_head(tiny_model: Path) -> None:
    """One that adds to its products is refused; one that trains a copy of the weight is that copy."""

    def adapted(**where: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=False)
        return peft.get_peft_model(model, peft.LoraConfig(**where))

    for where in ({"target_modules": ["lm_head"]}, {"target_modules": [], "target_parameters": ["lm_head.weight"]}):
        with pytest.raises(NotImplementedError, match="model: expected no adapter on the head"):
            lm_head(adapted(**where), 1.0, torch.float32)
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert lm_head(model, 1.0, torch.float32).weight is model.get_output_embeddings().modules_to_save.default.weight


def test_an_adapter_on_the_head_in_the_weight_of_a_loops_own_head(tiny_model: Path) -> None:
    """As docs/TRAINERS.md has it: log-probabilities and gradients are the model's own."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=False)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    ids = torch.arange(12)[None]
    logits = model(ids).logits[0, :-1]
    layer, hidden = model.get_output_embeddings(), model.get_base_model().model(ids).last_hidden_state[0, :-1]
    head = LMHead(layer.base_layer.weight + layer.get_delta_weight("default").to(hidden.dtype))
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected, found = logits.log_softmax(-1)[range(11), ids[0, 1:]], token_logprobs(hidden, head, ids[0, 1:]).logps
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(logps.sum(), factors) for logps in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_a_peft_that_transformers_does_not_take(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "1000")
    model, _ = load_model(ModelConfig(path=str(tiny_model)))
    with pytest.raises(ConfigError, match=r"model.lora: transformers \S+ adds no adapter of peft \S+: .*>= 1000"):
        add_adapter(model, LoraConfig(rank=4))


def test_a_reference_that_is_refreshed_is_refused() -> None:
    with pytest.raises(ConfigError, match="objective.reference_every: expected 0 with model.lora.rank > 0"):
        load_config(None, ["model.lora.rank=4", "objective.kl_coef=0.1", "objective.reference_every=3"])


def test_loading_an_adapter_says_nothing_of_libraries(trained: Trainer) -> None:
    folder = find_checkpoint(trained.config.run_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        load_model(ModelConfig(path=str(folder)))


def test_an_adapter_on_an_adapter_is_saved_without_doubts(trained: Trainer, tmp_path: Path) -> None:
    """peft looks in the base's folder for a configuration, of which an adapter has none."""
    run = start(find_checkpoint(trained.config.run_dir), tmp_path, "steps=1")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Could not find a config")
        run.run()
        start(find_checkpoint(trained.config.run_dir), tmp_path, "steps=2", f"resume={run.config.run_dir}").run()


def test_all_weights_are_trained_on_from_an_adapter(trained: Trainer, tmp_path: Path) -> None:
    """The adapter is merged, and the model that it makes is as free as another; a dry run knows its shape."""
    adapter = find_checkpoint(trained.config.run_dir)
    again = start(adapter, tmp_path, "model.lora.rank=0", "steps=1", "checkpoint.every=0")
    before = [p.detach().clone() for p in again.model.parameters()]
    again.run()
    assert all(not torch.equal(a, b) for a, b in zip(before, again.model.parameters(), strict=True))
    dry_run(again.config)


def test_a_rank_that_no_weight_has(tiny_model: Path) -> None:
    """It would only take memory; a dry run's own model is smaller than the one that it stands for."""
    model, _ = load_model(ModelConfig(path=str(tiny_model)))
    most = model.config.hidden_size
    message = f"model.lora.rank: expected at most {most}, the greatest rank of a .* weight, found {most + 1}"
    with pytest.raises(ConfigError, match=message):
        add_adapter(model, LoraConfig(rank=most + 1))
    add_adapter(model, LoraConfig(rank=most))
    assert dry_run(load_config(None, [f"model.path={tiny_model}", f"model.lora.rank={most}"])).trained > 0
    with pytest.raises(ConfigError, match=message):
        dry_run(load_config(None, [f"model.path={tiny_model}", f"model.lora.rank={most + 1}"]))


def test_the_base_of_a_peft_model_gives_no_hidden_states() -> None:
    """It has a head itself; for layers between body and head its own model is to be asked."""
    model = AutoModelForCausalLM.from_config(BertConfig(**SIZES, is_decoder=True))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))
    assert head_difference(adapted) == "PeftModel names no part of itself that has its last hidden states"
    assert "log-probabilities of BertLMHeadModel differ" in head_difference(adapted.get_base_model())
