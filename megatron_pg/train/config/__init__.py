"""What a run is told: sections, their file, and everything that is wrong with it."""

from .checks import (
    config_problems,
    nearest,
    needs_reference_message,
    needs_vocab_size_message,
    raise_problems,
)
from .file import config_dict, convert, load_config
from .loop import AlgorithmConfig, FilterGroupsConfig, RunConfig
from .manual import config_example, config_help
from .sections import (
    ModelConfig,
    OptimizerSection,
    ParallelConfig,
    PromptsConfig,
    RolloutConfig,
    ServerConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "AlgorithmConfig",
    "FilterGroupsConfig",
    "ModelConfig",
    "OptimizerSection",
    "ParallelConfig",
    "PromptsConfig",
    "RolloutConfig",
    "RunConfig",
    "ServerConfig",
    "TaskConfig",
    "TrainConfig",
    "config_dict",
    "config_example",
    "config_help",
    "config_problems",
    "convert",
    "load_config",
    "nearest",
    "needs_reference_message",
    "needs_vocab_size_message",
    "raise_problems",
]
