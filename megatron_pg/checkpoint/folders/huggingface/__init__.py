"""Hugging Face folders: safetensors with an index, configuration, tokenizer."""

from .reading import HfFolder
from .side_files import copy_side_files, has_tokenizer
from .writing import MAX_SHARD_BYTES, HfWriter, make_weight_files, write_hf_metadata

__all__ = [
    "HfFolder",
    "HfWriter",
    "MAX_SHARD_BYTES",
    "copy_side_files",
    "has_tokenizer",
    "make_weight_files",
    "write_hf_metadata",
]
