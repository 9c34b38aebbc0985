"""How weights get in and out: Hugging Face folders, Megatron checkpoints, their comparison."""

from .arguments import hf_model_from_args, make_megatron_args
from .bridge import hf_to_megatron_by_bridge, megatron_to_hf_by_bridge
from .convert import hf_to_megatron, megatron_to_hf, open_weights
from .description import HfModel, parse_hf_config, read_hf_config
from .export import export_hf, iter_hf_tensors
from .families import FAMILIES
from .files import parse_dtype, parse_json
from .folders import (
    HF_FOLDER,
    TRACKER,
    CheckpointFiles,
    FileChecksum,
    HfFolder,
    MegatronFolder,
    TorchDistReader,
    TorchDistWriter,
    WeightSource,
    file_checksum,
    find_iteration,
    has_tokenizer,
    is_torch_dist,
    iteration_name,
    read_tracker,
    write_hf_metadata_folder,
    write_manifest,
)
from .inspect import CheckpointSummary, inspect_checkpoint
from .load import load_hf, load_weights
from .new_folder import InUseError, LockedFile, lock_file
from .one_rank import one_rank
from .reshard import reshard_checkpoint
from .sharded_state import load_sharded_state
from .verify import LogitComparison, compare_logits, compare_training_state, compare_weights

__all__ = [
    "CheckpointFiles",
    "CheckpointSummary",
    "FAMILIES",
    "FileChecksum",
    "HF_FOLDER",
    "HfFolder",
    "HfModel",
    "InUseError",
    "LockedFile",
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
    "has_tokenizer",
    "hf_model_from_args",
    "hf_to_megatron",
    "hf_to_megatron_by_bridge",
    "inspect_checkpoint",
    "is_torch_dist",
    "iter_hf_tensors",
    "iteration_name",
    "load_hf",
    "load_sharded_state",
    "load_weights",
    "lock_file",
    "make_megatron_args",
    "megatron_to_hf",
    "megatron_to_hf_by_bridge",
    "one_rank",
    "open_weights",
    "parse_dtype",
    "parse_hf_config",
    "parse_json",
    "read_hf_config",
    "read_tracker",
    "reshard_checkpoint",
    "write_hf_metadata_folder",
    "write_manifest",
]
