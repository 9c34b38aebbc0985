"""Several trees side by side in one row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .checks import as_length, as_list
from .layout import PackedLayout
from .resident import ResidentSpans, joined_resident_lens
from .tree import PrefixTree


def pack_trees(
    trees: Sequence[PrefixTree],
    pad_to_multiple: int = 1,
    resident_spans: Sequence[ResidentSpans] = (),
) -> PackedLayout:
    """Lay several trees in one row, in the order given, padded at the tail.

    Args:
        trees: at least one tree. Trees never share tokens with each other.
        pad_to_multiple: the row's length becomes a multiple of this (tp_size under sequence
            parallelism).
        resident_spans: for trees ``without_prefix``, where their prefixes stand.

    Raises:
        ValueError: on no trees, ``pad_to_multiple < 1``, or resident spans that do not belong to
            the trees.
    """
    as_length("pad_to_multiple", pad_to_multiple)
    if isinstance(trees, PrefixTree):
        raise ValueError("trees is one PrefixTree; pass a list of trees")
    trees = as_list("trees", trees)
    if not trees:
        raise ValueError("trees is empty: a row needs at least one tree")
    for i, tree in enumerate(trees):
        if not isinstance(tree, PrefixTree):
            raise ValueError(f"trees[{i}] is {type(tree).__name__}; make a PrefixTree of it")
    segment_offsets = np.cumsum([0] + [tree.num_segments for tree in trees])
    sample_offsets = np.cumsum([0] + [tree.num_samples for tree in trees])
    parents = np.concatenate([tree.segment_parents for tree in trees])
    shift = np.repeat(segment_offsets[:-1], np.diff(segment_offsets))
    tokens = [tree.token_ids for tree in trees]
    forest = PrefixTree(
        segment_lens=np.concatenate([tree.segment_lens for tree in trees]),
        segment_parents=np.where(parents >= 0, parents + shift, -1),
        sample_segments=np.concatenate([tree.sample_segments for tree in trees])
        + np.repeat(segment_offsets[:-1], np.diff(sample_offsets)),
        token_ids=None if any(t is None for t in tokens) else np.concatenate(tokens),  # type: ignore[arg-type]
        resident_lens=joined_resident_lens(trees),
    )
    total_tokens = -(-forest.unique_tokens // pad_to_multiple) * pad_to_multiple
    as_length("total_tokens", total_tokens)
    return PackedLayout(
        forest, segment_offsets, sample_offsets, total_tokens, tuple(resident_spans)
    )
