"""The model card of a checkpoint, from what its run has logged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

import g2rl_kernels
from g2rl.report import changed_values, changes_table, code, markdown_table, method_of, value_with_unit
from g2rl.run import Run

EMBEDDED_MODELS = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
PAPER = "https://arxiv.org/abs/2512.15687"
UNSAID = ("name", "runs_dir", "resume", "log.", "checkpoint.")
"""Keys, or beginnings of keys, that say nothing about the model."""
_LOCAL = ("/", "./", "../", "~/")
ADAPTER_NOTE = "# A LoRA adapter: transformers loads it with its base model, by peft (pip install peft).\n"
LOADING = """```python
{note}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({repo!r})
model = AutoModelForCausalLM.from_pretrained({repo!r})
messages = [{system}{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(
    messages, {template}add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, max_new_tokens={tokens}, {sampling})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""


def model_card(run: Run, step: int, repo: str, plots: Sequence[tuple[str, str, str]], is_adapter: bool = False) -> str:
    """Return the card as Markdown with the hub's metadata. Folders of this machine are cut down to their last name.

    Args:
        step: of the checkpoint; results after it are not the model's and are left out.
        repo: ``owner/name`` on the hub.
        plots: stem, heading and caption of the files in ``plots/``.
        is_adapter: the weights are a LoRA adapter's alone.
    """
    run = run.at(step)
    task = run.setting("task.name")
    base, is_public = base_model(run.setting("model.path"))
    evaluated, results = _results(run, step)
    named = f"[{base}](https://huggingface.co/{base})" if is_public else f"`{base}`"
    what = f"{named}, trained with `{method_of(run)}` on the task `{task}` for {step} steps"
    sections = [
        f"# {repo.partition('/')[2]}\n\n{what} by g2rl-kernels {_version(run)}, the trainer for [G2RL]({PAPER}).",
        f"## Results\n\n{_result_table(run, evaluated, results)}",
        f"## Use\n\n{_loading(run, repo, is_adapter)}",
        f"## Training\n\n{_training(run)}",
        f"## Plots\n\nOf the whole run, {run.last_step} steps." if plots else "",
        *(f"### {heading}\n\n![{heading}](plots/{stem}.png)\n\n{caption}" for stem, heading, caption in plots),
    ]
    data = ModelCardData(
        base_model=base if is_public else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["reinforcement-learning", "g2rl-kernels", *_methods(run)],
        model_name=repo.partition("/")[2],
        eval_results=[_eval_result(key, results[key], task, evaluated) for key in results if "@" in key] or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _methods(run: Run) -> list[str]:
    names = [str(settings.get("method", "unknown")).rpartition(":")[2] for _, settings in run.history]
    return list(dict.fromkeys(names)) or ["unknown"]


def base_model(path: str) -> tuple[str, bool]:
    """The model that training began with, and whether it is one of the hub's."""
    path = EMBEDDED_MODELS.get(path, path)
    local = path.startswith(_LOCAL) or path.count("/") > 1 or os.path.exists(path) or path == "unknown"
    return (_last_name(path), False) if local else (path, True)


def _last_name(path: str) -> str:
    """Of a folder or file of this machine; a checkpoint's, step-000030, says little without its run's."""
    parts = Path(path).parts
    return f"{parts[-3]}/{parts[-1]}" if parts[-2:-1] == ("checkpoints",) and len(parts) > 2 else Path(path).name


def _without_folders(value: Any) -> Any:
    """A value of the configuration, of a local path only the last name."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    is_path = isinstance(value, str) and "/" in value[1:] and (value.startswith(_LOCAL) or os.path.exists(value))
    return _last_name(value) if is_path else value


def _results(run: Run, step: int) -> tuple[int | None, dict[str, float]]:
    """Step and held-out results of the last evaluation up to the checkpoint's step."""
    for record in reversed(run.metrics):
        found = {key: record[key] for key in run.keys("eval/") if record.get(key) is not None and key != "eval/maj@1"}
        if record["step"] <= step and found:
            return record["step"], found
    return None, {}


def _result_table(run: Run, evaluated: int | None, results: dict[str, float]) -> str:
    if evaluated is None:
        return "The run has evaluated nothing up to this checkpoint."
    rows = [(key.removeprefix("eval/"), value_with_unit(key, value)) for key, value in results.items()]
    table, then = markdown_table(("held out", f"step {evaluated}"), rows), run.at(evaluated)
    sampled = f"{then.setting('eval.samples')} responses each, temperature {then.setting('eval.temperature')}"
    return f"{table}\n\nOn {then.setting('task.held_out')} problems kept out of training; {sampled}."


def _eval_result(key: str, value: float, task: str, step: int | None) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=task,
        dataset_name=f"{task}, held out",
        metric_type=key.removeprefix("eval/"),
        metric_value=value,
        metric_name=f"{key.removeprefix('eval/')} at step {step}",
    )


def _loading(run: Run, repo: str, is_adapter: bool) -> str:
    system = run.setting("task.system_prompt", None)
    message = "" if system is None else f'{{"role": "system", "content": {system!r}}}, '
    template = run.setting("rollout.chat_template_kwargs", {})
    return LOADING.format(
        repo=repo,
        note=ADAPTER_NOTE if is_adapter else "",
        system=message,
        template="".join(f"{name}={value!r}, " for name, value in template.items()),
        tokens=run.setting("rollout.max_new_tokens", 512),
        sampling=_sampling(run),
    )


def _sampling(run: Run) -> str:
    """Arguments of `generate` for responses like those of the run's evaluations."""
    temperature, top_p = run.setting("eval.temperature", 1.0), run.setting("eval.top_p", 1.0)
    if temperature == 0:
        return "do_sample=False"
    # All are named, since a model's own generation settings would stand in for those that are not.
    return f"do_sample=True, temperature={temperature}, top_p={top_p}, top_k=0"


def _training(run: Run) -> str:
    changed = {key: value for key, value in changed_values(run).items() if not key.startswith(UNSAID)}
    rows = [(code(key), code(_without_folders(value))) for key, value in changed.items()]
    versions = ", ".join(f"{key} {value}" for key, value in run.environment.items() if key != "threads")
    table = markdown_table(("key", "value"), rows) if rows else "All values are the defaults."
    where = f"Configuration, where it is not the default of g2rl-kernels {_version(run)}:"
    later = changes_table(run, _without_folders)
    said = f"The run went on by other settings; those above are the last ones.\n\n{later}" if later else ""
    return "\n\n".join(filter(None, (where, table, said, versions)))


def _version(run: Run) -> str:
    return run.environment.get("g2rl-kernels", g2rl_kernels.__version__)
