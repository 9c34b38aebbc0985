"""A Hugging Face folder read slice by slice, checked before anything is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import read_json
from .hf_config import HfModel
from .hf_parse import read_hf_config
from .mapping import Mapping

# Derived from the configuration; old exports stored it.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


class HfFolder:
    """The weights of a folder by name; opening it checks names, shapes and dtypes.

    Only headers are read until ``read`` is called.

    Args:
        hf_dir: folder with ``config.json`` and safetensors, one file or shards with an index.

    Raises:
        ValueError: naming the file: missing or damaged files, tensors that the configuration
            does not have, has otherwise, or needs and are missing.
        NotImplementedError: an unsupported architecture or setting.
    """

    def __init__(self, hf_dir: str | Path) -> None:
        self.path = Path(hf_dir)
        if not self.path.is_dir():
            raise ValueError(f"{hf_dir}: no such folder; pass a Hugging Face model folder")
        self.model: HfModel = read_hf_config(self.path)
        self._files: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._open()
        self._check()

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Indices ``[start, stop)`` of a tensor along ``dim``, on the CPU, as stored."""
        path = self._files[name]
        index = (slice(None),) * dim + (slice(start, stop),)
        try:
            tensor: Tensor = self._handles[path].get_slice(name)[index]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: tensor {name} is not readable ({error})") from error
        return tensor

    def _open(self) -> None:
        index_path = self.path / _INDEX
        if index_path.is_file():
            weight_map = read_json(index_path).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index_path}: no weight_map; the index is damaged")
            files = sorted(set(weight_map.values()))
        elif (self.path / "model.safetensors").is_file():
            weight_map, files = None, ["model.safetensors"]
        else:
            raise ValueError(
                f"{self.path}: neither model.safetensors nor {_INDEX}; other weight formats "
                "(pytorch_model.bin) are not read: save the model as safetensors"
            )
        for file in files:
            path = self.path / file
            if not path.is_file():
                raise ValueError(f"{path}: missing, although {_INDEX} names it; download it again")
            try:
                handle = safe_open(path, framework="pt")
                for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                    self._add(handle, path, name)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not readable as safetensors ({error})") from error
            self._handles[path] = handle
        for name, file in (weight_map or {}).items():
            if self._files.get(name) != self.path / file and not name.endswith(_DERIVED_SUFFIX):
                raise ValueError(
                    f"{self.path / file}: tensor {name} is missing; the index names it"
                )

    def _add(self, handle: Any, path: Path, name: str) -> None:
        if name.endswith(_DERIVED_SUFFIX):
            return
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

    def _check(self) -> None:
        want = Mapping(self.model).hf_shapes()
        if self.model.tied and "lm_head.weight" in self._files:
            self._check_tied_head()
        for name, shape in want.items():
            if name not in self.shapes:
                raise ValueError(
                    f"{self.path}: tensor {name} is missing; config.json describes a "
                    f"{self.model.architecture} of {self.model.num_layers} layers with "
                    f"tie_word_embeddings={self.model.tied}"
                )
            if self.shapes[name] != shape:
                raise ValueError(
                    f"{self._files[name]}: tensor {name} is {list(self.shapes[name])}, by "
                    f"config.json it must be {list(shape)}"
                )
        unexpected = sorted(self.shapes.keys() - want.keys())
        if unexpected:
            raise ValueError(
                f"{self._files[unexpected[0]]}: {len(unexpected)} tensor(s) that config.json does "
                f"not describe: {', '.join(unexpected[:5])}; folder and configuration do not match"
            )

    def _check_tied_head(self) -> None:
        """Some folders store a tied head a second time; it must be the embedding."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        same = self.shapes[head] == self.shapes.get(embedding)
        for start in range(0, self.shapes[head][0] if same else 0, 8192):
            rows = (0, start, start + 8192)
            same = same and torch.equal(self.read(head, *rows), self.read(embedding, *rows))
        if not same:
            raise ValueError(
                f"{self._files[head]}: lm_head.weight differs from the embedding, but config.json "
                "says tie_word_embeddings=true; set it to false or remove lm_head.weight"
            )
        del self._files[head], self.shapes[head], self.dtypes[head]
