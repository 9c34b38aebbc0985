"""The model's parameters in a torch_dist checkpoint, by local-spec names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...description import HfModel
from ...table import FUSED_NORMS, check_finite, is_same, section_names
from ..contents import is_extra_state, is_optimizer_state, is_per_rank, loose_tensors
from .reading import COMMON_STATE, TorchDistReader

_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")

# A tensor's key and an index into its leading axes (layer, expert).
Place = tuple[str, tuple[int, ...]]


def torch_dist_places(name: str) -> list[Place]:
    """Keys under which a parameter may lie, with its index: layers stacked, or each on its own.

    ``decoder.layers.3.mlp.linear_fc2.weight`` -> ``("decoder.layers.mlp.linear_fc2.weight", (3,))``
    """
    layer, leaves = _leaves(name)
    if layer is None:
        return leaves
    alone = [(f"decoder.layers.{layer}.{leaf}", index) for leaf, index in leaves]
    return [*_stacked(layer, leaves), *alone]


@dataclass(frozen=True)
class WrittenPlace:
    """Where a part of a tensor is written.

    Attributes:
        key: of the tensor.
        index: of the part, in the leading axes (layer, expert).
        leading: sizes of those axes.
    """

    key: str
    index: tuple[int, ...]
    leading: tuple[int, ...]


def written_places(name: str, model: HfModel) -> list[WrittenPlace]:
    """Where Megatron-Core writes a parameter: layers stacked, unless they are of several kinds.

    Specs differ in the names of some norms, which are written under each.
    """
    layer, leaves = _leaves(name)
    experts = (model.num_experts or 0,)
    if layer is None:
        return [WrittenPlace(key, (), ()) for key, _ in leaves]
    if len(leaves) > 1:
        leaves = _norm_names(name, layer, model, leaves)
    if not model.is_homogeneous:
        prefix = f"decoder.layers.{layer}."
        return [WrittenPlace(prefix + leaf, i, experts[: len(i)]) for leaf, i in leaves]
    return [
        WrittenPlace(f"decoder.layers.{leaf}", (layer, *i), (model.num_layers, *experts[: len(i)]))
        for leaf, i in leaves
    ]


def _norm_names(name: str, layer: int, model: HfModel, leaves: list[Place]) -> list[Place]:
    """Which of a norm's names specs have for it: fused into a linear layer, and its own."""
    fused, own, is_latent = leaves[:-1], leaves[-1:], model.is_latent
    has_experts = model.has_experts(layer)
    if name.endswith(".input_layernorm.weight"):
        of_layer = "in_proj" if model.has_linear_attention(layer) else "linear_qkv"
        return own if is_latent else [leaf for leaf in fused if f".{of_layer}." in leaf[0]]
    if name.endswith(".pre_mlp_layernorm.weight"):
        if has_experts:
            return own if is_latent or model.is_hybrid else leaves
        return leaves if is_latent else fused
    return leaves


def _leaves(name: str) -> tuple[int | None, list[Place]]:
    """Layer of a parameter and its names within it, that of a fused norm first."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if not match:
        return None, [(name, ())]
    layer, leaf = int(match[1]), match[2]
    expert = _EXPERT.fullmatch(leaf)
    if expert:
        return layer, [(f"mlp.experts.experts.{expert[2]}", (int(expert[1]),))]
    fused = [name for name, norm in FUSED_NORMS.items() if norm == leaf]
    return layer, [(name, ()) for name in (*fused, leaf)]


def _stacked(layer: int, leaves: list[Place]) -> list[Place]:
    return [(f"decoder.layers.{leaf}", (layer, *index)) for leaf, index in leaves]


def _parts(names: Sequence[str]) -> list[str]:
    return [part for name in names for part in section_names(name)]


class TorchDistShards:
    """As ``LegacyShards``: every parameter is one shard, the whole of it.

    Raises:
        ValueError: naming the file: not torch_dist, damaged, missing or not trusted.
    """

    tp_size = 1

    def __init__(self, folder: Path, *, trust_pickle: bool) -> None:
        self.folder = folder
        self.reader = TorchDistReader(folder)
        self.common = self.reader.read_common(trust_pickle=trust_pickle)

    def __contains__(self, name: str) -> bool:
        return any(self._places(part) for part in section_names(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter.

        Raises:
            ValueError: naming the folder: parts that are no parts of one.
        """
        shapes = []
        for part in section_names(name):
            key, index = self._place(part)
            shapes.append(self.reader.tensors[key].shape[len(index) :])
        if len(shapes) == 1:
            return shapes[0]
        if not all(shape and shape[1:] == shapes[0][1:] for shape in shapes):
            raise ValueError(f"{self.folder}: parts of {name} are {shapes}; restore the checkpoint")
        return sum(shape[0] for shape in shapes), *shapes[0][1:]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which a parameter is stored.

        Raises:
            ValueError: naming the folder: parts of several.
        """
        keys = [self._place(part)[0] for part in section_names(name)]
        dtypes = dict.fromkeys(self.reader.tensors[key].dtype for key in keys)
        if len(dtypes) > 1:
            raise ValueError(
                f"{self.folder}: parts of {name} are stored as {', '.join(map(str, dtypes))}; save "
                "the model in one dtype"
            )
        return next(iter(dtypes))

    def read(self, name: str) -> list[Tensor]:
        """The parameter, as a list of one."""
        parts = [self.reader.read(*self._place(part)) for part in section_names(name)]
        return parts if len(parts) == 1 else [torch.cat(parts)]

    def file(self, name: str) -> Path:
        """A file in which (the first part of) a parameter lies."""
        key, index = self._place(section_names(name)[0])
        for chunk in self.reader.tensors[key].chunks:
            box = zip(index, chunk.offsets, chunk.sizes)
            if all(start <= i < start + size for i, start, size in box):
                return self.folder / chunk.file
        return self.folder

    def check_copies(self, names: Sequence[str]) -> None:
        """A parameter that lies in several places, a norm under both specs' keys, is one value.

        Raises:
            ValueError: naming the places that differ, or values that are not finite.
        """
        for name in _parts(names):
            first, *others = self._places(name) or [self._place(name)]
            for other in others:
                copies = self.reader.read(*first), self.reader.read(*other)
                if copies[0].dtype == copies[1].dtype:
                    # NaN differs from itself.
                    for copy in copies:
                        check_finite(copy, f"{self.file(name)}: tensor {name}")
                if not is_same(*copies):
                    raise ValueError(
                        f"{self.folder}: {name} is stored as {first[0]} (dtype {copies[0].dtype}) "
                        f"and as {other[0]} (dtype {copies[1].dtype}), and they differ; save the "
                        "model with one spec"
                    )

    def unread(self, names: Sequence[str]) -> list[str]:
        """What of the model lies beside the parameters ``names``.

        Raises:
            ValueError: naming file and key: an extra state that is not empty.
        """
        read: dict[str, set[tuple[int, ...]]] = {}
        for name in _parts(names):
            for key, index in self._places(name):
                read.setdefault(key, set()).add(index)
        unread = []
        for key, tensor in self.reader.tensors.items():
            if is_optimizer_state(key) or is_per_rank(key):
                continue
            if key not in read:
                unread.append(key)
                continue
            count, depth = len(read[key]), len(next(iter(read[key])))
            if count != math.prod(tensor.shape[:depth]):
                stacked = " x ".join(map(str, tensor.shape[:depth]))
                unread.append(f"{key} ({stacked} layers or experts, the configuration has {count})")
        return [*unread, *loose_tensors(self.common), *self._objects()]

    def _objects(self) -> Iterator[str]:
        """Objects that are no training state; an extra state must be empty."""
        for key in self.reader.objects:
            if is_optimizer_state(key) or is_per_rank(key) or key == COMMON_STATE:
                continue
            if is_extra_state(key):
                self.reader.read_object(key)
            else:
                yield key

    def _places(self, name: str) -> list[Place]:
        """Where a parameter is stored; several places hold copies."""
        found = []
        for key, index in torch_dist_places(name):
            stored = self.reader.tensors.get(key)
            if stored is None or len(index) > len(stored.shape):
                continue
            # An index beyond the end is a layer that was not saved.
            if all(i < size for i, size in zip(index, stored.shape)):
                found.append((key, index))
        return found

    def _place(self, name: str) -> Place:
        places = self._places(name)
        if not places:
            raise ValueError(f"{self.folder}: no tensor {torch_dist_places(name)[0][0]} for {name}")
        return places[0]
