"""Megatron's torch_dist folders: tensors of the whole model, whatever layout wrote them."""

from .manifest import CheckpointFiles, FileChecksum, file_checksum, write_manifest
from .metadata import Chunk, StoredTensor
from .reading import COMMON_STATE, TorchDistReader, is_torch_dist
from .shards import TorchDistShards, written_places
from .writing import TorchDistWriter

__all__ = [
    "COMMON_STATE",
    "CheckpointFiles",
    "Chunk",
    "FileChecksum",
    "StoredTensor",
    "TorchDistReader",
    "TorchDistShards",
    "TorchDistWriter",
    "file_checksum",
    "is_torch_dist",
    "write_manifest",
    "written_places",
]
