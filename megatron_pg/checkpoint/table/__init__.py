"""Which rows of which Hugging Face tensors make up a shard of a Megatron parameter."""

from .rows import (
    EMBEDDING,
    HEAD,
    Row,
    columns,
    gated_mlp,
    grouped_qkv,
    joined,
    outputs,
    vocabulary,
    whole,
)
from .shards import (
    cast,
    check_finite,
    copy_into_shard,
    is_same,
    make_shard,
    merge_shards,
)
from .table import FUSED_NORMS, WeightTable

__all__ = [
    "EMBEDDING",
    "FUSED_NORMS",
    "HEAD",
    "Row",
    "WeightTable",
    "cast",
    "check_finite",
    "columns",
    "copy_into_shard",
    "gated_mlp",
    "grouped_qkv",
    "is_same",
    "joined",
    "make_shard",
    "merge_shards",
    "outputs",
    "vocabulary",
    "whole",
]
