"""How weights get in and out: Hugging Face folders, Megatron checkpoints, their comparison."""

from .convert import hf_to_megatron, megatron_to_hf, open_weights
from .hf_config import HfModel, parse_hf_config, read_hf_config
from .hf_folder import HfFolder
from .layout import find_iteration
from .megatron_args import hf_model_from_args, make_megatron_args
from .megatron_folder import MegatronFolder, WeightSource
from .model import export_hf, iter_hf_tensors, load_hf
from .torch_dist import TorchDistReader, TorchDistWriter

__all__ = [
    "HfFolder",
    "HfModel",
    "MegatronFolder",
    "TorchDistReader",
    "TorchDistWriter",
    "WeightSource",
    "export_hf",
    "find_iteration",
    "hf_model_from_args",
    "hf_to_megatron",
    "iter_hf_tensors",
    "load_hf",
    "make_megatron_args",
    "megatron_to_hf",
    "open_weights",
    "parse_hf_config",
    "read_hf_config",
]
