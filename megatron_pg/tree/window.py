"""What a window leaves of a tree: its pairs, and what it reaches of resident prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .checks import BoolArray, IntArray
from .layout import PackedLayout
from .resident import ResidentSpans
from .tree import PrefixTree


def pairs_within(tree: PrefixTree, window: int | None, segments: BoolArray | None = None) -> int:
    """Visible (q, kv) pairs of a tree, of a window: ``min(position, window) + 1`` for every token.

    Args:
        tree: with or without a resident prefix.
        window: keys that a query sees before itself on its path; None sees all.
        segments: ``[num_segments]`` whose tokens are counted; None counts all.
    """
    pairs = tree.segment_pairs if window is None else _pairs_within(tree, window)
    return int((pairs if segments is None else pairs[segments]).sum())


def _pairs_within(tree: PrefixTree, window: int) -> IntArray:
    """``[num_segments]`` pairs of every segment's tokens."""

    def below(position: IntArray) -> IntArray:
        """Keys that all tokens before a position see before themselves."""
        reached = np.minimum(position, window)
        pairs: IntArray = reached * (reached - 1) // 2 + (position - reached) * window
        return pairs

    starts, lens = tree.segment_positions, tree.segment_lens
    return below(starts + lens) - below(starts) + lens


def reached_rows(prefix_row: PackedLayout, window: int) -> IntArray | None:
    """Packed indices that are seen from behind a segment's end: its last ``window``, ascending.

    None where that leaves nothing out.

    Args:
        prefix_row: keys and values of which stay while other rows attend to them.
        window: keys that a query sees before itself on its path.
    """
    lens = prefix_row.forest.segment_lens
    if window >= lens.max():
        return None
    reached = [np.arange(max(n - window, 0), n) for n in lens.tolist()]
    starts = prefix_row.forest.segment_starts
    return np.concatenate([start + rows for start, rows in zip(starts, reached)])


def within_window(
    layout: PackedLayout, window: int, prefix_rows: Sequence[PackedLayout]
) -> PackedLayout | None:
    """The row whose resident prefixes hold their ``reached_rows`` alone; None if they hold all.

    Attention under the window is the same for every token of it. Positions of a tree whose prefix
    is cut begin where the kept tokens do: their distances along a path are those of ``layout``.

    Args:
        layout: a row that continues resident prefixes.
        window: as in ``reached_rows``.
        prefix_rows: that ``layout.resident_spans`` name.

    Raises:
        ValueError: if a prefix ends inside a segment of its row, whose last tokens alone are kept.
    """
    resident_lens = layout.forest.resident_lens
    reached = [reached_rows(row, window) for row in prefix_rows]
    if resident_lens is None or all(rows is None for rows in reached):
        return None
    # A window of 0 sees none of them.
    spans = layout.resident_spans if window else ()
    return replace(
        layout,
        forest=replace(layout.forest, resident_lens=np.minimum(resident_lens, window)),
        resident_spans=tuple(_cut(s, window, reached[s.row]) for s in spans),
    )


def _cut(spans: ResidentSpans, window: int, reached: IntArray | None) -> ResidentSpans:
    """The last ``window`` tokens of every span of keys, by their places among those reached."""
    ends = spans.kv_spans[:, 1]
    starts = np.maximum(spans.kv_spans[:, 0], ends - window)
    if reached is None:
        return spans
    first, last = np.searchsorted(reached, starts), np.searchsorted(reached, ends)
    if (lost := last - first < ends - starts).any():
        raise ValueError(
            f"a resident prefix ends at token {ends[lost][0]} of prefix row {spans.row}, inside a "
            f"segment, of which layers with a window of {window} keep the last {window} tokens; "
            "let it end where the segment does"
        )
    return ResidentSpans(spans.row, spans.q_spans, np.stack([first, last], axis=1))
