"""Trees against brute force on small integers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from megatron_pg import PrefixTree
from tests.strategies import sample_lists


def written_out(tree: PrefixTree) -> list[list[int]]:
    """Samples of a tree with tokens, by walking its segments."""
    samples = []
    for end in tree.sample_segments:
        run: list[int] = []
        for segment in tree.segment_path(int(end)):
            run += tree.token_ids[
                tree.segment_starts[segment] : tree.segment_ends[segment]
            ].tolist()
        samples.append(run)
    return samples


def distinct_prefixes(samples: list[list[int]]) -> int:
    """Nodes of the token trie: what perfect sharing stores."""
    return len({tuple(s[:n]) for s in samples for n in range(1, len(s) + 1)})


@settings(max_examples=200)
@given(sample_lists())
def test_detection_shares_every_common_run(samples: list[list[int]]) -> None:
    tree = PrefixTree.from_sequences(samples)
    assert written_out(tree) == samples
    assert tree.unique_tokens == distinct_prefixes(samples)
    assert tree.logical_tokens == sum(map(len, samples))
    assert tree.sample_lens.tolist() == [len(s) for s in samples]
    # Compressed: an inner segment either forks or ends a sample.
    children = np.bincount(tree.segment_parents[tree.segment_parents >= 0], minlength=64)
    for segment in range(tree.num_segments):
        ends_here = segment in tree.sample_segments
        assert children[segment] != 1 or ends_here


@settings(max_examples=200)
@given(sample_lists())
def test_short_runs_are_written_out(samples: list[list[int]]) -> None:
    for min_shared in (2, 3, 5):
        tree = PrefixTree.from_sequences(samples, min_shared=min_shared)
        assert written_out(tree) == samples
        children = Counter(tree.segment_parents.tolist())
        for fork in (s for s in range(tree.num_segments) if children[s] > 1):
            run, above = int(tree.segment_lens[fork]), int(tree.segment_parents[fork])
            while above >= 0 and children[above] == 1:
                run, above = run + int(tree.segment_lens[above]), int(tree.segment_parents[above])
            assert run >= min_shared


@pytest.mark.parametrize(("min_shared", "unique"), [(1, 4), (2, 4), (3, 1 + 2 + 3 + 3)])
def test_a_run_counts_from_the_last_fork(min_shared: int, unique: int) -> None:
    """Two tokens are shared before samples part, though a sample ends between them."""
    samples = [[1], [1, 2], [1, 2, 3], [1, 2, 4]]
    tree = PrefixTree.from_sequences(samples, min_shared=min_shared)
    assert written_out(tree) == samples and tree.unique_tokens == unique


@settings(max_examples=100)
@given(sample_lists())
def test_turns_of_one_context_stand_in_it_once(samples: list[list[int]]) -> None:
    """Where no samples part, each being the start of the longest, all is shared."""
    longest = max(samples, key=len)
    turns = [longest[:n] for n in (1, len(longest) // 2 + 1, len(longest), len(longest))]
    tree = PrefixTree.from_sequences(turns, min_shared=100)
    assert written_out(tree) == turns and tree.unique_tokens == len(longest)


@settings(max_examples=100)
@given(sample_lists())
def test_derived_quantities_equal_brute_force(samples: list[list[int]]) -> None:
    tree = PrefixTree.from_sequences(samples)
    for segment in range(tree.num_segments):
        path = tree.segment_path(segment)
        assert tree.segment_depths[segment] == len(path) - 1
        assert tree.segment_positions[segment] == tree.segment_lens[path[:-1]].sum()
        below = [s for s in range(tree.num_segments) if segment in tree.segment_path(s)]
        assert below == list(range(segment, segment + len(below))), "a subtree is contiguous"
        assert tree.segment_subtree_ends[segment] == tree.segment_ends[below[-1]]
        users = sum(segment in tree.segment_path(int(end)) for end in tree.sample_segments)
        assert tree.segment_multiplicity[segment] == users
    pairs = {
        (tuple(s[: q + 1]), tuple(s[: k + 1]))
        for s in samples
        for q in range(len(s))
        for k in range(q + 1)
    }
    assert tree.attention_pairs == len(pairs)
    assert tree.logical_attention_pairs == sum(len(s) * (len(s) + 1) // 2 for s in samples)


def test_group() -> None:
    tree = PrefixTree.from_group(5, [3, 2])
    assert tree.segment_lens.tolist() == [5, 3, 2]
    assert tree.segment_parents.tolist() == [-1, 0, 0]
    assert tree.sample_segments.tolist() == [1, 2]
    assert (tree.depth, tree.num_samples, tree.unique_tokens, tree.logical_tokens) == (1, 2, 10, 15)


def test_group_of_one_and_equal_sequences() -> None:
    assert PrefixTree.from_group(1, [1]).logical_tokens == 2
    tree = PrefixTree.from_sequences([[1, 2], [1, 2], [1]])
    assert tree.segment_lens.tolist() == [1, 1]
    assert tree.sample_segments.tolist() == [1, 1, 0]
    assert tree.segment_multiplicity.tolist() == [3, 2]


def test_sequences_may_differ_from_the_first_token() -> None:
    tree = PrefixTree.from_sequences([[1, 2], [3], [1, 4]])
    assert tree.segment_parents.tolist().count(-1) == 2
    assert written_out(tree) == [[1, 2], [3], [1, 4]]


def test_sequences_as_arrays_and_tensors() -> None:
    lists = [[1, 2, 3], [1, 2, 4]]
    for convert in (np.array, torch.tensor, tuple):
        tree = PrefixTree.from_sequences([convert(s) for s in lists])
        assert written_out(tree) == lists


def test_deep_chain_does_not_recurse() -> None:
    # Python's own limit is 1000.
    tree = PrefixTree.from_sequences([list(range(n)) for n in range(1, 1200)])
    assert tree.depth == 1198 and tree.unique_tokens == 1199


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefixTree.from_group(0, [1]), "prefix_len=0 must be at least 1"),
        (lambda: PrefixTree.from_group(-3, [1]), "prefix_len=-3"),
        (lambda: PrefixTree.from_group(2, []), "suffix_lens is empty"),
        (lambda: PrefixTree.from_group(2, [1, 0]), r"suffix_lens\[1\]=0"),
        (lambda: PrefixTree.from_group(2, [1, -1]), r"suffix_lens\[1\]=-1"),
        (lambda: PrefixTree.from_group(2.0, [1]), "prefix_len must be an integer"),
        (lambda: PrefixTree.from_group(True, [1]), "prefix_len must be an integer"),
        (lambda: PrefixTree.from_sequences([]), "sequences is empty"),
        (lambda: PrefixTree.from_sequences([[1], []]), r"sequences\[1\] is empty"),
        (lambda: PrefixTree.from_sequences([[1.5]]), "run of integers"),
        (lambda: PrefixTree.from_sequences([[[1]]]), "one-dimensional"),
        (lambda: PrefixTree.from_sequences([[1]], min_shared=0), "min_shared=0"),
        (lambda: PrefixTree([], [], []), "at least one segment"),
        (lambda: PrefixTree([1], [-1], []), "at least one segment and one sample"),
        (lambda: PrefixTree([1, 1], [-1], [0]), "1 segment_parents for 2"),
        (lambda: PrefixTree([1, 0], [-1, 0], [1]), r"segment_lens\[1\]=0"),
        (lambda: PrefixTree([1, 1], [-1, 1], [1]), "index of an earlier segment"),
        (lambda: PrefixTree([1, 1], [-1, 0], [2]), r"sample_segments must lie in \[0, 2\)"),
        (lambda: PrefixTree([1, 1, 1, 1], [-1, 0, 0, 1], [2, 3]), "pre-order"),
        (lambda: PrefixTree([1, 1, 1], [-1, 0, 0], [1]), "path of no sample"),
        (lambda: PrefixTree([2], [-1], [0], np.array([1])), "1 token_ids for 2 tokens"),
        (lambda: PrefixTree([[1]], [-1], [0]), "one dimension"),
    ],
)
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_arrays_are_frozen() -> None:
    tree = PrefixTree.from_group(2, [1])
    with pytest.raises(ValueError, match="read-only"):
        tree.segment_lens[0] = 7
