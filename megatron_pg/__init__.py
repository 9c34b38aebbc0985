"""megatron_pg: encode every token that samples share once, exactly."""

from .tree import PackedLayout, PrefixTree, pack_trees

__version__ = "0.1.0"

__all__ = [
    "PackedLayout",
    "PrefixTree",
    "pack_trees",
]
