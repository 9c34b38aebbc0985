"""Writes safetensors shards with an index, tensor by tensor, for one writer or many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...description import HfModel, parse_hf_config
from ...files import read_json, with_dtype, write_json
from ...table import cast
from .side_files import copy_side_files

MAX_SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class WeightFiles:
    """Which file holds which tensor; every writer computes the same one.

    Attributes:
        names: file name -> tensor names, in order; a file has one writer.
        total_bytes: of all tensors.
    """

    names: dict[str, tuple[str, ...]]
    total_bytes: int


def make_weight_files(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    writers: Mapping[str, int] | None = None,
) -> WeightFiles:
    """Fill files up to ``max_shard_bytes`` in the order given; a new writer starts a new file."""
    shards: list[list[str]] = []
    room, writer, total = 0, None, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtypes[name].itemsize
        owner = (writers or {}).get(name)
        if not shards or size > room or owner != writer:
            shards.append([])
            room, writer = max_shard_bytes, owner
        shards[-1].append(name)
        room, total = room - size, total + size
    if len(shards) == 1:
        return WeightFiles({"model.safetensors": tuple(shards[0])}, total)
    count = len(shards)
    names = (f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1))
    return WeightFiles({name: tuple(shard) for name, shard in zip(names, shards)}, total)


class HfWriter:
    """Collects tensors and writes each file as soon as it is complete."""

    def __init__(self, folder: Path, files: WeightFiles, dtypes: Mapping[str, torch.dtype]) -> None:
        self.folder = folder
        self.files = files
        self.dtypes = dtypes
        self._file_of = {name: file for file, names in files.names.items() for name in names}
        self._pending: dict[str, dict[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a whole tensor; a file's tensors may come in any order.

        Raises:
            ValueError: values that the written dtype does not hold.
            OSError: naming the file that could not be written.
        """
        file = self._file_of[name]
        pending = self._pending.setdefault(file, {})
        pending[name] = cast(tensor.detach().cpu(), self.dtypes[name], name).contiguous()
        if len(pending) == len(self.files.names[file]):
            ordered = {name: pending[name] for name in self.files.names[file]}
            try:
                save_file(ordered, self.folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"{file}: {error}") from error
            del self._pending[file]

    def finish(self) -> None:
        """Check that no file was left incomplete."""
        assert not self._pending, f"incomplete: {sorted(self._pending)}"


def write_index(folder: Path, files: WeightFiles) -> None:
    """Say which file holds which tensor, where there are several."""
    if len(files.names) > 1:
        weight_map = {name: file for file, names in files.names.items() for name in names}
        index = {"metadata": {"total_size": files.total_bytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_hf_metadata(
    folder: Path, files: WeightFiles, model: HfModel, source: Path | None
) -> None:
    """Write index and ``config.json`` and copy tokenizer, templates and generation config.

    The configuration is the source's, with the dtype of ``model``; without a source it is made
    from ``model``.
    """
    write_index(folder, files)
    config: dict[str, Any] = model.config_json()
    if source is not None:
        config = read_json(source / "config.json")
        if parse_hf_config(config).dtype != model.dtype:
            config = with_dtype(config, model.dtype)
        copy_side_files(source, folder)
    write_json(folder / "config.json", config)
