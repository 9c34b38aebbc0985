"""The ``args`` of Megatron-LM's checkpoints: made from models, and read as models."""

from .making import LAYOUT_ARGUMENTS, check_layout, make_megatron_args
from .reading import check_args, hf_model_from_args

__all__ = [
    "LAYOUT_ARGUMENTS",
    "check_args",
    "check_layout",
    "hf_model_from_args",
    "make_megatron_args",
]
