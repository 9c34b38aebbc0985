"""Which rows of which Hugging Face tensors make up a shard of a Megatron parameter."""

from .rows import (
    EMBEDDING,
    HEAD,
    Row,
    Shard,
    columns,
    gated_expert,
    gated_mlp,
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
)
from .table import FUSED_NORMS, WeightTable

__all__ = [
    "EMBEDDING",
    "FUSED_NORMS",
    "HEAD",
    "Merger",
    "Row",
    "Shard",
    "WeightTable",
    "cast",
    "check_finite",
    "columns",
    "copy_into_shard",
    "gated_expert",
    "gated_mlp",
    "grouped_qkv",
    "is_same",
    "joined",
    "make_shard",
    "outputs",
    "vocabulary",
    "whole",
]
