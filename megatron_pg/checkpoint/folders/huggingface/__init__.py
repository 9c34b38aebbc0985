"""Hugging Face folders: safetensors with an index, configuration, tokenizer."""

from .carried import CarriedTensors, open_carried, write_carried
from .reading import HfFolder
from .side_files import copy_side_files, has_tokenizer
from .writing import MAX_SHARD_BYTES, HfWriter, make_weight_files, write_hf_metadata

__all__ = [
    "CarriedTensors",
    "HfFolder",
    "HfWriter",
    "MAX_SHARD_BYTES",
    "copy_side_files",
    "has_tokenizer",
    "make_weight_files",
    "open_carried",
    "write_carried",
    "write_hf_metadata",
]
