"""SkyRL's own command with G2RL: Ray, FSDP, its generator, client, loop and advantages, on a CPU.

flash_attn/ and vllm.py stand in for what needs a GPU, server.py for vLLM's server; rewards.py records each step.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest
import torch
from server import Server
from transformers import AutoModelForCausalLM

from tests.g2rl.conftest import build_model
from tests.integrations import recorded, written_out

HERE = Path(__file__).parent
TEMPERATURE = 0.7
CASES = {
    "padded-two-ranks": {
        "trainer.flash_attn": False,
        "trainer.placement.policy_num_gpus_per_node": 2,
        "trainer.remove_microbatch_padding": False,
    },
    "packed-lora": {
        # A loss for which SkyRL would run no pass for old log-probabilities.
        "trainer.algorithm.policy_loss_type": "rollout_is",
        "trainer.max_tokens_per_microbatch": 64,
        "trainer.policy.model.lora.rank": 2,
    },
    "asynchronous": {
        "trainer.algorithm.policy_loss_type": "rollout_is",
        "trainer.fully_async.enabled": True,
        "trainer.fully_async.max_staleness_steps": 1,
        "trainer.fully_async.num_parallel_generation_workers": 3,
        "trainer.policy_mini_batch_size": 2,
    },
    "step-wise": {"generator.max_turns": 2, "generator.step_wise_trajectories": True},
    "sequence-parallel": {
        "generator.max_turns": 2,
        "trainer.placement.policy_num_gpus_per_node": 2,
        "trainer.policy.sequence_parallel_size": 2,
    },
}


def train(folder: Path, model: Path, url: str, changed: dict[str, object]) -> str:
    """What the command says; two steps with two prompts and six responses to each."""
    rows = [json.dumps({"prompt": [{"role": "user", "content": f"{i}+{i + 1}="}]}) for i in (3, 97, 5, 11)]
    (folder / "data.jsonl").write_text("\n".join(rows))
    options = {
        "data.dataloader.num_workers": 0,
        "data.train_data": f"[{folder / 'data.jsonl'}]",
        "environment.env_class": "vowels",
        "g2rl.reward_range": "[0,1]",
        "generator.inference_engine.enable_ray_prometheus_stats": False,
        "generator.inference_engine.external_proxy_url": url,
        "generator.inference_engine.model_dtype": "float32",
        "generator.max_input_length": 64,
        "generator.n_samples_per_prompt": 6,
        "generator.sampling_params.max_generate_length": 12,
        "generator.sampling_params.temperature": TEMPERATURE,
        "trainer.algorithm.temperature": TEMPERATURE,
        "trainer.algorithm.use_kl_loss": False,
        "trainer.ckpt_interval": -1,
        "trainer.ckpt_path": folder / "checkpoints",
        "trainer.enable_ray_gpu_monitor": False,
        "trainer.eval_interval": -1,
        "trainer.export_path": folder / "exports",
        "trainer.log_path": folder / "logs",
        "trainer.logger": "console",
        "trainer.max_prompt_length": 64,
        "trainer.micro_forward_batch_size_per_gpu": 2,
        "trainer.override_entrypoint": "g2rl.integrations.skyrl",
        "trainer.placement.colocate_all": False,
        "trainer.policy.fsdp_config.mixed_precision.param_dtype": "fp32",
        "trainer.policy.model.lora.lora_sync_path": folder / "adapter",
        "trainer.policy.model.path": model,
        "trainer.policy.optimizer_config.lr": 1e-2,
        "trainer.policy_mini_batch_size": 1,
        "trainer.resume_mode": "none",
        "trainer.train_batch_size": 2,
    } | changed
    command = [sys.executable, "-m", "skyrl.train.entrypoints.main_base"]
    command += [f"{name}={value}" for name, value in options.items()]
    # A GPU for each of SkyRL's workers, as far as Ray knows.
    ray = {"RAY_AUTH_MODE": "disabled", "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 4, "GPU": 2})}
    return recorded.output(recorded.run(command, folder, HERE, timeout=540, **ray))


def in_trajectories(steps: list[int], ends: list[bool]) -> list[list[int]]:
    """Steps, one trajectory after the other, cut behind those that end one."""
    cuts = [0, *(step + 1 for step in steps if ends[step])]
    return [steps[start:end] for start, end in pairwise(cuts)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_run(tmp_path: Path, case: str) -> None:
    model = build_model(tmp_path / "tiny", tie_word_embeddings="lora" in case)
    server = Server(model, tmp_path)
    Thread(target=server.serve_forever, daemon=True).start()
    said = train(tmp_path, model, server.url, CASES[case])
    server.shutdown()
    assert said.count("G2RL: shaping rewards of 0 to 1 with strength 1") == 1
    assert ("SkyRL runs no pass for old log-probabilities" in said) == ("rollout_is" in CASES[case].values())
    assert ("Generation Buffer Progress" in said) == (case == "asynchronous")
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    raw_seen: set[float] = set()
    for step in (1, 2):
        policy.load_state_dict(torch.load(tmp_path / f"weights-{step - 1}.pt"))
        batch = torch.load(tmp_path / f"step-{step}.pt")
        own, steps = batch["loss_mask"].bool(), []
        for ids, real, acts in zip(batch["sequences"], batch["attention_mask"].bool(), own, strict=True):
            scored = torch.nn.functional.pad(acts, (len(ids) - len(acts), 0))
            steps.append((ids[real], scored[real]))
        trajectories = in_trajectories(list(range(len(steps))), batch["ends"])
        last = [rows[-1] for rows in trajectories]
        raw, prompts = batch["raw"][last].tolist(), [batch["prompts"][row] for row in last]
        assert sorted(map(prompts.count, prompts)) == [6] * 12
        assert [len(rows) for rows in trajectories] == [2 if case == "step-wise" else 1] * 12
        raw_seen |= set(raw)
        # Of a trajectory's steps the mean over all of its tokens.
        sums = written_out.features(policy, steps, TEMPERATURE) * own.sum(1)[:, None]
        Phi = torch.stack([sums[rows].sum(0) / own[rows].sum() for rows in trajectories])
        shaped = recorded.shaped_by(Phi, raw, prompts)
        # Features are sums in fp32, of relative error 1e-6, and so are scores, which are near one here. A reward has a
        # difference of scores over their range, which is 1e-2 at least.
        assert batch["rewards"][last].sum(1).tolist() == pytest.approx(shaped, rel=0, abs=1e-4)
        # A reward's error and that of the mean, over a deviation of 0.15 at least: shaped rewards span half a unit.
        expected = written_out.advantages(shaped, prompts, epsilon=1e-6)
        for rows, advantage in zip(trajectories, expected, strict=True):
            for row in rows:
                found = recorded.of_response(batch["advantages"][row], own[row])
                assert found == pytest.approx(advantage, rel=0, abs=2e-3)
    assert raw_seen == {0.0, 1.0}
    recorded.assert_weights_moved(tmp_path)
