"""Which rows of which Hugging Face tensors make up a shard of a Megatron parameter."""

from .pieces import Piece, Row, Shard
from .rows import (
    EMBEDDING,
    HEAD,
    columns,
    gated_expert,
    gated_mlp,
    gated_qkv,
    grouped_qkv,
    joined,
    outputs,
    vocabulary,
    whole,
)
from .shards import (
    Merger,
    cast,
    check_finite,
    copy_into_shard,
    is_same,
    make_shard,
    shifted,
)
from .table import FUSED_NORMS, RENAMED, WeightTable, section_names

__all__ = [
    "EMBEDDING",
    "FUSED_NORMS",
    "HEAD",
    "Merger",
    "Piece",
    "RENAMED",
    "Row",
    "Shard",
    "WeightTable",
    "cast",
    "check_finite",
    "columns",
    "copy_into_shard",
    "gated_expert",
    "gated_mlp",
    "gated_qkv",
    "grouped_qkv",
    "is_same",
    "joined",
    "make_shard",
    "outputs",
    "section_names",
    "shifted",
    "vocabulary",
    "whole",
]
