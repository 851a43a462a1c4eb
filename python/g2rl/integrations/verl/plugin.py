"""What verl imports when it is imported itself, in every process: registers the trainers and their engine.

verl keeps what a plug-in raises to its log at level DEBUG, and then knows no trainer of this name. So this says why.
"""

from __future__ import annotations

import logging
import os

from g2rl_kernels import __version__

logger = logging.getLogger(__name__)
logger.setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))

try:
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
    from verl.workers.engine import MegatronEngine

    import g2rl.integrations.verl.trainer  # noqa: F401  # registers
    from g2rl.integrations.verl.engine import G2RLEngine

    modes = [mode for mode in TRAINER_REGISTRY if mode.startswith("g2rl_")]
    engines = [G2RLEngine.__name__]
    if MegatronEngine is not None:  # Megatron-core is there
        try:
            from g2rl.integrations.verl.megatron import G2RLMegatronEngine

            engines.append(G2RLMegatronEngine.__name__)
        except ImportError as error:  # of another verl; its engine for FSDP may serve all the same
            logger.warning("g2rl-kernels %s: no features from verl's engine for Megatron: %s", __version__, error)
except Exception as error:
    logger.error(
        "g2rl-kernels %s: its plug-in for verl failed, and there will be no trainer_mode=g2rl_sync. It needs verl with "
        "trainer.v1 and its engines for FSDP, and TransferQueue; pip install 'verl[verl-core]>=0.9.1'. Or "
        "set VERL_USE_EXTERNAL_PLUGINS=none to go without plug-ins. %s: %s",
        __version__,
        type(error).__name__,
        error,
    )
    raise

logger.info(
    "g2rl-kernels %s: available as trainer.v1.trainer_mode=%s, with %s",
    __version__,
    " or ".join(modes),
    " and ".join(engines),
)
