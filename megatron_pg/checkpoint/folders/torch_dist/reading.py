"""The torch_dist format, tensor by tensor, without a model and without a process group.

A folder holds ``.metadata`` (which part of which tensor lies where), ``__R_N.distcp`` files,
``common.pt`` and ``metadata.json``. Its tensors are the whole model's, whatever tp and pp wrote
them; layers are stacked along a first axis. From Megatron-Core 0.17 on an object takes the place
of ``common.pt``.
"""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import parse_json
from ..contents import is_empty, is_extra_state
from ..torch_files import load_torch_file, named_entries, problem_of, unpickling_reason
from .manifest import CheckpointFiles
from .metadata import Chunk, Index, Record, read_metadata

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
COMMON_STATE = "common_state/shard_0_1"


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
        if version != BACKEND["sharded_backend_version"]:
            raise ValueError(
                f"{self.folder / 'metadata.json'}: sharded_backend_version={version!r}, only 1 is "
                "known; restore the file, or save with a Megatron-Core that this version supports"
            )
        path = self.folder / ".metadata"
        self.tensors, self.objects = read_metadata(self.files.read(path.name), path)
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
        if flaw := problem_of(value):
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
