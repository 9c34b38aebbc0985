"""How a model is described: its fields, its ``config.json`` and Megatron-LM's arguments for it."""

from .argument_values import NEED, ArgumentValues
from .config import parse_hf_config, read_hf_config
from .config_values import ConfigValues
from .hf_model import MAX_EXPERTS, HfModel
from .registry import FAMILIES, register
from .yarn import Yarn

__all__ = [
    "ArgumentValues",
    "ConfigValues",
    "FAMILIES",
    "HfModel",
    "MAX_EXPERTS",
    "NEED",
    "Yarn",
    "parse_hf_config",
    "read_hf_config",
    "register",
]
