"""Tensors of safetensors files, one file or shards with an index, read slice by slice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...table import check_finite
from .files import INDEX, find_weight_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


class TensorFiles:
    """By name; headers are read at once, values when they are asked for.

    Args:
        folder: that holds the files.
        skip: names that are not read.

    Raises:
        ValueError: naming the file: missing, damaged or ambiguous files, a dtype that is none of
            weights.
    """

    def __init__(self, folder: Path, skip: Callable[[str], bool] = lambda name: False) -> None:
        self._skip = skip
        self._files: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        files, weight_map = find_weight_files(folder)
        for path in files:
            try:
                handle = safe_open(path, framework="pt")
                for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                    self._add(handle, path, name)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not readable as safetensors ({error})") from error
            self._handles[path] = handle
        if weight_map is not None:
            self._check_index(weight_map)

    def path(self, name: str) -> Path:
        """The file of a tensor."""
        return self._files[name]

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Indices ``[start, stop)`` of a tensor along ``dim``, on the CPU, as stored.

        Raises:
            ValueError: naming the file: damaged, or with values that are not finite.
        """
        path = self._files[name]
        index = (slice(None),) * dim + (slice(start, stop),)
        try:
            tensor: Tensor = self._handles[path].get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: tensor {name} is not readable ({error})") from error
        check_finite(tensor, f"{path}: tensor {name}")
        return tensor

    def _check_index(self, weight_map: dict[str, Path]) -> None:
        indexed = {name: path for name, path in weight_map.items() if not self._skip(name)}
        for name in sorted(indexed.keys() | self._files.keys()):
            held, named = self._files.get(name), indexed.get(name)
            if held is None:
                raise ValueError(f"{named}: tensor {name} is missing; the index names it")
            if held != named:
                raise ValueError(
                    f"{held}: tensor {name}, which {INDEX} places in "
                    f"{named.name if named else 'no file'}; download the index that belongs to it"
                )

    def _add(self, handle: Any, path: Path, name: str) -> None:
        if self._skip(name):
            return
        if name in self._files:
            raise ValueError(
                f"{path}: tensor {name} is in {self._files[name].name} too; remove one of the two"
            )
        header = handle.get_slice(name)
        dtype = header.get_dtype()
        if dtype not in _DTYPES:
            raise ValueError(
                f"{path}: tensor {name} has dtype {dtype}; supported are {', '.join(_DTYPES)} "
                "(dequantise the model first)"
            )
        self._files[name] = path
        self.shapes[name] = tuple(header.get_shape())
        self.dtypes[name] = _DTYPES[dtype]
