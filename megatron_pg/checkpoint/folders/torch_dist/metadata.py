"""What a torch_dist folder says that it holds, read without running anything of it.

Its ``.metadata`` is a pickle of torch's own descriptions. They are built by an unpickler that knows
those and nothing else, and believed only where they fit together.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner
from torch.distributed.checkpoint.filesystem import _StorageInfo

from .manifest import is_file_name

Index = tuple[int, ...]


@dataclass(frozen=True)
class Record:
    """A run of bytes of a file that holds one serialised tensor or object."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Chunk(Record):
    """A stored box of a tensor and where its bytes are."""

    offsets: Index
    sizes: Index


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of the checkpoint."""

    shape: Index
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def overlapping(self, lows: Index, highs: Index) -> Iterable[Chunk]:
        """Chunks that hold a part of the box ``[lows, highs)``."""
        exact = self._by_offsets.get(lows)
        if exact is not None and all(o + s == h for o, s, h in zip(lows, exact.sizes, highs)):
            return (exact,)
        return (
            chunk
            for chunk in self.chunks
            if all(
                o < high and low < o + size
                for o, size, low, high in zip(chunk.offsets, chunk.sizes, lows, highs)
            )
        )

    @functools.cached_property
    def _by_offsets(self) -> dict[Index, Chunk]:
        return {chunk.offsets: chunk for chunk in self.chunks}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds checkpoint descriptions and nothing else, so that foreign files may be opened.

    A pickle can set attributes of what it names. It gets subclasses that nobody else uses, not
    the classes themselves.
    """

    _MODULES = {dcp.__name__: dcp, planner.__name__: planner}

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._private = functools.cache(_private)

    def find_class(self, module: str, name: str) -> Any:
        """The few names that descriptions are made of."""
        if module in self._MODULES and "." not in name:
            found = getattr(self._MODULES[module], name, None)
            if isinstance(found, type) and found.__module__ == module:
                return self._private(found)
        if module == "torch":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, torch.dtype | torch.layout):
                return found
        if (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo"):
            return self._private(_StorageInfo)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return self._private(_Layout)
        if module.startswith("pathlib") and name in ("PosixPath", "PurePosixPath", "Path"):
            return self._private(PurePosixPath)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class _Layout:
    """Any layout: that of the stored tensors is seen when they are read."""

    def __init__(self, name: str) -> None:
        pass


def _private(found: type) -> type:
    """A class in place of ``found`` that the pickle may spoil for itself."""
    if issubclass(found, Enum):
        return type(found.__name__, (int,), {})
    own = {"__setstate__": _take_dtype} if found is dcp.TensorProperties else {}
    return type(found.__name__, (found,), own)


def _take_dtype(properties: Any, state: Any) -> None:
    properties.dtype = state[0]


def read_metadata(content: bytes, path: Path) -> tuple[dict[str, StoredTensor], dict[str, Record]]:
    """Tensors and objects by key, from the bytes of ``.metadata``.

    Every tensor is covered by its chunks exactly once, no two records share bytes, and none is
    shorter than what it holds.

    Args:
        content: of the file.
        path: of the file, for messages.

    Raises:
        ValueError: naming the file: it is damaged, names what no description needs, or
            contradicts itself.
    """
    try:
        metadata = _MetadataUnpickler(content).load()
        described, stored = metadata.state_dict_metadata, metadata.storage_data
        places = {(index.fqn, _offset(index)): info for index, info in stored.items()}
        if len(places) != len(stored):
            raise ValueError("a part is stored in two places")
        tensors, objects = {}, {}
        for key, entry in described.items():
            if isinstance(entry, dcp.TensorStorageMetadata):
                tensors[key] = _tensor(key, entry, places)
            else:
                objects[key] = Record(*_place(key, None, places))
        if places:
            key, offset = next(iter(places))
            raise ValueError(f"bytes of {key} at {offset} belong to nothing that is described")
        _check_disjoint([*(c for t in tensors.values() for c in t.chunks), *objects.values()])
    # A damaged pickle fails in any way.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path}: not readable ({reason[:400]}); restore the file or take another checkpoint"
        ) from error
    return tensors, objects


def _offset(index: Any) -> Index | None:
    return None if index.offset is None else _numbers(index.offset)


def _place(key: str, offset: Index | None, places: dict[Any, Any]) -> tuple[str, int, int]:
    """File, start and length of a record, taken out of ``places``."""
    if not isinstance(key, str):
        raise ValueError(f"the key {key!r} is no text")
    if (key, offset) not in places:
        raise ValueError(f"{key} at {offset} is described, but stored nowhere")
    info = places.pop((key, offset))
    if not is_file_name(info.relative_path):
        raise ValueError(f"{key} lies in {str(info.relative_path)[:200]!r}, outside of the folder")
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"{key} is transformed by {info.transform_descriptors}")
    start, length = _numbers((info.offset, info.length))
    return info.relative_path, start, length


def _tensor(key: str, entry: Any, places: dict[Any, Any]) -> StoredTensor:
    shape, dtype = _numbers(entry.size), entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} has the dtype {dtype!r}")
    chunks = []
    for chunk in entry.chunks:
        offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
        if not len(offsets) == len(sizes) == len(shape):
            raise ValueError(f"{key} of shape {shape} has a part {sizes} at {offsets}")
        if any(o + size > whole for o, size, whole in zip(offsets, sizes, shape)):
            raise ValueError(f"{key} of shape {shape} has a part {sizes} at {offsets}")
        file, start, length = _place(key, offsets, places)
        if length < torch.Size(sizes).numel() * dtype.itemsize:
            raise ValueError(f"{key} has {length} bytes for a part {sizes} of {dtype}")
        chunks.append(Chunk(file, start, length, offsets, sizes))
    flaw = _first_flaw([(c.offsets, c.sizes) for c in chunks], shape)
    if flaw is not None:
        where, times = flaw
        raise ValueError(
            f"{key} is stored {f'{times} times' if times else 'incompletely: not at all'} at "
            f"{list(where)} of {list(shape)}"
        )
    return StoredTensor(shape, dtype, tuple(chunks))


def _numbers(values: Any) -> Index:
    """A tuple of integers that are not negative."""
    numbers = tuple(values)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers} must be integers from 0")
    return numbers


def _first_flaw(boxes: Sequence[tuple[Index, Index]], shape: Index) -> tuple[Index, int] | None:
    """A place that boxes (offsets, sizes) do not cover exactly once, and how often; None if none.

    Boxes end at slabs of the first axis; within a slab the question is the same, one axis less.
    """
    if not shape:
        return None if len(boxes) == 1 else ((), len(boxes))
    edges = {edge for o, s in boxes for edge in (o[0], o[0] + s[0])} | {0, shape[0]}
    later = sorted(boxes, key=lambda box: box[0][0], reverse=True)
    slab: list[tuple[Index, Index]] = []
    for low in sorted(edges)[:-1]:
        while later and later[-1][0][0] <= low:
            slab.append(later.pop())
        slab = [(o, s) for o, s in slab if low < o[0] + s[0]]
        flaw = _first_flaw([(o[1:], s[1:]) for o, s in slab], shape[1:])
        if flaw is not None:
            return (low, *flaw[0]), flaw[1]
    return None


def _check_disjoint(records: Sequence[Record]) -> None:
    by_place = sorted(records, key=lambda record: (record.file, record.start, record.length))
    for before, after in zip(by_place, by_place[1:]):
        if before.file == after.file and before.start + before.length > after.start:
            raise ValueError(f"two records of {after.file} share the byte {after.start}")
