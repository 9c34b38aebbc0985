"""How weights get in and out: Hugging Face folders, Megatron checkpoints, their comparison."""

from .hf_config import HfModel, parse_hf_config, read_hf_config
from .hf_folder import HfFolder
from .model import export_hf, iter_hf_tensors, load_hf

__all__ = [
    "HfFolder",
    "HfModel",
    "export_hf",
    "iter_hf_tensors",
    "load_hf",
    "parse_hf_config",
    "read_hf_config",
]
