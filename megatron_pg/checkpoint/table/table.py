"""One table: which rows of which Hugging Face tensors make up a shard of a Megatron parameter.

Reading, exporting and merging shards all follow from it, at any tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .rows import EMBEDDING, HEAD, Row, Shard

# Norms that Transformer Engine fuses into the linear layer behind them, in local-spec names.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


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

    def __contains__(self, name: str) -> bool:
        """Whether the model has a parameter; a tied output layer is the embedding again."""
        return name in self._rows or name == HEAD
