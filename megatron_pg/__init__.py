"""megatron_pg: encode every token that samples share once, exactly."""

from .data import balance_groups, pack_groups
from .tree import PackedLayout, PrefixTree, pack_trees

__version__ = "0.1.0"

__all__ = [
    "PackedLayout",
    "PrefixTree",
    "balance_groups",
    "pack_groups",
    "pack_trees",
]
