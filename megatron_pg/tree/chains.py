"""Segments that follow each other without a fork, as one."""

from __future__ import annotations

import numpy as np

from .tree import PrefixTree


def join_chains(tree: PrefixTree) -> PrefixTree:
    """The same tokens, visible to the same, with every only child joined to its parent.

    The turns of an agent are such a chain: a sample may end after each, but no path leaves it. A
    sample that ends at a segment ends inside a joined one, which is all that is lost. In pre-order
    an only child directly follows its parent, so every token stands where it stood.

    Args:
        tree: or the trees of a row as one.
    """
    parents = tree.segment_parents
    num_children = np.bincount(parents[parents >= 0], minlength=tree.num_segments)
    is_first = (parents < 0) | (num_children[parents] != 1)
    if is_first.all():
        return tree
    joined, first = np.cumsum(is_first) - 1, np.nonzero(is_first)[0]
    joined_parents = np.where(parents[first] < 0, -1, joined[parents[first]])
    return PrefixTree(
        segment_lens=np.add.reduceat(tree.segment_lens, first),
        segment_parents=joined_parents,
        sample_segments=joined[tree.sample_segments],
        resident_lens=None if tree.resident_lens is None else tree.resident_lens[first],
    )
