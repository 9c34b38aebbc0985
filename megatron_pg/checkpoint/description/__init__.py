"""How a model is described: its fields, its ``config.json`` and Megatron-LM's arguments for it."""

from .argument_values import NEED, ArgumentValues
from .biased_experts import BiasedExpertsModel, group_problems
from .config import parse_hf_config, read_hf_config
from .config_values import ConfigValues
from .experts import (
    ExpertNames,
    ExpertsModel,
    kind_of_experts,
    pattern_of_sparse_step,
    sparse_step_json,
)
from .gated_delta import GatedDeltaModel, cut_blocks
from .gated_experts import GatedExpertsModel
from .hf_model import MAX_LAYERS, HfModel
from .latent import LatentModel
from .layer_patterns import expand_pattern, read_pattern
from .layer_ropes import layer_ropes_json, read_layer_ropes
from .layer_symbols import (
    checked_symbols,
    pattern_of_arguments,
    symbols_json,
    symbols_of_arguments,
    symbols_of_config,
)
from .mamba import MambaModel
from .registry import FAMILIES, register
from .rope import check_rotated
from .window import Window, WindowByPeriod, WindowBySwitch, WindowInEveryLayer
from .yarn import Yarn

__all__ = [
    "ArgumentValues",
    "BiasedExpertsModel",
    "ConfigValues",
    "ExpertNames",
    "ExpertsModel",
    "FAMILIES",
    "GatedDeltaModel",
    "GatedExpertsModel",
    "HfModel",
    "LatentModel",
    "MAX_LAYERS",
    "MambaModel",
    "NEED",
    "Window",
    "WindowByPeriod",
    "WindowBySwitch",
    "WindowInEveryLayer",
    "Yarn",
    "check_rotated",
    "checked_symbols",
    "cut_blocks",
    "expand_pattern",
    "group_problems",
    "kind_of_experts",
    "layer_ropes_json",
    "parse_hf_config",
    "pattern_of_arguments",
    "pattern_of_sparse_step",
    "read_hf_config",
    "read_layer_ropes",
    "read_pattern",
    "register",
    "sparse_step_json",
    "symbols_json",
    "symbols_of_arguments",
    "symbols_of_config",
]
