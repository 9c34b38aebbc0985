"""How a model is described: its fields, its ``config.json`` and Megatron-LM's arguments for it."""

from .argument_values import NEED, ArgumentValues
from .config import parse_hf_config, read_hf_config
from .config_values import ConfigValues
from .hf_model import MAX_EXPERTS, HfModel
from .layer_patterns import expand_pattern, read_pattern
from .registry import FAMILIES, register
from .window import Window, WindowByPeriod, WindowBySwitch, WindowInEveryLayer
from .yarn import Yarn

__all__ = [
    "ArgumentValues",
    "ConfigValues",
    "FAMILIES",
    "HfModel",
    "MAX_EXPERTS",
    "NEED",
    "Window",
    "WindowByPeriod",
    "WindowBySwitch",
    "WindowInEveryLayer",
    "Yarn",
    "expand_pattern",
    "parse_hf_config",
    "read_hf_config",
    "read_pattern",
    "register",
]
