"""Depth-major order, halos and batches against paths that are written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg.linear import CHUNK_TOKENS, Copies, of_layout
from tests.linear.rows import an_agent, random_row
from tests.strategies import forests


def paths(layout: PackedLayout) -> list[list[int]]:
    """Packed indices of every segment's path, the segment included."""
    forest = layout.forest
    spans = list(zip(forest.segment_starts.tolist(), forest.segment_ends.tolist()))
    return [
        [t for s in forest.segment_path(segment) for t in range(*spans[s])]
        for segment in range(forest.num_segments)
    ]


@settings(max_examples=100)
@given(forests(), st.integers(2, 5), st.booleans())
def test_every_segment_stands_behind_its_path(
    forest: tuple[PackedLayout, list[list[int]]], width: int, keeps_states: bool
) -> None:
    layout, _ = forest
    forks, halo = of_layout(layout, width, keeps_states=keeps_states), width - 1
    tokens, inputs = forks.tokens.tolist(), forks.inputs.tolist()
    assert sorted(tokens) == list(range(layout.unique_tokens))
    assert [inputs[place] for place in forks.places.tolist()] == tokens
    missing = dict(zip(forks.missing.tolist(), forks.history.tolist()))
    ends = {path[-1]: path for path in paths(layout)}
    begin = 0
    for depth in forks.depths:
        bounds = (begin + depth.cu_seqlens).tolist()
        assert (bounds[0], bounds[-1]) == (depth.begin, depth.end)
        seen: list[int] = []
        for first, last in zip(bounds, bounds[1:]):
            path = ends[tokens[last - 1]]
            length = last - first
            assert path[-length:] == tokens[first:last]
            before = path[:-length][-halo:]
            start = int(forks.places[first]) - halo
            found = [None if start + i in missing else inputs[start + i] for i in range(halo)]
            assert found == [None] * (halo - len(before)) + before
            own = [c for s, c in depth.chunks.tolist() if s == len(seen)]
            assert own == list(range(-(-length // CHUNK_TOKENS)))
            seen.append(first)
            # Histories end where the path begins.
            root = forks.roots.index(int(layout.segment_ids[path[0]]))
            rows = [missing[start + i] for i in range(halo - len(before))]
            assert rows == [root * halo + len(before) + i for i in range(len(rows))]
        begin = depth.end


@settings(max_examples=100)
@given(forests(), st.booleans())
def test_states_come_from_parents(
    forest: tuple[PackedLayout, list[list[int]]], keeps_states: bool
) -> None:
    layout, _ = forest
    parent_of = layout.forest.segment_parents
    forks = of_layout(layout, 4, keeps_states=keeps_states)
    above: list[int] = []
    for depth in forks.depths:
        bounds = depth.begin + depth.cu_seqlens
        first, last = (
            layout.segment_ids[forks.tokens[at]].tolist() for at in (bounds[:-1], bounds[1:] - 1)
        )
        parents = parent_of[first].tolist()
        if depth.parents is None:
            assert set(parents) == {-1} and tuple(first) == forks.roots
        else:
            assert [above[i] for i in depth.parents.rows.tolist()] == parents
        above = last
        assert depth.is_continued == bool(np.isin(above, parent_of).any())
        if keeps_states:
            assert first == last
        # Otherwise nothing is a scan of its own that continues what has no other way on.
        elif depth.parents is not None:
            assert min(np.bincount(parent_of[parent_of >= 0])[parents]) > 1


def test_turns_of_an_agent_are_as_many_scans_as_its_branches() -> None:
    layout = an_agent(20, 11)
    assert layout.forest.depth == 19
    joined, kept = (of_layout(layout, 4, keeps_states=keeps) for keeps in (False, True))
    assert [depth.lens for depth in joined.depths] == [(36,), (24, 3)]
    assert [len(depth.lens) for depth in kept.depths] == [1] * 12 + [2] + [1] * 7
    # One halo each.
    assert len(joined.halo_places) == 3 * 3 and len(kept.halo_places) == 21 * 3


@pytest.mark.parametrize("seed", range(6))
def test_batches_hold_every_segment_once_and_pad_little(seed: int) -> None:
    layout = random_row(seed, longest=900)
    num_padded = num_batches = 0
    for depth in of_layout(layout, 4).depths:
        tokens = torch.arange(1, depth.end - depth.begin + 1)
        parts = tokens.split([batch.num_tokens for batch in depth.batches])
        padded_parts = [batch.pad(part) for batch, part in zip(depth.batches, parts)]
        unpadded = [b.unpad(padded) for b, padded in zip(depth.batches, padded_parts)]
        assert torch.equal(torch.cat(unpadded), tokens)
        found = [n for padded in padded_parts for n in (padded > 0).sum(1).tolist()]
        assert tuple(found) == depth.lens
        left = list(depth.lens)
        for batch, padded in zip(depth.batches, padded_parts):
            lens, left = left[: batch.shape[0]], left[batch.shape[0] :]
            num_batches += 1
            num_padded += batch.places is not None
            assert int((padded > 0).sum()) == sum(lens) and padded.shape[1] == max(lens)
            chunks = [-(-n // CHUNK_TOKENS) for n in lens]
            assert max(chunks) <= 1.25 * min(chunks)
    assert num_padded and num_padded < num_batches


def test_batches_grow_with_lengths_and_not_with_segments() -> None:
    lens = [1 + i % 500 for i in range(2000)]
    forks = of_layout(pack_trees([PrefixTree.from_group(70, lens)]), 4)
    assert [len(depth.batches) for depth in forks.depths] == [1, 6]


def test_made_once_a_row_and_width() -> None:
    layout = random_row(0)
    assert of_layout(layout, 4) is of_layout(layout, 4, "cpu")
    assert of_layout(layout, 4) is not of_layout(layout, 4, keeps_states=True)
    assert of_layout(layout, 3) is not of_layout(layout, 4)


def test_a_width_that_mixes_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width=1.*at least 2"):
        of_layout(random_row(0), 1)


def test_copies_are_summed_in_fp32() -> None:
    copies = Copies.of(np.array([2, 0, 2] + [5] * 300))
    source = torch.zeros(6, 2, dtype=torch.bfloat16, requires_grad=True)
    taken = copies.take(source)
    assert torch.equal(taken, source[copies.rows])
    grads = torch.full((303, 2), 1.0, dtype=torch.bfloat16)
    taken.backward(grads)
    # Ones in bf16 add up to 256 and no further.
    want = torch.tensor([1, 0, 2, 0, 0, 300.0]).bfloat16()
    assert source.grad is not None and torch.equal(source.grad[:, 0], want)
    assert copies.sums(grads).dtype == torch.float32


def test_a_row_is_evaluated_first_and_trained_then() -> None:
    layout = random_row(1)
    with torch.inference_mode():
        batches = [batch for depth in of_layout(layout, 4).depths for batch in depth.batches]
    assert any(batch.places is not None for batch in batches)
    assert not any(x.is_inference() for batch in batches if (x := batch.places) is not None)
