"""What is shared: prefix trees and the packed row."""

from .layout import PackedLayout, pack_trees
from .mask import dense_mask
from .tree import PrefixTree

__all__ = ["PackedLayout", "PrefixTree", "dense_mask", "pack_trees"]
