"""OpenRLHF's `train_ppo_ray`, all of its flags and G2RL's, with the actors here in the place of its own."""

from __future__ import annotations

import runpy
import sys
from typing import Any

import openrlhf.utils
import ray
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from openrlhf.trainer.ray import ppo_actor
from openrlhf.utils.logging_utils import init_logger

from g2rl.integrations.openrlhf.actors import G2RLPolicyActor, G2RLPPOTrainer, G2RLPPOTrainerAsync
from g2rl.integrations.openrlhf.options import check_settings, read_options

logger = init_logger(__name__)


def main() -> None:
    options, sys.argv[1:] = read_options(sys.argv[1:])
    get_strategy = openrlhf.utils.get_strategy

    def get_strategy_with_options(args: Any) -> Any:
        for warning in check_settings(args):
            logger.warning(warning)
        logger.info(f"G2RL: {options}")
        args.g2rl = options
        return get_strategy(args)

    # OpenRLHF has no registry; its script imports these names when it starts.
    openrlhf.utils.get_strategy = get_strategy_with_options
    ppo_actor.PolicyModelActor = ray.remote(num_gpus=1)(G2RLPolicyActor)
    ppo_trainer.PPOTrainer = ray.remote(G2RLPPOTrainer)
    ppo_trainer_async.PPOTrainerAsync = ray.remote(G2RLPPOTrainerAsync)
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")


if __name__ == "__main__":
    main()
