"""A Megatron checkpoint read as the Hugging Face tensors that it holds."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..arguments import check_args, hf_model_from_args
from ..description import HfModel, parse_hf_config
from ..files import NAMED_DTYPES, read_json
from ..table import EMBEDDING, HEAD, Merger, Shard, check_finite, is_same
from .contents import check_all_read
from .huggingface import CarriedTensors, open_carried
from .iterations import find_hf_config, find_iteration
from .legacy import LegacyShards
from .torch_dist import TorchDistShards, is_torch_dist


class WeightSource(Protocol):
    """Weights by their Hugging Face names: a Hugging Face folder or a Megatron checkpoint."""

    path: Path
    model: HfModel
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    # Of layers that are not built.
    carried: CarriedTensors

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Indices ``[start, stop)`` of a tensor along ``dim``, on the CPU, as stored."""


class MegatronFolder:
    """The model weights of a Megatron checkpoint, torch_dist or legacy, by Hugging Face names.

    Everything of the model that the checkpoint holds is one of these tensors, or the checkpoint is
    refused. One Megatron parameter is in memory at a time (legacy: one pipeline stage).

    Args:
        path: folder with the tracker file, or one iteration's folder.
        hf_config: folder whose ``config.json`` the model has; None: the one kept beside the
            checkpoint, or the checkpoint's own arguments.
        trust_pickle: allow unpickling; legacy checkpoints cannot be read without.

    Raises:
        ValueError: naming the file: missing or damaged files, tensors that do not fit or that the
            configuration does not describe.
        NotImplementedError: a model that no supported architecture describes.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        hf_config: str | Path | None = None,
        trust_pickle: bool = False,
    ) -> None:
        self.path = find_iteration(path)
        self.hf_config = find_hf_config(self.path, hf_config)
        shards = TorchDistShards if is_torch_dist(self.path) else LegacyShards
        self._shards: TorchDistShards | LegacyShards = shards(self.path, trust_pickle=trust_pickle)
        self.args: Namespace | None = self._shards.common.get("args")
        if not isinstance(self.args, Namespace | None):
            raise ValueError(
                f"{self.path}: its args are a {type(self.args).__name__}, no Namespace"
            )
        self.model = self._describe()
        self.table = self.model.weight_table(self._padded_vocab_size())
        self.shapes = self.table.hf_shapes()
        names = self.table.megatron_names()
        # Which Megatron parameters hold a Hugging Face tensor: one, or one of every expert.
        self._homes: dict[str, dict[str, None]] = {}
        for name in names:
            self._check(name)
            for piece in self.table.shard(name).pieces:
                self._homes.setdefault(piece.name, {})[name] = None
        self.dtypes = {n: self._shards.dtype(next(iter(self._homes[n]))) for n in self.shapes}
        self._last: tuple[object, dict[str, Tensor]] = ("", {})
        self._check_complete(names)
        self.carried = open_carried(self.hf_config, self.model)

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Indices ``[start, stop)`` of a Hugging Face tensor along ``dim``.

        Raises:
            ValueError: naming the file: damaged, or with values that are not finite.
        """
        first, *more = self._homes[name]
        count = self.shapes[name][0]
        low, high = (start, count if stop is None else stop) if more and dim == 0 else (0, count)
        key = (name, low, high) if more else first
        if self._last[0] != key:
            self._last = key, self._experts(name, low, high) if more else self._tensors(first)
        index = slice(start - low, None if stop is None else stop - low)
        return self._last[1][name][(slice(None),) * dim + (index,)]

    def _experts(self, name: str, low: int, high: int) -> dict[str, Tensor]:
        """Experts ``[low, high)`` of a tensor that holds those of a layer."""
        merger = Merger({name: (high - low, *self.shapes[name][1:])})
        merged: dict[str, Tensor] = {}
        for home in list(self._homes[name])[low:high]:
            merged = merger.add(*self._read_shards(home, -low))
            self._check_finite(home, merged)
        return merged

    def _describe(self) -> HfModel:
        if self.hf_config is not None:
            path = self.hf_config / "config.json"
            model = parse_hf_config(read_json(path), str(path))
            if self.args is not None:
                check_args(self.args, model, str(self.path))
            # A run in another dtype than its configuration's says so in its arguments.
            dtype = getattr(self.args, "params_dtype", None) or model.dtype
            return replace(model, dtype=dtype) if dtype in NAMED_DTYPES.values() else model
        if self.args is None:
            raise ValueError(
                f"{self.path / 'common.pt'}: no args in it; pass the model's configuration by "
                "hf_config=DIR"
            )
        return hf_model_from_args(self.args, str(self.path))

    def _padded_vocab_size(self) -> int:
        rows = (*self._shards.shape(EMBEDDING), 0)[0] * self._shards.tp_size
        used = getattr(self.args, "vocab_size", None)
        used = used if isinstance(used, int) else 0
        if not used <= self.model.vocab_size <= rows:
            raise ValueError(
                f"{self.path}: the embedding has {rows} rows"
                + f", {used} of them used by its args" * bool(used)
                + f"; the configuration's vocabulary of {self.model.vocab_size} does not match"
            )
        return rows

    def _check(self, name: str) -> None:
        """The parameter is there and fits the configuration."""
        shape, dtype = self._shards.shape(name), self._shards.dtype(name)
        spec = self.table.shard(name, 0, self._shards.tp_size)
        if shape != spec.shape:
            raise ValueError(
                f"{self.path}: {name} is {list(shape)}, by the configuration it must be "
                f"{list(spec.shape)}"
            )
        if dtype not in NAMED_DTYPES.values():
            raise ValueError(
                f"{self._shards.file(name)}: {name} has dtype {dtype}; supported are "
                f"{', '.join(NAMED_DTYPES)}"
            )

    def _check_complete(self, names: list[str]) -> None:
        """Every tensor of the checkpoint is read; what lies there twice is equal."""
        if self.model.tied and HEAD in self._shards:
            self._check(HEAD)
            # The last stage of a legacy checkpoint keeps the embedding as its head.
            (head,), (embedding,) = (self._tensors(name).values() for name in (HEAD, EMBEDDING))
            if not is_same(head, embedding):
                raise ValueError(
                    f"{self._shards.file(HEAD)}: {HEAD} differs from the embedding, but the "
                    "configuration ties them (tie_word_embeddings=true)"
                )
            names = [*names, HEAD]
        check_all_read(self.path, self._shards.unread(names))
        if isinstance(self._shards, TorchDistShards):
            self._shards.check_copies(names)

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """Every Hugging Face tensor of one Megatron parameter."""
        merged = Merger(self.shapes).add(*self._read_shards(name))
        self._check_finite(name, merged)
        return merged

    def _check_finite(self, name: str, tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            check_finite(tensor, f"{self._shards.file(name)}: tensor {name} ({key})")

    def _read_shards(self, name: str, moved: int = 0) -> tuple[list[Shard], list[Tensor]]:
        """A parameter's shards, and what they are made of, experts moved by so many places."""
        size = self._shards.tp_size
        specs = [self.table.shard(name, rank, size).moved(moved) for rank in range(size)]
        shards = self._shards.read(name)
        is_whole = specs.count(specs[0]) == size
        if is_whole and not all(is_same(shard, shards[0]) for shard in shards[1:]):
            raise ValueError(
                f"{self._shards.file(name)}: {name} is not the same on every tensor-parallel rank"
            )
        return specs, shards


def common_state(args: Namespace, iteration: int | None) -> dict[str, Any]:
    """The ``common.pt`` of a checkpoint without training state."""
    return {"args": args, "checkpoint_version": 3.0, "iteration": iteration or 0}
