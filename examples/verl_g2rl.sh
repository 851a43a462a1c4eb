#!/usr/bin/env bash
# GRPO with gradient-guided exploration in verl, on one node with 8 GPUs: verl's own command and two settings of G2RL.
#
#     pip install -e ".[verl]" "verl[vllm]"   # in a checkout, on every node
#     examples/verl_g2rl.sh Qwen/Qwen3-1.7B-Base train.parquet test.parquet [verl's options ...]
#
# The files are verl's, as made by its examples/data_preprocess. What the log of the start has to say: "G2RL: shaping
# rewards of 0 to 1 with strength 1". What the log of each step then has: g2rl/mean_cosine, g2rl/score and others; the task's
# rewards in critic/score, the shaped ones in critic/rewards.
set -euo pipefail
model=${1:?a model, by name or folder} train=${2:?a parquet file} test=${3:?a parquet file}
shift 3

# G2RL. reward_range: lowest and highest reward, mapped to -1 and 1 while they are shaped. It hangs on the files' column
# data_source. verl 0.9.1 gives
#   0 to 1    openai/gsm8k, lighteval/MATH, DigitalLearningGmbH/MATH-lighteval, HuggingFaceH4/MATH-500, numina_*, searchR1_*,
#             hiyouga/geometry3k, codecontests, apps, codeforces, taco
#   -1 or 1   math_dapo, math, math_dapo_reasoning, aime*: add g2rl.reward_range=[-1,1] to the options. With 0 to 1 their
#             wrong answers would lie at -3, the clip, where nothing shapes them; the log warns of it.
# Others of its options, with their defaults: +g2rl.clip=3.0 +g2rl.rule=scale +g2rl.min_range=0.01
# +g2rl.uniform_groups=shape
g2rl=(
  trainer.use_v1=True  # verl's older trainer would train without G2RL and say nothing
  trainer.v1.trainer_mode=g2rl_sync
  +g2rl.strength=1.0
  "+g2rl.reward_range=[0,1]"
)

# verl, as in the paper where it says so: 16 prompts a step, n = 16 responses each (3 at least), 8k tokens, lr, KL loss.
# strategy is fsdp or fsdp2.
python3 -m verl.trainer.main_ppo "${g2rl[@]}" \
  algorithm.adv_estimator=grpo \
  data.train_files="$train" data.val_files="$test" \
  data.train_batch_size=16 data.max_prompt_length=1024 data.max_response_length=8192 \
  actor_rollout_ref.model.path="$model" \
  actor_rollout_ref.model.use_remove_padding=True \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.optim.lr=5e-7 \
  actor_rollout_ref.actor.ppo_mini_batch_size=16 \
  actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
  actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001 \
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=16 \
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=16384 \
  trainer.n_gpus_per_node=8 trainer.nnodes=1 \
  trainer.project_name=g2rl trainer.experiment_name=verl trainer.logger='["console","tensorboard"]' \
  "$@"
