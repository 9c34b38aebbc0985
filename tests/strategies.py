"""Random trees and forests, as samples of a few distinct tokens so that much is shared."""

from __future__ import annotations

from hypothesis import strategies as st

from megatron_pg import PackedLayout, PrefixTree, pack_trees


@st.composite
def sample_lists(draw: st.DrawFn, max_depth: int = 5) -> list[list[int]]:
    """Samples of one group, built by forking: ragged, nested, some equal, some a prefix."""
    samples = [draw(st.lists(st.integers(0, 3), min_size=1, max_size=7))]
    for _ in range(draw(st.integers(0, 2 * max_depth))):
        stem = samples[draw(st.integers(0, len(samples) - 1))]
        fork = draw(st.integers(0, len(stem)))
        tail = draw(st.lists(st.integers(0, 3), min_size=0 if fork else 1, max_size=5))
        samples.append(stem[:fork] + tail)
    return draw(st.permutations(samples))


@st.composite
def forests(draw: st.DrawFn) -> tuple[PackedLayout, list[list[int]]]:
    """A padded row of one to three trees, and the written-out samples in its order."""
    trees, samples = [], []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            group = draw(sample_lists())
            trees.append(PrefixTree.from_sequences(group, draw(st.sampled_from([1, 1, 2, 4]))))
        else:
            prefix = draw(st.lists(st.integers(0, 9), min_size=1, max_size=9))
            suffixes = draw(
                st.lists(
                    st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=6
                )
            )
            group = [prefix + suffix for suffix in suffixes]
            trees.append(PrefixTree.from_group(len(prefix), [len(s) for s in suffixes]))
        samples += group
    return pack_trees(trees, draw(st.sampled_from([1, 1, 2, 8]))), samples
