"""The torch_dist format, tensor by tensor, without a model and without a process group.

A folder holds ``.metadata`` (which part of which tensor lies where), ``__R_N.distcp`` files,
``common.pt`` and ``metadata.json``. Its tensors are the whole model's, whatever tp and pp wrote
them; layers are stacked along a first axis. From Megatron-Core 0.17 on an object takes the place
of ``common.pt``.
"""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from .description import Chunk, Index, Record, read_description
from .extra_state import is_empty, is_extra_state
from .files import parse_json, write_json
from .layout import load_torch_file, named_entries, unpickling_reason
from .loaded import flaw_of
from .manifest import CheckpointFiles, write_manifest

_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
COMMON_STATE = "common_state/shard_0_1"
MAX_FILE_BYTES = 4 * 2**30


def is_torch_dist(folder: Path) -> bool:
    """Whether the folder claims to be a torch_dist checkpoint."""
    return (folder / "metadata.json").is_file() or (folder / ".metadata").is_file()


class TorchDistReader:
    """Tensors and objects of a torch_dist folder by key; opening it reads only the description.

    Nothing is unpickled but tensors and plain values (``torch.load(weights_only=True)``). Where the
    folder has a manifest, every file is compared with it before it is read.

    Attributes:
        files: of the folder.
        tensors: key -> shape, dtype and chunks.
        objects: key -> where its bytes are.

    Raises:
        ValueError: naming the file: not torch_dist, a damaged description, a file that is missing
            or has changed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = CheckpointFiles(self.folder)
        if not (self.folder / "metadata.json").is_file():
            raise ValueError(f"{self.folder / 'metadata.json'}: missing; no torch_dist checkpoint")
        backend = parse_json(self.files.read("metadata.json"), self.folder / "metadata.json")
        if backend.get("sharded_backend") != "torch_dist":
            raise ValueError(
                f"{self.folder / 'metadata.json'}: format {backend.get('sharded_backend')!r}; only "
                "torch_dist is read; save it in that format"
            )
        version = backend.get("sharded_backend_version", 1)
        if version != _BACKEND["sharded_backend_version"]:
            raise ValueError(
                f"{self.folder / 'metadata.json'}: sharded_backend_version={version!r}, only 1 is "
                "known; restore the file, or save with a Megatron-Core that this version supports"
            )
        path = self.folder / ".metadata"
        self.tensors, self.objects = read_description(self.files.read(path.name), path)
        sizes: dict[str, int] = {}
        for record in self._records():
            sizes[record.file] = max(sizes.get(record.file, 0), record.start + record.length)
        for name, size in sizes.items():
            part = self.files.path(name)
            if part.stat().st_size < size:
                raise ValueError(
                    f"{part}: {part.stat().st_size} bytes, {path} needs at least {size}; the file "
                    "is cut off, restore it or take another checkpoint"
                )

    def read(self, key: str, index: Index = ()) -> Tensor:
        """``tensor[index]`` of the whole tensor; only the chunks that overlap it are read.

        Raises:
            ValueError: naming the file, if its bytes are no tensor.
        """
        shape = self.tensors[key].shape
        rest = shape[len(index) :]
        box = self.read_box(key, (*index, *(0 for _ in rest)), (*(1 for _ in index), *rest))
        return box[(0,) * len(index)]

    def read_box(self, key: str, offsets: Index, sizes: Index) -> Tensor:
        """The box of a tensor at ``offsets``; what lies beyond its end is zero.

        Raises:
            ValueError: naming the file, if its bytes are no tensor.
        """
        tensor = self.tensors[key]
        highs = tuple(o + size for o, size in zip(offsets, sizes, strict=True))
        is_inside = all(high <= whole for high, whole in zip(highs, tensor.shape, strict=True))
        out = (torch.empty if is_inside else torch.zeros)(sizes, dtype=tensor.dtype)
        for chunk in tensor.overlapping(offsets, highs):
            starts = [max(low, o) for low, o in zip(offsets, chunk.offsets)]
            stops = [min(h, o + size) for h, o, size in zip(highs, chunk.offsets, chunk.sizes)]
            here = tuple(slice(a - low, b - low) for a, b, low in zip(starts, stops, offsets))
            there = tuple(slice(a - o, b - o) for a, b, o in zip(starts, stops, chunk.offsets))
            out[here] = self.read_chunk(key, chunk)[there]
        return out

    def read_chunk(self, key: str, chunk: Chunk) -> Tensor:
        """One stored part of a tensor.

        Raises:
            ValueError: naming the file, if its bytes are no tensor, or another one.
        """
        path, described = self.folder / chunk.file, self.tensors[key].dtype
        tensor = self._load(key, chunk)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: tensor {key} is stored as {type(tensor).__name__}")
        if tuple(tensor.shape) != chunk.sizes or tensor.dtype != described:
            raise ValueError(
                f"{path}: tensor {key} has a part {list(tensor.shape)} of {tensor.dtype} where the "
                f"description says {list(chunk.sizes)} of {described}; restore the file or take "
                "another checkpoint"
            )
        return tensor

    def read_object(self, key: str) -> Any:
        """An object that is stored beside the tensors.

        The extra state of a layer must be empty, as it is of every layer that is not quantised:
        Transformer Engine would unpickle anything else.

        Raises:
            ValueError: naming the file, if the object is damaged or would run code.
        """
        record = self.objects[key]
        stored = self._load(key, record)
        # Megatron-Core puts every object into a list of its own.
        value = stored[0] if isinstance(stored, list) and len(stored) == 1 else stored
        if is_extra_state(key) and not is_empty(value):
            raise ValueError(
                f"{self.folder / record.file}: {key} holds a state of quantisation, which no layer "
                "here has and which Transformer Engine would unpickle; restore the file, or save "
                "the model without fp8"
            )
        return value

    def read_bytes(self, key: str) -> bytes:
        """The serialised bytes of an object that ``read_object`` reads."""
        self.read_object(key)
        return self._bytes(self.objects[key])

    def read_common(self, *, trust_pickle: bool = False) -> dict[str, Any]:
        """What is neither tensor nor object: iteration, arguments, states of schedules.

        Args:
            trust_pickle: allow ``common.pt`` to hold any object; reading it then runs its code.

        Raises:
            ValueError: naming the file: missing, damaged, or with objects that need trust.
        """
        path = self.folder / "common.pt"
        if COMMON_STATE in self.objects and not path.is_file():
            path = self.folder / self.objects[COMMON_STATE].file
            common = self.read_object(COMMON_STATE)
        else:
            content = io.BytesIO(self.files.read(path.name))
            common = load_torch_file(path, content, trust_pickle=trust_pickle)
        common = named_entries(common, path)
        if not isinstance(common.get("args"), Namespace | None):
            raise ValueError(f"{path}: args are {type(common['args']).__name__}, must be Namespace")
        return common

    def _load(self, key: str, record: Record) -> Any:
        content = io.BytesIO(self._bytes(record))
        try:
            value = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{self.folder / record.file}: {key} is not readable ({unpickling_reason(error)}); "
                "restore the file or take another checkpoint"
            ) from error
        if flaw := flaw_of(value):
            raise ValueError(
                f"{self.folder / record.file}: {key} holds {flaw}; restore the file or take "
                "another checkpoint"
            )
        return value

    def _bytes(self, record: Record) -> bytes:
        with self.files.open(record.file) as file:
            file.seek(record.start)
            try:
                return file.read(record.length)
            # A file with holes is longer than what was written.
            except MemoryError as error:
                raise ValueError(
                    f"{self.folder / record.file}: a record of {record.length} bytes does not fit "
                    "into memory; restore the folder or take another checkpoint"
                ) from error

    def _records(self) -> list[Record]:
        chunks = [chunk for tensor in self.tensors.values() for chunk in tensor.chunks]
        return [*chunks, *self.objects.values()]


def _serialised(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


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
        write_json(self.folder / "metadata.json", _BACKEND)
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
