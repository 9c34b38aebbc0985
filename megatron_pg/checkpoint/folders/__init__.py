"""How bytes lie on disk: Hugging Face folders, Megatron's torch_dist and its legacy format."""

from .contents import is_extra_state, is_optimizer_state, is_per_rank
from .huggingface import (
    MAX_SHARD_BYTES,
    HfFolder,
    HfWriter,
    has_tokenizer,
    make_weight_files,
    write_hf_metadata,
)
from .iterations import (
    HF_FOLDER,
    TRACKER,
    check_one_kind,
    find_iteration,
    iteration_name,
    read_tracker,
    write_hf_metadata_folder,
    write_tracker,
)
from .megatron import MegatronFolder, WeightSource, common_state
from .torch_dist import (
    COMMON_STATE,
    CheckpointFiles,
    Chunk,
    FileChecksum,
    StoredTensor,
    TorchDistReader,
    TorchDistWriter,
    file_checksum,
    is_torch_dist,
    write_manifest,
    written_places,
)

__all__ = [
    "COMMON_STATE",
    "CheckpointFiles",
    "Chunk",
    "FileChecksum",
    "HF_FOLDER",
    "HfFolder",
    "HfWriter",
    "MAX_SHARD_BYTES",
    "MegatronFolder",
    "StoredTensor",
    "TRACKER",
    "TorchDistReader",
    "TorchDistWriter",
    "WeightSource",
    "common_state",
    "file_checksum",
    "find_iteration",
    "has_tokenizer",
    "is_extra_state",
    "is_optimizer_state",
    "is_per_rank",
    "is_torch_dist",
    "iteration_name",
    "make_weight_files",
    "read_tracker",
    "check_one_kind",
    "write_hf_metadata",
    "write_hf_metadata_folder",
    "write_manifest",
    "write_tracker",
    "written_places",
]
