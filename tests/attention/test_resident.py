"""Rows that attend to a resident prefix against the whole group in one row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pg import PrefixTree, pack_trees, prefix_grouped_attention
from megatron_pg.attention import ResidentKV
from megatron_pg.tree import ResidentSpans
from tests.utils import CPU_BACKENDS, assert_close

DIM = 8


@st.composite
def divided_groups(draw: st.DrawFn) -> list[tuple[int, list[list[int]], int]]:
    """Prefix length, suffix lengths of every row, and prefix row, of one to three groups."""
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        lens = st.lists(st.integers(1, 5), min_size=1, max_size=4)
        rows = [draw(lens) for _ in range(3)]
        groups.append((draw(st.integers(2, 7)), rows, draw(st.integers(0, 1))))
    return groups


def trees_of(groups):
    return [
        PrefixTree.from_group(prefix, [n for row in rows for n in row])
        for prefix, rows, _ in groups
    ]


def resident_call(groups, whole, inputs, douts, backend):
    """Outputs and gradients, by the whole row's tokens, from prefix rows and three suffix rows."""
    q, k, v = inputs
    outputs = [torch.full_like(x, float("nan")) for x in (q, q, k, v)]
    out, dq, dk, dv = outputs
    starts = whole.forest.segment_starts[whole.tree_segment_offsets[:-1]]
    # The prefix without its last token is resident; that token stands with the suffixes.
    members = [[g for g, group in enumerate(groups) if group[2] == row] for row in (0, 1)]
    index = [
        torch.cat([torch.arange(starts[g], starts[g] + groups[g][0] - 1) for g in row])
        if row
        else torch.empty(0, dtype=torch.int64)
        for row in members
    ]
    kept = [ResidentKV(k[i].clone(), v[i].clone()) for i in index]
    for number in range(3):
        trees, spans, places, offset = [], {}, [], 0
        for g, (prefix, rows, prefix_row) in enumerate(groups):
            lens = rows[number]
            tree = PrefixTree.from_group(prefix, lens).without_prefix(
                [prefix - 1] + [0] * len(lens)
            )
            before = sum(groups[m][0] - 1 for m in members[prefix_row] if m < g)
            spans.setdefault(prefix_row, []).append(
                (offset, offset + tree.unique_tokens, before, before + prefix - 1)
            )
            offset += tree.unique_tokens
            trees.append(tree)
            skipped = sum(map(sum, rows[:number]))
            first = starts[g] + prefix + skipped
            places += [starts[g] + prefix - 1, *range(first, first + sum(lens))]
        tables = {row: np.array(table) for row, table in sorted(spans.items())}
        layout = pack_trees(
            trees, 4, [ResidentSpans(row, t[:, :2], t[:, 2:]) for row, t in tables.items()]
        )
        place = torch.tensor(places)
        assert torch.equal(layout.position_ids[: len(place)], whole.position_ids[place])
        leaves = [x.new_zeros(layout.total_tokens, *x.shape[1:]) for x in inputs]
        for leaf, x in zip(leaves, inputs):
            leaf[: len(place)] = x[place]
            leaf.requires_grad_()
        row_out = prefix_grouped_attention(*leaves, layout, backend=backend, resident=kept)
        dout = torch.zeros_like(row_out)
        # The repeated token's output is the prefix's; its gradient enters once, with row 0.
        is_own = torch.ones(len(place), dtype=torch.bool)
        if number:
            is_own = ~torch.isin(place, torch.tensor(starts + [g[0] - 1 for g in groups]))
        dout[: len(place)][is_own] = douts[place[is_own]]
        row_out.backward(dout)
        out[place] = row_out.detach()[: len(place)]
        for total, leaf in zip((dq, dk, dv), leaves):
            assert leaf.grad is not None
            share = leaf.grad[: len(place)]
            total[place] = torch.where(total[place].isnan(), share, total[place] + share)
    prefix_rows = torch.cat(index)
    assert all(x[prefix_rows].isnan().all() for x in outputs), "prefix tokens stood in a row"
    for i, kv in zip(index, kept):
        if len(i):
            dk[i], dv[i] = kv.dk, kv.dv
    return outputs, prefix_rows


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=60, deadline=None)
@given(groups=divided_groups(), heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]))
def test_rows_equal_the_whole_group(backend, groups, heads) -> None:
    whole = pack_trees(trees_of(groups))
    num_heads, kv_heads = heads
    shapes = [(whole.total_tokens, h, DIM) for h in (num_heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    dout = torch.randn(shapes[0], dtype=torch.float64)
    got, prefix = resident_call(groups, whole, inputs, dout, backend)
    # In the whole row the prefix's own outputs have no gradient either: its row adds that part.
    masked = dout.clone()
    masked[prefix] = 0
    leaves = [x.clone().requires_grad_() for x in inputs]
    want = prefix_grouped_attention(*leaves, whole, backend="reference")
    want.backward(masked)
    others = torch.ones(whole.total_tokens, dtype=torch.bool)
    others[prefix] = False
    assert_close("out", got[0][others], want[others], 1e-12)
    assert_close("dq", got[1][others], leaves[0].grad[others], 1e-12)
    assert_close("dk", got[2], leaves[1].grad, 1e-12)
    assert_close("dv", got[3], leaves[2].grad, 1e-12)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_of_a_bf16_prefix_add_up_in_fp32(backend: str) -> None:
    tree = PrefixTree.from_group(5, [3]).without_prefix([4, 0])
    spans = ResidentSpans(0, np.array([[0, 4]]), np.array([[0, 4]]))
    layout = pack_trees([tree], 1, [spans])
    kept = ResidentKV(*torch.randn(2, 4, 1, DIM).bfloat16())
    for _ in range(3):
        q, k, v = torch.randn(3, 4, 1, DIM).bfloat16()
        q.requires_grad_()
        out = prefix_grouped_attention(q, k, v, layout, backend=backend, resident=[kept])
        out.float().sum().backward()
    assert kept.dk is not None and kept.dk.dtype == torch.float32
    assert kept.dk.abs().max() > 0 and kept.k.grad is None


def test_refusals() -> None:
    tree = PrefixTree.from_group(5, [3])
    with pytest.raises(ValueError, match="at least one token"):
        tree.without_prefix([5, 0])
    with pytest.raises(ValueError, match="only a root"):
        tree.without_prefix([1, 1])
    with pytest.raises(ValueError, match="lost its prefix already"):
        tree.without_prefix([1, 0]).without_prefix([1, 0])
    cut = tree.without_prefix([4, 0])
    with pytest.raises(ValueError, match="name for every root"):
        pack_trees([cut])
    with pytest.raises(ValueError, match="ascend from 0 without overlap"):
        ResidentSpans(0, np.array([[0, 2], [1, 3]]), np.array([[0, 2], [2, 4]]))
    with pytest.raises(ValueError, match="ascend from 0 without overlap"):
        ResidentSpans(0, np.array([[0, 4]]), np.array([[-4, 0]]))
    with pytest.raises(ValueError, match="reach to token 16 of a row of 4 tokens"):
        pack_trees([cut], 1, [ResidentSpans(0, np.array([[0, 16]]), np.array([[0, 1]]))])
    layout = pack_trees([cut], 1, [ResidentSpans(0, np.array([[0, 4]]), np.array([[0, 4]]))])
    row = torch.randn(4, 1, DIM)
    with pytest.raises(ValueError, match="1 resident prefix row"):
        prefix_grouped_attention(row, row, row, layout)
    short = ResidentKV(row[:3], row[:3])
    with pytest.raises(ValueError, match="sees 4 of its tokens"):
        prefix_grouped_attention(row, row, row, layout, resident=[short])
    with pytest.raises(ValueError, match="float32 values of shape"):
        prefix_grouped_attention(row, row, row, layout, resident=[ResidentKV(row, row[:3])])
