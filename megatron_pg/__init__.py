"""megatron_pg: encode every token that samples share once, exactly."""

from .attention import available_backends, prefix_grouped_attention
from .data import balance_groups, pack_groups
from .tree import PackedLayout, PrefixTree, pack_trees

__version__ = "0.1.0"

__all__ = [
    "PackedLayout",
    "PrefixTree",
    "available_backends",
    "balance_groups",
    "pack_groups",
    "pack_trees",
    "prefix_grouped_attention",
]
