"""What is shared: prefix trees and the packed row."""

from .layout import PackedLayout, ResidentSpans, pack_trees
from .mask import dense_mask, resident_mask
from .tree import PrefixTree

__all__ = [
    "PackedLayout",
    "PrefixTree",
    "ResidentSpans",
    "dense_mask",
    "pack_trees",
    "resident_mask",
]
