"""The torch_dist format, tensor by tensor, without a model and without a process group.

A folder holds ``.metadata`` (which part of which tensor lies where), ``__R_N.distcp`` files,
``common.pt`` and ``metadata.json``. Its tensors are the whole model's, whatever tp and pp wrote
them; layers are stacked along a first axis.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.filesystem import _StorageInfo

from .files import read_json, write_json

_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
MAX_FILE_BYTES = 4 * 2**30


def is_torch_dist(folder: Path) -> bool:
    """Whether the folder claims to be a torch_dist checkpoint."""
    return (folder / "metadata.json").is_file() or (folder / ".metadata").is_file()


class _MetadataUnpickler(pickle.Unpickler):
    """Builds checkpoint descriptions and nothing else, so that foreign files may be opened."""

    _MODULES = {dcp.__name__: dcp, planner.__name__: planner}

    def find_class(self, module: str, name: str) -> Any:
        """The few names that descriptions are made of."""
        if module in self._MODULES and "." not in name:
            found = getattr(self._MODULES[module], name, None)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module == "torch":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, torch.dtype | torch.layout):
                return found
        if (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo"):
            return _StorageInfo
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module.startswith("pathlib") and name in ("PosixPath", "PurePosixPath", "Path"):
            return Path
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


@dataclass(frozen=True)
class Chunk:
    """A stored box of a tensor and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class TorchDistReader:
    """Tensors of a torch_dist folder by key; opening it reads only the description.

    Attributes:
        tensors: key -> shape, dtype and chunks.
        objects: key -> (file, start, length) of pickled objects, which are never loaded.

    Raises:
        ValueError: naming the file: not torch_dist, a damaged description, missing files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "metadata.json").is_file():
            raise ValueError(f"{self.folder / 'metadata.json'}: missing; no torch_dist checkpoint")
        backend = read_json(self.folder / "metadata.json")
        if backend.get("sharded_backend") != "torch_dist":
            raise ValueError(
                f"{self.folder / 'metadata.json'}: format {backend.get('sharded_backend')!r}; only "
                "torch_dist is read (save with --ckpt-format torch_dist)"
            )
        path = self.folder / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            described, stored = metadata.state_dict_metadata, metadata.storage_data
            self.tensors, self.objects = self._describe(described, stored)
        except Exception as error:
            raise ValueError(f"{path}: not readable ({error})") from error
        files = {c.file: c.start + c.length for t in self.tensors.values() for c in t.chunks}
        for tensor in self.tensors.values():
            for chunk in tensor.chunks:
                files[chunk.file] = max(files[chunk.file], chunk.start + chunk.length)
        for name, size in files.items():
            part = self.folder / name
            if not part.is_file():
                raise ValueError(f"{part}: missing, although {path} names it")
            if part.stat().st_size < size:
                raise ValueError(
                    f"{part}: {part.stat().st_size} bytes, {path} needs at least {size}; the file "
                    "is cut off"
                )

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """``tensor[index]`` of the whole tensor; only the chunks that overlap it are read.

        Raises:
            ValueError: naming the file, if its bytes are no tensor.
        """
        tensor = self.tensors[key]
        lows = [*index, *(0 for _ in tensor.shape[len(index) :])]
        highs = [*(i + 1 for i in index), *tensor.shape[len(index) :]]
        out = torch.empty([high - low for low, high in zip(lows, highs)], dtype=tensor.dtype)
        filled = 0
        for chunk in tensor.chunks:
            starts = [max(low, o) for low, o in zip(lows, chunk.offsets)]
            stops = [
                min(high, o + size) for high, o, size in zip(highs, chunk.offsets, chunk.sizes)
            ]
            if any(start >= stop for start, stop in zip(starts, stops)):
                continue
            here = tuple(slice(a - low, b - low) for a, b, low in zip(starts, stops, lows))
            there = tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, chunk.offsets))
            part = self.read_chunk(key, chunk)[there]
            out[here] = part
            filled += part.numel()
        if filled != out.numel():
            raise ValueError(
                f"{self.folder}: tensor {key} is stored incompletely ({filled} of {out.numel()} "
                "elements)"
            )
        return out[(0,) * len(index)]

    def read_bytes(self, key: str) -> bytes:
        """The serialised bytes of an object, unopened."""
        name, start, length = self.objects[key]
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def read_chunk(self, key: str, chunk: Chunk) -> Tensor:
        """One stored part of a tensor.

        Raises:
            ValueError: naming the file, if its bytes are no tensor.
        """
        path = self.folder / chunk.file
        try:
            with path.open("rb") as file:
                file.seek(chunk.start)
                data = io.BytesIO(file.read(chunk.length))
            tensor: Tensor = torch.load(data, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path}: tensor {key} is not readable ({reason})") from error
        if tuple(tensor.shape) != chunk.sizes:
            raise ValueError(
                f"{path}: tensor {key} has a part {list(tensor.shape)} where the description says "
                f"{list(chunk.sizes)}"
            )
        return tensor

    @staticmethod
    def _describe(
        described: dict[str, Any], stored: dict[Any, Any]
    ) -> tuple[dict[str, StoredTensor], dict[str, tuple[str, int, int]]]:
        places = {(index.fqn, index.offset): info for index, info in stored.items()}
        tensors, objects = {}, {}
        for key, entry in described.items():
            if isinstance(entry, dcp.TensorStorageMetadata):
                chunks = []
                for chunk in entry.chunks:
                    info = places[key, chunk.offsets]
                    box = tuple(chunk.offsets), tuple(chunk.sizes)
                    chunks.append(Chunk(*box, info.relative_path, info.offset, info.length))
                shape = tuple(entry.size)
                tensors[key] = StoredTensor(shape, entry.properties.dtype, tuple(chunks))
            else:
                info = places[key, None]
                objects[key] = (info.relative_path, info.offset, info.length)
        return tensors, objects


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
        buffer = io.BytesIO()
        torch.save(value, buffer)
        self.add_bytes(key, buffer.getvalue())

    def add_bytes(self, key: str, serialised: bytes) -> None:
        """Write an object that is serialised already."""
        self._described[key] = dcp.BytesStorageMetadata()
        self._store(dcp.MetadataIndex(key), serialised)

    def finish(self, common: dict[str, Any]) -> None:
        """Write the description and ``common.pt``; without them the folder is no checkpoint."""
        if self._file is not None:
            self._file.close()
        metadata = dcp.Metadata(self._described, storage_data=self._stored)
        metadata.storage_meta = dcp.StorageMeta()
        metadata.version = "1.0.0"
        with (self.folder / "common.pt").open("wb") as common_file:
            _save(common, common_file)
        write_json(self.folder / "metadata.json", _BACKEND)
        with (self.folder / ".metadata").open("wb") as file:
            pickle.dump(metadata, file)

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
