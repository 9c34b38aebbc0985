"""One table: which rows of which Hugging Face tensors make up a shard of a Megatron parameter.

Reading, exporting and merging shards all follow from it, at any tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .pieces import Row, Shard
from .rows import EMBEDDING, HEAD

# Norms that Transformer Engine fuses into the linear layer behind them, in local-spec names.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mixer.in_proj.layer_norm_weight": "norm.weight",
}
# Parameters that core 0.19 calls otherwise; checkpoints do not.
RENAMED = {f"mixer.conv1d_{kind}": f"mixer.conv1d.{kind}" for kind in ("weight", "bias")}

# Parameters that torch_dist stores block by block, each under its parameter's name and its own.
SECTIONS = {
    "self_attention.in_proj.weight": ("query", "key", "value", "z", "beta", "alpha"),
    "self_attention.conv1d.weight": ("query", "key", "value"),
    "mixer.in_proj.weight": ("z", "x", "B", "C", "dt"),
    "mixer.conv1d.weight": ("x", "B", "C"),
    "mixer.conv1d.bias": ("x", "B", "C"),
}


def section_names(name: str) -> list[str]:
    """Names under which torch_dist stores a parameter."""
    leaf = name.split(".", 3)[-1] if name.startswith("decoder.layers.") else name
    return [f"{name}.{section}" for section in SECTIONS[leaf]] if leaf in SECTIONS else [name]


class WeightTable:
    """The table of one model.

    Args:
        rows: every parameter of the whole ``GPTModel``, in model order.
        architecture: named in errors.
    """

    def __init__(self, rows: Iterable[Row], architecture: str) -> None:
        self._rows = {row.name: row for row in rows}
        self._architecture = architecture

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the Hugging Face folder, in the order in which it is written."""
        return {name: shape for row in self._rows.values() for name, shape in row.shapes.items()}

    def megatron_names(self) -> list[str]:
        """Every parameter of the whole ``GPTModel``, in local-spec names; a tied head is none."""
        return list(self._rows)

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a parameter that models keep in one of its own; None for all others."""
        row = self._rows.get(name)
        return None if row is None else row.dtype

    def hf_dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Every tensor's dtype in a folder of weights in ``dtype``."""
        return {key: row.dtype or dtype for row in self._rows.values() for key in row.shapes}

    def shifts(self) -> dict[str, float]:
        """Tensors to whose values something is added in their parameter, and what."""
        pieces = (piece for row in self._rows.values() for block in row.blocks for piece in block)
        return {piece.name: piece.shift for piece in pieces if piece.shift}

    def shard(self, name: str, tp_rank: int = 0, tp_size: int = 1) -> Shard:
        """The shard of a parameter (local-spec name, layer and expert numbered globally).

        Raises:
            ValueError: a parameter that this architecture does not have, or sizes that
                ``tp_size`` does not divide.
        """
        if name not in self:
            raise ValueError(f"this {self._architecture} has no parameter {name}")
        row = self._rows.get(name) or self._rows[EMBEDDING]
        return row.shard(tp_rank, tp_size)

    def sections(self, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A whole parameter as torch_dist stores it: its blocks, by ``section_names``."""
        names = section_names(name)
        if len(names) == 1:
            yield name, whole
            return
        yield from zip(names, whole.split(self._rows[name].block_lengths), strict=True)

    def __contains__(self, name: str) -> bool:
        """Whether the model has a parameter; a tied output layer is the embedding again."""
        return name in self._rows or name == HEAD
