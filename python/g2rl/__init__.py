"""Train language models with G2RL: GRPO whose rewards are shaped by the novelty of each response's gradient direction."""
