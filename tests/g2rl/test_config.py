"""Configuration: what is read, and that every mistake is named before anything is loaded."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from g2rl.config import Config, ConfigError, RewardConfig, TaskConfig, load_config, load_resumed, save_config
from g2rl.parallel.ranks import Ranks
from g2rl.tasks import make_task
from g2rl_kernels import dispatch

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PRESETS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))


def documented_commands() -> list[tuple[int, str]]:
    """How many ranks commands of README and docs start, and what follows `g2rl train` in them, but for those that leave
    the configuration open."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    command = re.compile(r"(?:torchrun --nproc-per-node=(\d+) -m )?g2rl train (configs/.*)$", re.MULTILINE)
    found = [match.groups() for page in pages for match in command.finditer(page.read_text())]
    return list(dict.fromkeys((int(ranks or 1), words) for ranks, words in found))


def test_overrides_have_yaml_types() -> None:
    config = load_config(None, ["steps=7", "optim.lr=1e-5", "eval.ks=[1, 2]", "rewards=[{name: boxed, weight: 0.2}]"])
    assert config.steps == 7
    assert config.optim.lr == 1e-5
    assert config.eval.ks == (1, 2)
    assert [(r.name, r.weight) for r in config.rewards] == [("boxed", 0.2)]


@pytest.mark.parametrize("text", ["1e-5", "007", "on", "1:30", "Answer: {x}", "1.50", "[a]"])
def test_a_text_is_as_it_was_typed(text: str) -> None:
    """YAML makes numbers, true, or keys and values of these; `null` still is none."""
    config = load_config(None, [f"name={text}", f"task.system_prompt= {text} "])
    assert (config.name, config.task.system_prompt) == (text, text)
    assert load_config(None, ["task.system_prompt=null"]).task.system_prompt is None


def test_a_text_is_as_it_was_written(tmp_path: Path) -> None:
    """In a file, too; options and other keys are what YAML makes of them."""
    path = tmp_path / "config.yaml"
    path.write_text("name: 1e-5\ntask: {name: 007, system_prompt: on, options: {a: 1e-5}}\nprofile: on\nruns_dir: '1'")
    config = load_config(path)
    assert (config.name, config.runs_dir, config.profile) == ("1e-5", "1", True)
    assert config.task == TaskConfig("007", {"a": 1e-5}, "on")
    path.write_text("task: {system_prompt: null}\nrollout: {server: }\n")
    config = load_config(path)
    assert (config.task.system_prompt, config.rollout.server) == (None, None)


@pytest.mark.parametrize("backend", dispatch.BACKENDS, ids=lambda backend: backend.name)
def test_every_backend_may_be_chosen(backend: dispatch.Backend) -> None:
    assert load_config(None, [f"backend={backend.name}"]).backend == backend.name


@pytest.mark.parametrize("source", ["file", "run", "default"])
def test_an_item_of_a_list_by_its_index(tmp_path: Path, source: str) -> None:
    path = tmp_path / "config.yaml"
    overrides = ["rewards[0].weight=${optim.beta1}", "rewards[0].varies=allow", "eval.ks[1]=3"]
    if source == "default":
        config = load_config(None, overrides)
        assert config.rewards == [RewardConfig(weight=0.9, varies="allow")]
    else:
        path.write_text("rewards: [{name: 'own:reward', limit_s: 2}, {name: correct}]\neval: {ks: [1, 2]}")
        config = load_config(path, overrides) if source == "file" else load_resumed(path, overrides)
        own = RewardConfig("own:reward", weight=0.9, limit_s=2, varies="allow")
        assert config.rewards == [own, RewardConfig("correct")]
    assert config.eval.ks == (1, 3)


def test_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(None, ["method=grpo", "task.options={digits: [2, 1]}", "task.system_prompt='a: b'"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "text", ["${x}", r"\${x}", r"\\${x}", "${", "$${x:y}", "a\\", r"$\{x}", r"\${a} \\${b} ${c} \$"]
)
def test_text_like_a_reference_reads_back_equal(tmp_path: Path, text: str) -> None:
    options = {"path": text, "deep": [{"x": [text, 1]}]}
    config = replace(Config(), task=TaskConfig(name="jsonl", options=options, system_prompt=f"cost {text} dollars"))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_an_escaped_reference_is_text(tmp_path: Path) -> None:
    config = load_config(None, [r"task.system_prompt='cost \${x} dollars'"])
    assert config.task.system_prompt == "cost ${x} dollars"
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_load(path: Path) -> None:
    assert load_config(path).name == path.stem


def test_files_are_merged_in_order_below_overrides(tmp_path: Path) -> None:
    for i, text in enumerate(["steps: 5\nseed: 5\nrollout: {prompts: 2}", "seed: 6\nrollout: {group_size: 4}"]):
        (tmp_path / f"{i}.yaml").write_text(text)
    config = load_config([tmp_path / "0.yaml", tmp_path / "1.yaml"], ["rollout.prompts=4"])
    assert (config.steps, config.seed, config.rollout.prompts, config.rollout.group_size) == (5, 6, 4, 4)


def test_documented_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loads, its ranks can share the work, and its task can be built; `my.jsonl` is the reader's."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"problem": f"What is {i} + 1?", "answer": i + 1}) for i in range(80)]
    (tmp_path / "my.jsonl").write_text("\n".join(rows))
    commands = documented_commands()
    assert len(commands) >= 4
    assert any(ranks > 1 for ranks, _ in commands)
    for ranks, command in commands:
        words = shlex.split(command, comments=True)
        paths = [ROOT / word for word in words if "=" not in word]
        config = load_config(paths, [word for word in words if "=" in word])
        Ranks(size=ranks).check(config)
        if config.task.name in ("arithmetic", "jsonl"):  # others are downloaded
            task = make_task(config.task, config.seed)
            assert task.train_problem(0).prompt
            task.close()


JSONL = {"task": {"name": "jsonl", "options": {"path": "a.jsonl"}}}
SERVED = {"rollout": {"engine": "vllm", "server": "http://a:1", "server_folder": "/a", "vllm": {"max_model_len": 64}}}


@pytest.mark.parametrize(
    ("layers", "key", "expected"),
    [
        ([JSONL, {"task": {"name": "gcd"}}], "task.options", {}),
        ([JSONL, {"task": {"name": "gcd", "options": {"a": 1}}}], "task.options", {"a": 1}),
        ([JSONL, {"task": {"name": "gcd"}}, JSONL], "task.options", {"path": "a.jsonl"}),
        ([JSONL, {"task": {"name": "gcd"}}, {"task": {"options": {"a": 1}}}], "task.options", {"a": 1}),
        ([JSONL, {"task": {"name": "jsonl", "options": {"split": "b"}}}], "task.options",
         {"path": "a.jsonl", "split": "b"}),
        ([JSONL, {"steps": 3}], "task.options", {"path": "a.jsonl"}),
        # Without a name they are those of the default.
        ([{"task": {"options": {"digits": [1, 1]}}}, JSONL], "task.options", {"path": "a.jsonl"}),
        ([{"task": {"options": {"digits": [1, 1]}}}, {"task": {"name": "arithmetic"}}], "task.options",
         {"digits": [1, 1]}),
        ([SERVED, {"rollout": {"engine": "transformers"}}], "rollout.vllm", {}),
        ([SERVED, {"rollout": {"engine": "transformers"}}], "rollout.server", None),
        ([SERVED, {"rollout": {"engine": "vllm"}}], "rollout.vllm", {"max_model_len": 64}),
    ],
)  # fmt: skip
def test_what_belongs_to_a_choice_goes_with_it(layers: list[Any], key: str, expected: Any) -> None:
    section, _, name = key.partition(".")
    assert getattr(getattr(load_config(layers), section), name) == expected


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_fit_every_configuration(path: Path) -> None:
    for base in CONFIGS:
        config = load_config([base, path], ["rollout.max_new_tokens=300"])
        assert config.name == base.stem
        assert config.method == "grpo"
        assert config.objective.length in (0, 300)
        assert config.objective != load_config(base).objective


def test_defaults_of_a_method_are_below_the_users(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("method: g2rl\nobjective: {clip_high: 0.3}\n")
    config = load_config(tmp_path / "base.yaml", ["method=evol_rl"])
    assert (config.objective.clip_high, config.objective.entropy_coef) == (0.3, 0.003)


@pytest.mark.parametrize(
    ("run", "overrides", "coefficient", "clip", "cap"),
    [
        (["method=evol_rl"], ["method=grpo"], 0.0, 0.2, 0.0),
        (["method=evol_rl"], ["method=entropy"], 0.003, 0.2, 0.0),
        (["method=evol_rl"], [], 0.003, 0.28, 0.0),
        (["method=evol_rl"], ["method=grpo", "objective.entropy_coef=0.003"], 0.003, 0.2, 0.0),
        (["method=evol_rl", "objective.entropy_coef=0.1"], ["method=grpo"], 0.1, 0.2, 0.0),
        (["method=evol_rl", "objective.entropy_coef=0"], ["method=entropy"], 0.0, 0.2, 0.0),
        (["method=evol_rl", "objective.clip_high=0.2"], ["rollout.ahead=1"], 0.003, 0.2, 2.0),
        ([], ["method=evol_rl"], 0.003, 0.28, 0.0),
        (["objective.clip_high=0.25"], ["method=evol_rl"], 0.003, 0.25, 0.0),
        ([], ["rollout.engine=vllm"], 0.0, 0.2, 2.0),
        ([], ["rollout.ahead=1", "objective.importance_cap=3"], 0.0, 0.2, 3.0),
        (["rollout.ahead=1"], ["rollout.ahead=0"], 0.0, 0.2, 0.0),
        (["rollout.ahead=1"], ["rollout.ahead=0", "rollout.engine=vllm"], 0.0, 0.2, 2.0),
    ],
)
def test_a_resumed_run_has_the_defaults_of_its_present_choices(
    tmp_path: Path, run: list[str], overrides: list[str], coefficient: float, clip: float, cap: float
) -> None:
    save_config(load_config(None, [*run, "name=\\${x}"]), tmp_path / "config.yaml")
    found = load_resumed(tmp_path / "config.yaml", overrides)
    objective = found.objective
    assert (objective.entropy_coef, objective.clip_high, objective.importance_cap) == (coefficient, clip, cap)
    assert found.name == "${x}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stps=1", r"stps: Key 'stps' not in 'Config'. Did you mean: 'steps'\?$"),
        ("lr=1", r"^lr: Key 'lr' not in 'Config'; did you mean optim.lr\?$"),
        ("top_p=1", r"^top_p: Key 'top_p' not in 'Config'; did you mean rollout.top_p or eval.top_p\?$"),
        ("base=a", "^base: Key 'base' not in 'Config'; it is a key of a study, which g2rl compare takes"),
        ("optim.rate=1", "^optim.rate: Key 'rate' not in 'OptimConfig'; expected one of name, lr, beta1, beta2, "),
        ("steps", "override: expected key=value, found 'steps'"),
        ("eval.ks=[1,", r"^eval.ks: expected a value in YAML syntax, found '\[1,': .*, line 2, column 1$"),
        ("name=####", "^name: expected a value in YAML syntax, found a comment; quoted: 'name=\"####\"'$"),
        ("task.options.template=End in ####", "found a comment; quoted: 'task.options.template=\"End in ####\"'$"),
        ("lora.rank=8", r"^lora: Key 'lora' not in 'Config'; did you mean model\.lora\?$"),
        ("name=\udce9", r"^name: expected a value in YAML syntax, found '\\udce9': "),
        ("seed=99999999999999999999999", r"seed: expected a value from -2\*\*63 to 2\*\*63 - 1, found 9999"),
        ("steps=many", "^steps: expected a whole number, found 'many'$"),
        ("name=", "^name: expected text, found None$"),
        ("methods.g2rl=", "^methods.g2rl: expected keys and values, found None$"),
        ("profile=maybe", "^profile: expected true or false, found 'maybe'$"),
        ("log.trackers=[mine]", r"^log.trackers\[0\]: expected one of trackio, wandb, found 'mine'$"),
        (
            "task.system_prompt=Cost ${x}",
            r"^task.system_prompt: expected \${...} with another key in it, found 'Cost \${x}' .*; \\\${...} is text",
        ),
        ("task.system_prompt=Cost ${x", r"^task.system_prompt: expected \${...} with .* found 'Cost \${x' "),
        ("steps=0", "steps: expected a value greater than 0, found 0"),
        ("optim.lr=nan", "optim.lr: expected a value greater than 0, found nan"),
        ("rollout.group_size=1", "rollout.group_size: expected a value 2 or greater"),
        ("rollout.temperature=0", "rollout.temperature: expected a value from 1e-6 to 1e18, found 0.0"),
        ("rollout.temperature=9e-7", "rollout.temperature: expected a value from 1e-6 to 1e18, found 9e-07"),
        ("rollout.temperature=inf", "rollout.temperature: expected a value from 1e-6 to 1e18, found inf"),
        (
            "eval.temperature=1e19",
            "eval.temperature: expected a value from 1e-18 to 1e18, or 0 for the likeliest tokens",
        ),
        ("optim.lr=.inf", "optim.lr: expected a finite value, found inf"),
        ("rollout.server_folder=a", "rollout.server_folder: expected none without rollout.server, found 'a'"),
        ("rollout.top_p=1.5", r"rollout.top_p: expected a value in \(0, 1\]"),
        ("eval.ks=[1, 9]", "eval.ks: expected values from 1 to eval.samples = 4, found 9"),
        ("eval.ks=[1, 1.5]", "^eval.ks: expected whole numbers, found 1.5"),
        ("eval.ks=[null]", "^eval.ks: expected whole numbers, found None"),
        ("model.lora=8", "^model.lora: expected keys and values, found 8"),
        ("rollout=vllm", "^rollout: expected keys and values, found 'vllm'"),
        ("rollout=[1]", r"^rollout: expected keys and values, found \[1\]"),
        ("rewards=[]", "rewards: expected at least one"),
        ("rewards[1].weight=2", r"^rewards\[1\]: .* the list's length; a longer list is given whole"),
        ("rewards={}", "^rewards: expected a list, found {}"),
        ("rewards={name: correct}", "rewards: expected a list, found {'name': 'correct'}"),
        ("task.options=[1]", r"task.options: expected keys and values, found \[1\]"),
        ("rewards=own:reward", "^rewards: expected a list, found 'own:reward'"),
        ("rewards=[correct]", r"^rewards\[0\]: expected keys and values, such as {name: correct}, found 'correct'"),
        ("rewards=[{nam: correct}]", r"^rewards\[0\].nam: Key 'nam' not in 'RewardConfig'"),
        ("rewards=[{}, {weight: two}]", r"^rewards\[1\].weight: expected a number, found 'two'$"),
        ("rewards[0].varies=never", r"^rewards\[0\].varies: expected one of warn, stop, allow, found 'never'$"),
        ("eval.ks=4", "^eval.ks: expected a list, found 4"),
        ("eval.ks[1]=two", "^eval.ks: expected whole numbers, found 'two'"),
        ("name=a/b", "name: expected a plain folder name, found 'a/b'"),
        ("objective.clip_low=1", r"objective.clip_low: expected a value in \[0, 1\)"),
        ("objective.aggregation=mean", "^objective.aggregation: expected one of response_mean, token_mean, "),
        ("objective.aggregation=fixed_length", "objective.length: expected a number of tokens with aggregation"),
        ("objective.dual_clip=0.5", "objective.dual_clip: expected a value greater than 1, or 0"),
        ("objective.reference_every=5", "objective.reference_every: expected 0 without a KL term, found 5"),
        ("objective.overlong=punish", "objective.overlong_buffer: expected 1 to rollout.max_new_tokens = 24"),
        ("objective.tokens_per_micro_batch=24", "expected room for a prompt and rollout.max_new_tokens = 24 tokens"),
        ("model.lora.dropout=1", r"model.lora.dropout: expected a value in \[0, 1\)"),
        ("objective.mini_batches=3", "objective.mini_batches: expected a divisor of rollout.prompts = 8"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found nothing at"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="expected a YAML file, found a folder at"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"steps: [1\n", r"own\.yaml: expected YAML in UTF-8: .*, line 2, column 1$"),
        (b"name: \xe9\n", r"own\.yaml: expected YAML in UTF-8: .* byte 0xe9 in position 6"),
        (b"5\n", r"own\.yaml: expected keys and values, found .*int"),
        (b"- 1\n", r"own\.yaml: expected keys and values, found a list$"),
        # On the command line both are text.
        (b"task: {name: [a]}\n", r"task\.name: expected text, found \['a'\]$"),
        (b"task: {system_prompt: {a: 1}}\n", r"task\.system_prompt: expected text, found {'a': 1}$"),
    ],
)
def test_malformed_files(tmp_path: Path, contents: bytes, message: str) -> None:
    (tmp_path / "own.yaml").write_bytes(contents)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "own.yaml")


def test_a_comment_is_no_value(tmp_path: Path) -> None:
    """As GSM8K's mark is read where it is not quoted; one with a blank, or of a section, was meant as a comment."""
    path = tmp_path / "config.yaml"
    for text in ("task:\n  name: jsonl\n  options:\n    answer_after: ####\n", "x:\n\n\n  {answer_after: ####\n}"):
        path.write_text(text)
        said = r'config\.yaml, line 4: answer_after: expected a value, found a comment; quoted: answer_after: "####"$'
        with pytest.raises(ConfigError, match=said):
            load_config(path)
    path.write_text("task: #mine\n  name: 'jsonl' #x\n  system_prompt: # the template's\n  options: {a: '####'} ####\n")
    assert load_config(path).task == TaskConfig("jsonl", {"a": "####"})


def test_defaults_are_valid() -> None:
    assert load_config() == Config()


def test_a_bound_may_be_none() -> None:
    assert load_config(None, ["optim.max_grad_norm=inf"]).optim.max_grad_norm == math.inf
