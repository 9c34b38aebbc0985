"""A Megatron checkpoint read as the Hugging Face tensors that it holds."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .files import read_json
from .hf_config import HfModel
from .hf_parse import parse_hf_config
from .layout import find_hf_config, find_iteration
from .legacy import LegacyShards
from .mapping import Mapping, Shard
from .megatron_args import check_args, hf_model_from_args
from .shards import merge_shards
from .torch_dist import TorchDistReader, is_torch_dist

_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")


class WeightSource(Protocol):
    """Weights by their Hugging Face names: a Hugging Face folder or a Megatron checkpoint."""

    path: Path
    model: HfModel
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Indices ``[start, stop)`` of a tensor along ``dim``, on the CPU, as stored."""


class MegatronFolder:
    """The model weights of a Megatron checkpoint, torch_dist or legacy, by Hugging Face names.

    One Megatron parameter is in memory at a time (legacy: one pipeline stage).

    Args:
        path: folder with the tracker file, or one iteration's folder.
        hf_config: folder whose ``config.json`` the model has; None: the one kept beside the
            checkpoint, or the checkpoint's own arguments.
        trust_pickle: allow unpickling; legacy checkpoints cannot be read without.

    Raises:
        ValueError: naming the file: missing or damaged files, tensors that do not fit.
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
        self._reader: TorchDistReader | None = None
        self._legacy: LegacyShards | None = None
        if is_torch_dist(self.path):
            self._reader = TorchDistReader(self.path)
            common = self._reader.read_common(trust_pickle=trust_pickle)
        else:
            self._legacy = LegacyShards(self.path, trust_pickle=trust_pickle)
            common = self._legacy.common
        self.args: Namespace | None = common.get("args")
        self.model = self._describe()
        self.mapping = Mapping(self.model, self._padded_vocab_size())
        self.shapes = self.mapping.hf_shapes()
        # Which Megatron parameter holds a Hugging Face tensor.
        self._home = {
            piece.name: name
            for name in self.mapping.megatron_names()
            for piece in self.mapping.shard(name).pieces
        }
        homes = {name: self._check(name) for name in self.mapping.megatron_names()}
        self.dtypes = {name: homes[self._home[name]] for name in self.shapes}
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Indices ``[start, stop)`` of a Hugging Face tensor along ``dim``."""
        home = self._home[name]
        if self._last[0] != home:
            self._last = home, self._tensors(home)
        return self._last[1][name][(slice(None),) * dim + (slice(start, stop),)]

    def _describe(self) -> HfModel:
        if self.hf_config is not None:
            path = self.hf_config / "config.json"
            model = parse_hf_config(read_json(path), str(path))
            if self.args is not None:
                check_args(self.args, model, str(self.path))
            return model
        if self.args is None:
            raise ValueError(
                f"{self.path / 'common.pt'}: no args in it; give the model's configuration by "
                "--hf-config DIR"
            )
        return hf_model_from_args(self.args, str(self.path))

    def _padded_vocab_size(self) -> int:
        name = "embedding.word_embeddings.weight"
        if self._legacy is not None:
            rows = self._legacy.shape(name)[0] * self._legacy.tp_size
        else:
            rows = self._stored(name)[2][0]
        if rows < self.model.vocab_size:
            raise ValueError(
                f"{self.path}: the embedding has {rows} rows, the configuration a vocabulary of "
                f"{self.model.vocab_size}; they do not match"
            )
        return rows

    def _check(self, name: str) -> torch.dtype:
        """The parameter is there and fits the configuration; its dtype."""
        if self._legacy is not None:
            self._check_shape(
                name, self.mapping.shard(name, 0, self._legacy.tp_size), self._legacy.shape(name)
            )
            return self._legacy.dtype
        assert self._reader is not None
        key, index, shape = self._stored(name)
        self._check_shape(name, self.mapping.shard(name), shape)
        layers = self._reader.tensors[key].shape[0]
        if (
            key.startswith("decoder.layers.")
            and index
            and layers
            not in (
                self.model.num_layers,
                self.model.num_experts,
            )
        ):
            raise ValueError(
                f"{self.path}: {key} has {layers} layers, the configuration says "
                f"{self.model.num_layers}"
            )
        return self._reader.tensors[key].dtype

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """Every Hugging Face tensor of one Megatron parameter."""
        if self._legacy is not None:
            size = self._legacy.tp_size
            specs = [self.mapping.shard(name, rank, size) for rank in range(size)]
            shards = self._legacy.read(name)
        else:
            assert self._reader is not None
            key, index, _ = self._stored(name)
            specs, shards = [self.mapping.shard(name)], [self._reader.read(key, index)]
        return merge_shards(specs, shards, self.shapes)

    def _stored(self, name: str) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Key, index into its leading axes, and shape of a parameter in torch_dist."""
        assert self._reader is not None
        for key, index in torch_dist_places(name):
            stored = self._reader.tensors.get(key)
            if stored is not None:
                return key, index, stored.shape[len(index) :]
        raise ValueError(f"{self.path}: no tensor {torch_dist_places(name)[0][0]} for {name}")

    def _check_shape(self, name: str, spec: Shard, shape: tuple[int, ...]) -> None:
        if shape != spec.shape:
            raise ValueError(
                f"{self.path}: {name} is {list(shape)}, by the configuration it must be "
                f"{list(spec.shape)}"
            )


def torch_dist_places(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Keys under which a parameter may lie, with its index; the first is how it is written.

    ``decoder.layers.3.mlp.linear_fc2.weight`` -> ``("decoder.layers.mlp.linear_fc2.weight", (3,))``
    """
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if not match:
        return [(name, ())]
    layer, leaf = int(match[1]), match[2]
    leaves: list[tuple[str, tuple[int, ...]]] = [(leaf, ())]
    if leaf == "input_layernorm.weight":
        leaves = [("self_attention.linear_qkv.layer_norm_weight", ()), *leaves]
    elif leaf == "pre_mlp_layernorm.weight":
        leaves = [("mlp.linear_fc1.layer_norm_weight", ()), *leaves]
    expert = _EXPERT.fullmatch(leaf)
    if expert:
        leaves = [(f"mlp.experts.experts.{expert[2]}", (int(expert[1]),))]
    stacked = [(f"decoder.layers.{leaf}", (layer, *index)) for leaf, index in leaves]
    return stacked + [(f"decoder.layers.{layer}.{leaf}", index) for leaf, index in leaves]


def common_state(args: Namespace, iteration: int | None) -> dict[str, Any]:
    """The ``common.pt`` of a checkpoint without training state."""
    return {"args": args, "checkpoint_version": 3.0, "iteration": iteration or 0}
