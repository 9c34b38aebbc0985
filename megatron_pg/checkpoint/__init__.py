"""How weights get in and out: Hugging Face folders, Megatron checkpoints, their comparison."""

from .collective import on_all_ranks
from .compare import compare_training_state, compare_weights
from .convert import hf_to_megatron, megatron_to_hf, open_weights
from .files import has_tokenizer, parse_json
from .gguf import gguf_to_hf, prepare_smollm2
from .hf_config import HfModel
from .hf_folder import HfFolder
from .hf_parse import parse_hf_config, read_hf_config
from .layout import (
    HF_FOLDER,
    TRACKER,
    find_iteration,
    iteration_name,
    read_tracker,
    write_hf_metadata_folder,
)
from .libraries import LIBRARIES, hf_to_megatron_by, megatron_to_hf_by
from .logits import LogitComparison, compare_logits
from .manifest import CheckpointFiles, FileChecksum, file_checksum, write_manifest
from .megatron_args import hf_model_from_args, make_megatron_args
from .megatron_folder import MegatronFolder, WeightSource
from .model import export_hf, iter_hf_tensors, load_hf, load_weights
from .reshard import reshard_checkpoint
from .sharded_state import load_sharded_state
from .summary import CheckpointSummary, inspect_checkpoint
from .torch_dist import TorchDistReader, TorchDistWriter

__all__ = [
    "CheckpointFiles",
    "CheckpointSummary",
    "FileChecksum",
    "HF_FOLDER",
    "HfFolder",
    "HfModel",
    "LIBRARIES",
    "LogitComparison",
    "MegatronFolder",
    "TRACKER",
    "TorchDistReader",
    "TorchDistWriter",
    "WeightSource",
    "compare_logits",
    "compare_training_state",
    "compare_weights",
    "export_hf",
    "file_checksum",
    "find_iteration",
    "gguf_to_hf",
    "has_tokenizer",
    "hf_model_from_args",
    "hf_to_megatron",
    "hf_to_megatron_by",
    "inspect_checkpoint",
    "iter_hf_tensors",
    "iteration_name",
    "load_hf",
    "load_sharded_state",
    "load_weights",
    "make_megatron_args",
    "megatron_to_hf",
    "megatron_to_hf_by",
    "on_all_ranks",
    "open_weights",
    "parse_hf_config",
    "parse_json",
    "prepare_smollm2",
    "read_hf_config",
    "read_tracker",
    "reshard_checkpoint",
    "write_hf_metadata_folder",
    "write_manifest",
]
