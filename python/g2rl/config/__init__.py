"""Typed configuration: YAML files and ``key=value`` overrides, read through OmegaConf.

An unknown key, a value of the wrong type or one out of range raises `ConfigError`, which names the key,
before a model or data set is touched.
"""

from g2rl.config.checks import EVAL_TEMPERATURE, validate
from g2rl.config.files import (
    METHODS,
    config_yaml,
    escaped,
    load_config,
    load_resumed,
    read_overrides,
    read_structured,
    read_yaml,
    save_config,
)
from g2rl.config.keys import (
    CheckpointConfig,
    Config,
    ConfigError,
    EvalConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    TaskConfig,
)
from g2rl.config.layers import defaults, leaves, merged, named_errors, plain, told
