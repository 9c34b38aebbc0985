"""Which queries meet which keys: the passes of one row, made once per microbatch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..tree import PackedLayout, PrefixTree

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SpanBatch:
    """Equal-length spans at equal distances: one batched kernel call."""

    num_spans: int
    q_start: int
    q_step: int
    q_len: int
    kv_start: int
    kv_step: int
    kv_len: int


@dataclass(frozen=True, eq=False)
class VarlenArguments:
    """What a varlen kernel takes: int32 ``cu_seqlens`` on the device, lengths on the host."""

    cu_seqlens_q: Tensor
    cu_seqlens_kv: Tensor
    max_seqlen_q: int
    max_seqlen_kv: int

    @property
    def bound_q(self) -> int:
        """A bound on the queries of a sequence, for FlashAttention-2.

        It takes 1 for decoding, where every sequence has one query, and swaps sequences and grouped
        heads; gaps have none.
        """
        return max(self.max_seqlen_q, 2)


@dataclass(frozen=True, eq=False)
class AttentionPass:
    """One varlen call over ``q[q_begin:q_end]`` and ``k, v[kv_begin:kv_end]``.

    Span i of the queries attends to span i of the keys and to nothing else. Spans ascend and do
    not overlap; tokens between spans take no part: what a kernel writes there is not read.

    Attributes:
        causal: whether query j of a span sees keys 0..j only (spans of equal length).
        q_begin, q_end, kv_begin, kv_end: slice of the row that the kernel gets.
        q_spans, kv_spans: ``[num_spans, 2]`` half-open, relative to the slices.
        device: where the kernel's integer arguments live.
        prefix_row: the keys and values are those of this resident prefix row; None takes the row's.
    """

    causal: bool
    q_begin: int
    q_end: int
    kv_begin: int
    kv_end: int
    q_spans: IntArray
    kv_spans: IntArray
    device: torch.device
    prefix_row: int | None = None

    @cached_property
    def q_rows(self) -> Tensor | None:
        """Rows of the query slice that lie in a span; None when all do."""
        return self._rows(self.q_spans, self.q_end - self.q_begin)

    @cached_property
    def kv_rows(self) -> Tensor | None:
        """Rows of the key slice that lie in a span; None when all do."""
        return self._rows(self.kv_spans, self.kv_end - self.kv_begin)

    @cached_property
    def attention_pairs(self) -> int:
        """Visible (q, kv) pairs of the pass."""
        q_len, kv_len = np.diff(self.q_spans)[:, 0], np.diff(self.kv_spans)[:, 0]
        return int((q_len * (q_len + 1) // 2 if self.causal else q_len * kv_len).sum())

    @cached_property
    def span_batches(self) -> tuple[SpanBatch, ...]:
        """The spans as few batches: neighbours of equal lengths and distances go together."""
        table = np.concatenate([self.q_spans, self.kv_spans], axis=1)
        lens = np.stack([table[:, 1] - table[:, 0], table[:, 3] - table[:, 2]], axis=1)
        steps = np.diff(table[:, (0, 2)], axis=0)
        batches, first = [], 0
        while first < len(table):
            last = first
            while (
                last + 1 < len(table)
                and (lens[last + 1] == lens[first]).all()
                and (steps[last] == steps[first]).all()
            ):
                last += 1
            q_step, kv_step = steps[first] if last > first else (0, 0)
            batches.append(
                SpanBatch(
                    num_spans=last - first + 1,
                    q_start=int(table[first, 0]),
                    q_step=int(q_step),
                    q_len=int(lens[first, 0]),
                    kv_start=int(table[first, 2]),
                    kv_step=int(kv_step),
                    kv_len=int(lens[first, 1]),
                )
            )
            first = last + 1
        return tuple(batches)

    @cached_property
    def varlen(self) -> VarlenArguments:
        """The spans as ``cu_seqlens``; gaps become sequences without keys or without queries.

        For q spans [2, 5), [9, 11) and kv spans [0, 2), [7, 9), relative to the slices, the
        cumulative lengths are q ``0 2 2 5 9 9 11`` and kv ``0 0 0 2 2 7 9``.
        """
        ends = [(0, 0)]
        for (q_start, q_end), (kv_start, kv_end) in zip(
            self.q_spans.tolist(), self.kv_spans.tolist()
        ):
            last_kv_end = ends[-1][1]
            ends += [(q_start, last_kv_end), (q_start, kv_start), (q_end, kv_end)]
        table = np.array(ends, dtype=np.int32)
        # Drop sequences that have neither queries nor keys.
        keep = np.append(True, (np.diff(table, axis=0) != 0).any(axis=1))
        table = table[keep]
        max_seqlen_q, max_seqlen_kv = np.diff(table, axis=0).max(axis=0).tolist()
        on_device = torch.from_numpy(table.T.copy()).to(self.device, non_blocking=True)
        return VarlenArguments(on_device[0], on_device[1], max_seqlen_q, max_seqlen_kv)

    def _rows(self, spans: IntArray, num_rows: int) -> Tensor | None:
        if np.diff(spans).sum() == num_rows:
            return None
        rows = np.concatenate([np.arange(start, end) for start, end in spans])
        return torch.from_numpy(rows).to(self.device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """All passes of one row: causal within segments, one per ancestor depth, one per prefix row.

    Attributes:
        layout: the row the plan was made from.
        passes: non-empty; the first covers every token that is no padding.
        device: where kernels' integer arguments live.
    """

    layout: PackedLayout
    passes: tuple[AttentionPass, ...]
    device: torch.device

    @property
    def unique_tokens(self) -> int:
        return self.layout.unique_tokens

    @cached_property
    def num_prefix_rows(self) -> int:
        """Resident prefix rows that attention needs at least."""
        rows = [p.prefix_row for p in self.passes if p.prefix_row is not None]
        return max(rows, default=-1) + 1


def make_attention_plan(layout: PackedLayout, device: torch.device | str = "cpu") -> AttentionPlan:
    """Passes whose union is the layout's visibility, each visible pair in exactly one of them.

    A segment and its only child stand side by side and attend like one segment, so such chains are
    joined first: a group of one sample takes one pass. In pre-order a segment's descendants are
    the contiguous run ``[end, subtree_end)``. So pass 0 attends causally inside every segment, and
    pass d + 1 lets the descendants of every segment of depth d attend to all of it: ``1 + depth``
    passes, nothing gathered, no mask. Trees whose prefix is resident add one pass for each prefix
    row that they continue.
    """
    device, forest = torch.device(device), _join_chains(layout.forest)
    starts, ends = forest.segment_starts, forest.segment_ends
    subtree_ends, depths = forest.segment_subtree_ends, forest.segment_depths
    own = np.stack([starts, ends], axis=1)
    passes = [_make_pass(True, own, own, device)]
    for depth in range(forest.depth):
        members = np.nonzero((depths == depth) & (subtree_ends > ends))[0]
        descendants = np.stack([ends[members], subtree_ends[members]], axis=1)
        passes.append(_make_pass(False, descendants, own[members], device))
    for spans in layout.resident_spans:
        passes.append(_make_pass(False, spans.q_spans, spans.kv_spans, device, spans.row))
    return AttentionPlan(layout, tuple(passes), device)


def _join_chains(forest: PrefixTree) -> PrefixTree:
    """The same visibility with every only child joined to its parent."""
    parents = forest.segment_parents
    num_children = np.bincount(parents[parents >= 0], minlength=forest.num_segments)
    is_first = (parents < 0) | (num_children[parents] != 1)
    if is_first.all():
        return forest
    # In pre-order an only child directly follows its parent.
    joined, first = np.cumsum(is_first) - 1, np.nonzero(is_first)[0]
    joined_parents = np.where(parents[first] < 0, -1, joined[parents[first]])
    return PrefixTree(
        segment_lens=np.add.reduceat(forest.segment_lens, first),
        segment_parents=joined_parents,
        sample_segments=joined[forest.sample_segments],
    )


def _make_pass(
    causal: bool,
    q_spans: IntArray,
    kv_spans: IntArray,
    device: torch.device,
    prefix_row: int | None = None,
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
        device=device,
        prefix_row=prefix_row,
    )
