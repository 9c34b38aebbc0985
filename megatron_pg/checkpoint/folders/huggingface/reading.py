"""A Hugging Face folder read slice by slice, checked before anything is built from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...description import HfModel, read_hf_config
from ...table import check_finite, is_same
from .files import INDEX, find_weight_files

# Derived from the configuration; old exports stored it.
_DERIVED = re.compile(r"model\.(?:layers\.(\d+)\.self_attn\.)?rotary_emb\.inv_freq")
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
        ValueError: naming the file: missing, damaged or ambiguous files, tensors that the
            configuration does not have, has otherwise, or needs and are missing.
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

    def _open(self) -> None:
        files, weight_map = find_weight_files(self.path)
        for path in files:
            try:
                handle = safe_open(path, framework="pt")
                for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                    self._add(handle, path, name)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: not readable as safetensors ({error})") from error
            self._handles[path] = handle
        if weight_map is None:
            return
        indexed = {k: v for k, v in weight_map.items() if not self._is_derived(k)}
        for name in sorted(indexed.keys() | self._files.keys()):
            held, named = self._files.get(name), indexed.get(name)
            if held is None:
                raise ValueError(f"{named}: tensor {name} is missing; the index names it")
            if held != named:
                raise ValueError(
                    f"{held}: tensor {name}, which {INDEX} places in "
                    f"{named.name if named else 'no file'}; download the index that belongs to it"
                )

    def _is_derived(self, name: str) -> bool:
        match = _DERIVED.fullmatch(name)
        return match is not None and int(match[1] or 0) < self.model.num_layers

    def _add(self, handle: Any, path: Path, name: str) -> None:
        if self._is_derived(name):
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

    def _check(self) -> None:
        want = self.model.weight_table().hf_shapes()
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
            same = same and is_same(self.read(head, *rows), self.read(embedding, *rows))
        if not same:
            raise ValueError(
                f"{self._files[head]}: lm_head.weight differs from the embedding, but config.json "
                "says tie_word_embeddings=true; set it to false or remove lm_head.weight"
            )
        del self._files[head], self.shapes[head], self.dtypes[head]
