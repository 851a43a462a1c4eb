"""Train language models with G2RL: GRPO with rewards shaped by the novelty of each response's gradient direction."""
