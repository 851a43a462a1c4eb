"""A training script as AReaL's users write it, with G2RL's two names; the actor leaves a record of each step."""

import sys

import records
from areal.api.cli_args import load_expr_config
from datasets import Dataset

from g2rl.integrations import areal
from g2rl.integrations.areal import G2RLConfig, G2RLTrainer

if __name__ == "__main__":
    areal.G2RLPPOActor = records.Actor
    config, _ = load_expr_config(sys.argv[1:], G2RLConfig)
    rows = [{"messages": [{"role": "user", "content": f"{i}+{i + 1}="}]} for i in (3, 97, 5, 11)]
    workflow = {"reward_fn": "records.reward", "gconfig": config.gconfig, "tokenizer": config.tokenizer_path}
    with G2RLTrainer(config, train_dataset=Dataset.from_list(rows)) as trainer:
        trainer.train(workflow="areal.workflow.rlvr.RLVRWorkflow", workflow_kwargs=workflow)
