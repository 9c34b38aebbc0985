"""Writes a torch_dist folder tensor by tensor, without a process group."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ...files import write_json
from .manifest import write_manifest
from .reading import BACKEND

MAX_FILE_BYTES = 4 * 2**30


class TorchDistWriter:
    """Writes a torch_dist folder tensor by tensor; memory is bounded by one part.

    Equals what ``megatron.core.dist_checkpointing.save`` writes for the same parts.
    """

    def __init__(self, folder: Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.folder = folder
        self.max_file_bytes = max_file_bytes
        self._described: dict[str, Any] = {}
        self._stored: dict[Any, Any] = {}
        self._file: BinaryIO | None = None
        self._num_files = 0

    def add(self, key: str, part: Tensor, shape: tuple[int, ...], offsets: tuple[int, ...]) -> None:
        """Write the box of a tensor of ``shape`` that begins at ``offsets``.

        ``part`` may lack leading axes of length one (a layer of a stacked tensor).
        """
        part = part.detach().cpu().reshape((1,) * (len(shape) - part.dim()) + tuple(part.shape))
        entry = self._described.get(key)
        if entry is None:
            properties = dcp.TensorProperties(dtype=part.dtype)
            entry = dcp.TensorStorageMetadata(properties, torch.Size(shape), [])
            self._described[key] = entry
        entry.chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), part.shape))
        # A view would drag its whole storage along.
        self._store(dcp.MetadataIndex(key, torch.Size(offsets)), part.clone())

    def add_object(self, key: str, value: Any) -> None:
        """Write a small object (the extra state of a linear layer)."""
        self.add_bytes(key, _serialised(value))

    def add_bytes(self, key: str, serialised: bytes) -> None:
        """Write an object that is serialised already."""
        self._described[key] = dcp.BytesStorageMetadata()
        self._store(dcp.MetadataIndex(key), serialised)

    def finish(self, common: dict[str, Any]) -> None:
        """Write description, ``common.pt`` and manifest, without which it is no checkpoint."""
        if self._file is not None:
            self._file.close()
        metadata = dcp.Metadata(self._described, storage_data=self._stored)
        metadata.storage_meta = dcp.StorageMeta()
        metadata.version = "1.0.0"
        with (self.folder / "common.pt").open("wb") as common_file:
            _save(common, common_file)
        write_json(self.folder / "metadata.json", BACKEND)
        with (self.folder / ".metadata").open("wb") as file:
            pickle.dump(metadata, file)
        write_manifest(self.folder)

    def _store(self, index: Any, value: Tensor | bytes) -> None:
        if self._file is None or self._file.tell() > self.max_file_bytes:
            if self._file is not None:
                self._file.close()
            self._name = f"__0_{self._num_files}.distcp"
            self._num_files += 1
            self._file = (self.folder / self._name).open("wb")
        start = self._file.tell()
        if isinstance(value, bytes):
            self._file.write(value)
        else:
            _save(value, self._file)
        self._stored[index] = _StorageInfo(self._name, start, self._file.tell() - start)


def _save(value: Any, file: BinaryIO) -> None:
    """``torch.save``, whose own error hides the write that failed.

    Raises:
        OSError: naming the file.
    """
    try:
        torch.save(value, file)
    except RuntimeError as error:
        raise OSError(f"{Path(file.name).name}: {error.__context__ or error}") from error


def _serialised(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
