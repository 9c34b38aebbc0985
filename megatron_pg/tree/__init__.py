"""What is shared: prefix trees and the packed row."""

from .checks import IntArray
from .layout import PackedLayout
from .mask import dense_mask, resident_mask
from .pack import pack_trees
from .resident import ResidentSpans
from .tree import PrefixTree
from .window import pairs_within, reached_rows, within_window

__all__ = [
    "IntArray",
    "PackedLayout",
    "PrefixTree",
    "ResidentSpans",
    "dense_mask",
    "pack_trees",
    "pairs_within",
    "reached_rows",
    "resident_mask",
    "within_window",
]
