"""Chains of only children as one segment: what every token sees stays as it is."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg.tree import dense_mask, join_chains
from tests.strategies import forests


@settings(max_examples=100)
@given(forests())
def test_tokens_stay_and_see_the_same(forest: tuple[PackedLayout, list[list[int]]]) -> None:
    layout, _ = forest
    joined = join_chains(layout.forest)
    parents = joined.segment_parents
    assert joined.unique_tokens == layout.unique_tokens and joined.depth <= layout.forest.depth
    # Nobody is alone any more.
    assert not (np.bincount(parents[parents >= 0]) == 1).any()
    assert torch.equal(
        dense_mask(pack_trees([joined])),
        dense_mask(layout)[: layout.unique_tokens, : layout.unique_tokens],
    )
    row = pack_trees([joined])
    assert torch.equal(row.predictor_of, layout.predictor_of[: layout.unique_tokens])


def test_a_tree_without_chains_is_itself() -> None:
    tree = PrefixTree.from_group(3, [2, 1])
    assert join_chains(tree) is tree


def test_what_is_resident_before_a_root_stays_before_the_joined_one() -> None:
    tree = PrefixTree(np.array([4, 2, 5]), np.array([-1, 0, 1]), np.array([0, 2]))
    joined = join_chains(tree.without_prefix([3, 0, 0]))
    assert joined.segment_lens.tolist() == [8] and joined.sample_segments.tolist() == [0, 0]
    assert joined.resident_lens is not None and joined.resident_lens.tolist() == [3]
    assert joined.segment_positions.tolist() == [3]
