"""What is shared: prefix trees and the packed row."""

from .chains import join_chains
from .checks import BoolArray, IntArray
from .layout import PackedLayout
from .mask import dense_mask, resident_mask
from .pack import pack_trees
from .resident import ResidentSpans
from .staging import to_device
from .tree import PrefixTree
from .window import pairs_within, reached_rows, within_window

__all__ = [
    "BoolArray",
    "IntArray",
    "PackedLayout",
    "PrefixTree",
    "ResidentSpans",
    "dense_mask",
    "join_chains",
    "pack_trees",
    "pairs_within",
    "reached_rows",
    "resident_mask",
    "to_device",
    "within_window",
]
