"""G2RL in verl, found by it through the entry-point group `verl.plugins`; see `plugin`.

    python -m verl.trainer.main_ppo ... trainer.v1.trainer_mode=g2rl_sync +g2rl.strength=1.0

The actor's engine adds each response's feature to the pass for old log-probabilities (`engine`), and the trainer shapes
rewards with them before verl makes advantages (`trainer`). `shaping` is what both do without verl.
"""
