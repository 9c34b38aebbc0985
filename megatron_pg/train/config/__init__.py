"""What a run is told: sections, their file, and everything that is wrong with it."""

from .checks import (
    config_problems,
    nearest,
    needs_reference_message,
    needs_vocab_size_message,
    raise_problems,
)
from .file import config_dict, convert, load_config
from .sections import (
    AlgorithmConfig,
    ModelConfig,
    OptimizerSection,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    ServerConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "AlgorithmConfig",
    "ModelConfig",
    "OptimizerSection",
    "ParallelConfig",
    "RolloutConfig",
    "RunConfig",
    "ServerConfig",
    "TaskConfig",
    "TrainConfig",
    "config_dict",
    "config_problems",
    "convert",
    "load_config",
    "nearest",
    "needs_reference_message",
    "needs_vocab_size_message",
    "raise_problems",
]
