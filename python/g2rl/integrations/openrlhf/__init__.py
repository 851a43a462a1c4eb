"""G2RL in OpenRLHF: this module in the place of ``openrlhf.cli.train_ppo_ray``, with all of its flags.

    python -m g2rl.integrations.openrlhf --g2rl.strength 1.0 --g2rl.reward_range 0 1 ...

`__main__` reads the options and hands OpenRLHF's own script the classes of `actors`: the policy's, whose pass for old
log-probabilities makes each response's feature, and the trainer's, which shapes rewards before OpenRLHF compares them.
"""
