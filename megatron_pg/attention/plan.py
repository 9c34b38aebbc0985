"""Which queries meet which keys: the passes of one row, as integers on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..tree import IntArray, PackedLayout, join_chains


@dataclass(frozen=True, eq=False)
class Gather:
    """Copies from one source: ``gathered[places] = source[rows]``.

    Attributes:
        prefix_row: the source is this resident prefix row; None takes the row itself.
        rows: int64, may name a row several times.
        places: int64, each place of the gathered keys in one gather of a pass.
    """

    prefix_row: int | None
    rows: IntArray
    places: IntArray


@dataclass(frozen=True, eq=False)
class AttentionPass:
    """One varlen call over ``q[q_begin:q_end]`` and ``k, v[kv_begin:kv_end]``.

    Span i of the queries attends to span i of the keys and to nothing else. Spans ascend and do
    not overlap; tokens between spans take no part: what a kernel writes there is not read.

    Attributes:
        causal: whether query j of n sees keys up to j + m - n of m only: the last query all.
        q_begin, q_end, kv_begin, kv_end: slice of the row that the kernel gets.
        q_spans, kv_spans: ``[num_spans, 2]`` half-open, relative to the slices.
        prefix_row: the keys and values are those of this resident prefix row; None takes the row's.
        window: whether of these keys the last ``window + 1`` alone are seen; None hides none.
        gathers: the keys and values are these copies, whatever ``prefix_row`` says; empty where
            they are read where they lie.
    """

    causal: bool
    q_begin: int
    q_end: int
    kv_begin: int
    kv_end: int
    q_spans: IntArray
    kv_spans: IntArray
    prefix_row: int | None = None
    window: int | None = None
    gathers: tuple[Gather, ...] = ()

    @cached_property
    def attention_pairs(self) -> int:
        """Visible (q, kv) pairs of the pass."""
        q_len, kv_len = np.diff(self.q_spans)[:, 0], np.diff(self.kv_spans)[:, 0]
        if not self.causal:
            return int((q_len * kv_len).sum())
        most = np.inf if self.window is None else self.window + 1

        def below(num_keys: IntArray) -> IntArray:
            """Pairs of queries that would see 1, 2, ... num_keys keys without a window."""
            near = np.minimum(num_keys, most).astype(np.int64)
            far: IntArray = num_keys - near
            return near * (near + 1) // 2 + (far * near)

        return int((below(kv_len) - below(kv_len - q_len)).sum())


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """All passes of one row: causal within segments, one per ancestor depth, one per prefix row.

    Attributes:
        layout: the row the plan was made from.
        passes: the first covers every token that is no padding. They hold what a window hides, too:
            a backend leaves that out, or takes the one pass of ``windows.py`` in their place.
        window: as in ``AttentionKind``; None where it hides no key of the row.
    """

    layout: PackedLayout
    passes: tuple[AttentionPass, ...]
    window: int | None = None


def make_attention_plan(layout: PackedLayout, window: int | None = None) -> AttentionPlan:
    """Passes whose union is the layout's visibility, each visible pair in exactly one of them.

    A segment and its only child stand side by side and attend like one segment, so such chains are
    joined first: a group of one sample takes one pass. In pre-order a segment's descendants are
    the contiguous run ``[end, subtree_end)``. So pass 0 attends causally inside every segment, and
    pass d + 1 lets the descendants of every segment of depth d attend to all of it: ``1 + depth``
    passes, nothing gathered, no mask. Trees whose prefix is resident add one pass for each prefix
    row that they continue.

    Args:
        layout: the row.
        window: as in ``AttentionKind``.
    """
    forest = join_chains(layout.forest)
    starts, ends = forest.segment_starts, forest.segment_ends
    subtree_ends, depths = forest.segment_subtree_ends, forest.segment_depths
    own = np.stack([starts, ends], axis=1)
    passes = [_make_pass(True, own, own)]
    for depth in range(forest.depth):
        members = np.nonzero((depths == depth) & (subtree_ends > ends))[0]
        descendants = np.stack([ends[members], subtree_ends[members]], axis=1)
        passes.append(_make_pass(False, descendants, own[members]))
    for spans in layout.resident_spans:
        passes.append(_make_pass(False, spans.q_spans, spans.kv_spans, spans.row))
    hides = window is not None and window < layout.max_position
    return AttentionPlan(layout, tuple(passes), window if hides else None)


def _make_pass(
    causal: bool, q_spans: IntArray, kv_spans: IntArray, prefix_row: int | None = None
) -> AttentionPass:
    q_begin, kv_begin = int(q_spans[0, 0]), int(kv_spans[0, 0])
    return AttentionPass(
        causal=causal,
        q_begin=q_begin,
        q_end=int(q_spans[-1, 1]),
        kv_begin=kv_begin,
        kv_end=int(kv_spans[-1, 1]),
        q_spans=q_spans - q_begin,
        kv_spans=kv_spans - kv_begin,
        prefix_row=prefix_row,
    )
