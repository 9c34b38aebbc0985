"""A Hugging Face folder read slice by slice, checked before anything is built from it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ...description import HfModel, read_hf_config
from ...table import is_same
from .carried import CarriedTensors
from .tensors import TensorFiles

# Derived from the configuration; old exports stored it.
_DERIVED = re.compile(r"model\.(?:layers\.(\d+)\.self_attn\.)?rotary_emb\.inv_freq")


class HfFolder:
    """The weights of a folder by name; opening it checks names, shapes and dtypes.

    Only headers are read until ``read`` is called.

    Args:
        hf_dir: folder with ``config.json`` and safetensors, one file or shards with an index.

    Attributes:
        carried: tensors of layers that are not built.

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
        self._files = TensorFiles(self.path, skip=self._is_derived)
        self.shapes: dict[str, tuple[int, ...]] = dict(self._files.shapes)
        self.dtypes: dict[str, torch.dtype] = dict(self._files.dtypes)
        self.carried = CarriedTensors.of(self._files, self.model)
        for name in self.carried.shapes:
            del self.shapes[name], self.dtypes[name]
        self._check()

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Indices ``[start, stop)`` of a tensor along ``dim``, on the CPU, as stored.

        Raises:
            ValueError: naming the file: damaged, or with values that are not finite.
        """
        return self._files.read(name, dim, start, stop)

    def _is_derived(self, name: str) -> bool:
        match = _DERIVED.fullmatch(name)
        return match is not None and int(match[1] or 0) < self.model.num_layers

    def _check(self) -> None:
        want = self.model.weight_table().hf_shapes()
        if self.model.tied and "lm_head.weight" in self.shapes:
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
                    f"{self._files.path(name)}: tensor {name} is {list(self.shapes[name])}, by "
                    f"config.json it must be {list(shape)}"
                )
        unexpected = sorted(self.shapes.keys() - want.keys())
        if unexpected:
            raise ValueError(
                f"{self._files.path(unexpected[0])}: {len(unexpected)} tensor(s) that config.json "
                f"does not describe: {', '.join(unexpected[:5])}; folder and configuration do "
                "not match"
            )

    def _check_tied_head(self) -> None:
        """Some folders store a tied head a second time; it must be the embedding."""
        head, embedding = "lm_head.weight", self.model.embedding
        same = self.shapes[head] == self.shapes.get(embedding)
        for start in range(0, self.shapes[head][0] if same else 0, 8192):
            rows = (0, start, start + 8192)
            same = same and is_same(self.read(head, *rows), self.read(embedding, *rows))
        if not same:
            raise ValueError(
                f"{self._files.path(head)}: lm_head.weight differs from the embedding, but "
                "config.json says tie_word_embeddings=true; set it to false or remove "
                "lm_head.weight"
            )
        del self.shapes[head], self.dtypes[head]
