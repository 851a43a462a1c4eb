"""One GRPO update with gradient-guided rewards, in plain PyTorch: what to change in a training loop of your own.

    python examples/drop_in.py [model]

Needs transformers. `model` is a Hugging Face causal language model whose body is `model`; without it, a small
random one. Four made-up responses to each of two prompts stand for rollouts.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from g2rl.heads import lm_head
from g2rl_kernels import g2rl_advantages, sequence_features, unpad

torch.set_default_device(torch.accelerator.current_accelerator(check_available=True) or "cpu")
torch.manual_seed(0)
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
else:
    sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).bfloat16()

# Rollouts: B = 8 responses in two groups of 4; prompts of 6 tokens, responses of up to 10, padded behind.
B, prompt, limit = 8, 6, 10
ids = torch.randint(model.config.vocab_size, (B, prompt + limit))
lengths = torch.tensor([10, 7, 9, 10, 4, 10, 8, 6])
position = torch.arange(prompt + limit)
mask = position < prompt + lengths[:, None]
response_mask = mask & (position >= prompt)
rewards = torch.tensor([1.0, -1, -1, 1, -1, -1, 1, -1])

# One forward pass gives log-probabilities with gradient, entropy, and features: no logits, no extra pass.
scored = response_mask[:, 1:]  # positions that predict a token of the response
hidden, cu_seqlens = unpad(model.model(ids, mask.long()).last_hidden_state[:, :-1], scored)
targets = ids[:, 1:][scored]
head = lm_head(model, temperature=1.0, dtype=hidden.dtype)  # LMHead(weight, ...) with the scale or cap of its family
out = sequence_features(hidden, head, targets, cu_seqlens)
result = g2rl_advantages(out.features, rewards, groups=4)

# The policy gradient, each response's tokens weighing 1 / length. On-policy, the probability ratio is 1.
advantages = result.advantages.repeat_interleave(lengths)
weights = (1 / lengths).repeat_interleave(lengths)
ratio = (out.logps - out.logps.detach()).exp()
loss = -(weights * ratio * advantages).sum() / B
loss.backward()

print("rewards         ", rewards.tolist())
print("scores nu       ", [round(x, 3) for x in result.scores.tolist()])
print("shaped rewards  ", [round(x, 3) for x in result.shaped_rewards.tolist()])
print("advantages      ", [round(x, 3) for x in result.advantages.tolist()])
print(f"mean entropy     {out.entropy.mean():.3f} nats")
print(f"head gradient    {model.lm_head.weight.grad.float().norm():.3f}")
