"""The CPU kernel's split of causal spans: exact cover, exact merge, exact backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_pg import PackedLayout, PrefixTree, pack_trees, prefix_grouped_attention
from megatron_pg.attention import AttentionKind
from megatron_pg.attention.backends import cpu
from megatron_pg.attention.backends.cpu import CpuBackend
from megatron_pg.attention.backends.cpu_spans import (
    span_batches,
    split_causal_pass,
    split_windowed_pass,
)
from megatron_pg.attention.plan import AttentionPass
from megatron_pg.attention.windows import make_windowed_pass
from tests.strategies import forests
from tests.utils import assert_close

NAMES = ("out", "dq", "dk", "dv")
NEVER = 1 << 40


def causal_pass(lens: list[int], gap: int = 0) -> AttentionPass:
    starts = np.cumsum([0] + [n + gap for n in lens])[:-1]
    spans = np.stack([starts, starts + np.array(lens)], axis=1)
    end = int(spans[-1, 1])
    return AttentionPass(True, 0, end, 0, end, spans, spans)


def covered(parts: tuple[AttentionPass, ...]) -> Tensor:
    """How often each (q, kv) pair is computed."""
    rows = max(int(p.q_spans.max()) for p in parts)
    count = torch.zeros(rows, rows, dtype=torch.int64)
    for p in parts:
        for (qs, qe), (ks, ke) in zip(p.q_spans.tolist(), p.kv_spans.tolist()):
            pairs = torch.ones(qe - qs, ke - ks, dtype=torch.int64)
            count[qs:qe, ks:ke] += pairs.tril() if p.causal else pairs
    return count


@settings(max_examples=100)
@given(
    lens=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    gap=st.integers(0, 2),
    min_block=st.integers(1, 9),
)
def test_the_parts_cover_a_causal_pass_once(lens: list[int], gap: int, min_block: int) -> None:
    whole = causal_pass(lens, gap)
    parts = split_causal_pass(whole, min_block)
    assert torch.equal(covered(parts), covered((whole,)))
    assert [p.causal for p in parts] == [True] + [False] * (len(parts) - 1)
    on_diagonal = torch.zeros(whole.q_end)
    for start, end in parts[0].q_spans.tolist():
        on_diagonal[start:end] += 1
    assert int(on_diagonal.sum()) == sum(lens) and on_diagonal.max() == 1
    assert np.diff(parts[0].q_spans).max() <= 2 * min_block
    for p in parts:
        assert (p.q_spans[1:, 0] >= p.q_spans[:-1, 1]).all(), "spans ascend"
        assert (p.kv_spans[1:, 0] >= p.kv_spans[:-1, 1]).all(), "spans ascend"


def test_the_blocks_of_a_span() -> None:
    diagonal, neighbours, halves = split_causal_pass(causal_pass([16]), min_block=4)
    assert diagonal.q_spans.tolist() == [[0, 4], [4, 8], [8, 12], [12, 16]]
    assert neighbours.q_spans.tolist() == [[4, 8], [12, 16]]
    assert neighbours.kv_spans.tolist() == [[0, 4], [8, 12]]
    assert (halves.q_spans.tolist(), halves.kv_spans.tolist()) == ([[8, 16]], [[0, 8]])
    # Equal spans side by side stay one batched call a part.
    batched = split_causal_pass(causal_pass([16] * 3), min_block=4)
    assert [[b.num_spans for b in span_batches(p)] for p in batched] == [[12], [6], [3]]
    (whole,) = split_causal_pass(causal_pass([7]), min_block=4)
    assert whole.q_spans.tolist() == [[0, 7]]


def attend(layout: PackedLayout, inputs: list[Tensor], dout: Tensor, min_block: int, window=None):
    leaves = [x.detach().requires_grad_() for x in inputs]
    kind = AttentionKind(softmax_scale=0.37, window=window)
    backend = CpuBackend(min_block, min_block)
    out = prefix_grouped_attention(*leaves, layout, backend=backend, kind=kind)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def make_inputs(rows: int, heads: int, kv_heads: int) -> tuple[list[Tensor], Tensor]:
    """Strided views: heads of one projection side by side, as models have them."""
    mixed = torch.randn(rows, heads + 2 * kv_heads, 8, dtype=torch.float64)
    q, k, v = mixed.split([heads, kv_heads, kv_heads], dim=1)
    assert rows == 1 or not q.is_contiguous()
    return [2 * q, k, v], torch.randn(rows, heads, 8, dtype=torch.float64)


HEADS = [(4, 4), (4, 2), (6, 2), (3, 1)]


@settings(max_examples=50)
@given(
    forest=forests(),
    lens=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    heads=st.sampled_from(HEADS),
    min_block=st.integers(1, 5),
)
def test_split_spans_give_the_whole_ones_results(forest, lens, heads, min_block) -> None:
    """The whole spans' results are those of the written-out samples: see test_attention."""
    trees = [PrefixTree.from_group(lens[0], lens[1:])] if lens[1:] else []
    for layout in (forest[0], *(pack_trees([tree]) for tree in trees)):
        inputs, dout = make_inputs(layout.total_tokens, *heads)
        got = attend(layout, inputs, dout, min_block)
        for name, g, w in zip(NAMES, got, attend(layout, inputs, dout, NEVER)):
            assert_close(name, g, w, 1e-12)


@settings(max_examples=60)
@given(
    lens=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    heads=st.sampled_from(HEADS),
    min_block=st.integers(1, 5),
    window=st.sampled_from([0, 1, 2, 7, 20, 40]),
)
def test_blocks_of_a_window_equal_the_reference(lens, heads, min_block, window) -> None:
    """Blocks shorter than runs, and keys that several blocks share."""
    layout = pack_trees([PrefixTree.from_group(lens[0], lens[1:] or [3])], 8)
    inputs, dout = make_inputs(layout.total_tokens, *heads)
    leaves = [x.detach().requires_grad_() for x in inputs]
    kind = AttentionKind(softmax_scale=0.37, window=window)
    out = prefix_grouped_attention(*leaves, layout, backend="reference", kind=kind)
    want = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for name, g, w in zip(NAMES, attend(layout, inputs, dout, min_block, window), want):
        # A query that sees one key has no gradient: what is left is rounding of values near 1.
        assert_close(name, g, w, 1e-12, least_scale=1e-2)


def test_equal_blocks_of_a_window_are_one_call() -> None:
    layout = pack_trees([PrefixTree.from_group(64, [40] * 3)])
    blocks = split_windowed_pass(make_windowed_pass(layout, 8), 4)
    assert np.diff(blocks.kv_spans)[:3, 0].tolist() == [4, 8, 12]
    batches = span_batches(blocks)
    assert [(b.num_spans, b.q_len, b.kv_len) for b in batches] == [
        (1, 4, 4),
        (1, 4, 8),
        (24, 4, 12),
        (10, 4, 12),
        (10, 4, 12),
    ]
    assert [s.start for s in batches[2].pieces()] == [0, 4, 8]


@pytest.mark.parametrize("heads", HEADS)
def test_the_backend_splits_long_ragged_spans(heads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that are no multiple of a block, at the backend's own block length."""
    layout = pack_trees([PrefixTree.from_group(517, [258, 301, 301, 40])], pad_to_multiple=8)
    inputs, dout = make_inputs(layout.total_tokens, *heads)
    want = attend(layout, inputs, dout, NEVER)
    calls = []
    right = cpu._flash_forward
    monkeypatch.setattr(
        cpu, "_flash_forward", lambda *a, **kw: calls.append(a[4]) or right(*a, **kw)
    )
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = prefix_grouped_attention(*leaves, layout, 0.37, "cpu")
    for name, g, w in zip(NAMES, [out, *torch.autograd.grad(out, leaves, dout)], want):
        assert_close(name, g, w, 1e-12)
    assert calls.count(False) > 3, "rectangles were computed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parts_merge_in_fp32(dtype: torch.dtype) -> None:
    layout = pack_trees([PrefixTree.from_group(300, [90, 70])])
    inputs, dout = make_inputs(layout.total_tokens, 4, 2)
    inputs, dout = [x.to(dtype) for x in inputs], dout.to(dtype)
    exact = attend(layout, [x.double() for x in inputs], dout.double(), NEVER)
    whole, split = (attend(layout, inputs, dout, b) for b in (NEVER, 8))
    for name, w, s, e in zip(NAMES, whole, split, exact):
        assert s.dtype == dtype
        yardstick = (w.double() - e).abs().max()
        assert (s.double() - e).abs().max() <= 1.5 * yardstick > 0, name
