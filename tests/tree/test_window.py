"""Rows beside prefixes of which only the last tokens are there see what they saw before."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg.tree import (
    ResidentSpans,
    dense_mask,
    pairs_within,
    reached_rows,
    resident_mask,
    within_window,
)
from tests.hostile import refused


def prefixes_and_row(rng: random.Random) -> tuple[list[PackedLayout], PackedLayout]:
    """Two prefix rows of up to three prompts, and a row that continues most of them."""
    lens = [[rng.randint(1, 9) for _ in range(rng.randint(1, 3))] for _ in range(2)]
    prefix_rows = [
        pack_trees([PrefixTree.from_sequences([[0] * n]) for n in row], pad_to_multiple=4)
        for row in lens
    ]
    trees, spans, start = [], [], 0
    for number, (row, prefix_row) in enumerate(zip(lens, prefix_rows)):
        table = []
        for i, n in enumerate(row):
            tree = PrefixTree.from_group(n + 1, [rng.randint(1, 5) for _ in range(2)])
            if rng.random() < 0.2:
                trees.append(tree)
            else:
                trees.append(tree.without_prefix([n, 0, 0]))
                kv_start = int(prefix_row.forest.segment_starts[i])
                table.append((start, start + trees[-1].unique_tokens, kv_start, kv_start + n))
            start += trees[-1].unique_tokens
        if table:
            bounds = np.array(table)
            spans.append(ResidentSpans(number, bounds[:, :2], bounds[:, 2:]))
    return prefix_rows, pack_trees(trees, 4, spans)


def test_visibility_is_the_same() -> None:
    rng, num_cut = random.Random(0), 0
    for _ in range(200):
        prefix_rows, layout = prefixes_and_row(rng)
        window = rng.randint(0, 10)
        rows = [reached_rows(row, window) for row in prefix_rows]
        cut = within_window(layout, window, prefix_rows)
        if cut is None:
            assert layout.forest.resident_lens is None or rows == [None, None]
            continue
        num_cut += 1
        assert torch.equal(dense_mask(cut, window), dense_mask(layout, window))
        for number, (prefix_row, kept) in enumerate(zip(prefix_rows, rows)):
            total = prefix_row.total_tokens
            whole = resident_mask(layout, number, total, window)
            kept = np.arange(total) if kept is None else kept
            assert torch.equal(resident_mask(cut, number, len(kept), window), whole[:, kept])
            # Nothing that is seen is left out.
            assert int(whole.sum()) == int(whole[:, kept].sum())
        assert cut.total_tokens == layout.total_tokens and cut.num_samples == layout.num_samples
    assert num_cut > 80


def test_pairs_are_those_of_the_mask() -> None:
    rng = random.Random(1)
    for _ in range(200):
        prefix_rows, layout = prefixes_and_row(rng)
        window = rng.choice([None, *range(12)])
        own = int(dense_mask(layout, window).sum()) - (layout.total_tokens - layout.unique_tokens)
        beside = sum(
            int(resident_mask(layout, number, row.total_tokens, window).sum())
            for number, row in enumerate(prefix_rows)
        )
        assert pairs_within(layout.forest, window) == own + beside


def test_what_is_reached() -> None:
    row = pack_trees([PrefixTree.from_sequences([[0] * n]) for n in (4, 1, 3)], pad_to_multiple=5)
    assert reached_rows(row, 2).tolist() == [2, 3, 4, 6, 7]
    assert reached_rows(row, 0).tolist() == []
    assert reached_rows(row, 4) is None and reached_rows(row, 3) is not None


@pytest.mark.parametrize("end", [3, 5])
def test_a_prefix_that_ends_inside_a_segment(end: int) -> None:
    prefix_row = pack_trees([PrefixTree.from_sequences([[0] * 6])])
    tree = PrefixTree.from_group(end + 1, [2, 3]).without_prefix([end, 0, 0])
    spans = ResidentSpans(0, np.array([[0, 6]]), np.array([[0, end]]))
    layout = pack_trees([tree], 1, [spans])
    assert within_window(layout, 6, [prefix_row]) is None
    with refused(f"ends at token {end} of prefix row 0, inside a segment", "a window of 2"):
        within_window(layout, 2, [prefix_row])
