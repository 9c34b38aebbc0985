"""A windowed row as one varlen call: runs of queries, and the keys gathered for each."""

from __future__ import annotations

import numpy as np

from ..tree import IntArray, PackedLayout
from .plan import AttentionPass, Gather


def make_windowed_pass(layout: PackedLayout, window: int) -> AttentionPass:
    """All visible pairs of a row under a window, in one causal pass that needs no merge.

    A run is a segment with its first child, that one's first child and so on: they stand side by
    side and attend like one sequence. Runs tile the row. The keys of a run are its context, the
    last ``min(window, position)`` tokens of its path before it, and then its own; of a resident
    prefix that is no more than its last ``window`` tokens. Contexts of siblings are copies, since
    spans of a varlen call cannot share keys. With its own tokens last, every run takes the same
    causal window.

    Example: a prompt ``p0 .. p9``, responses a and b of two tokens, ``window=3``::

        runs      p0 .. p9 a0 a1   b0 b1
        contexts  none             p7 p8 p9
    """
    forest = layout.forest
    starts, ends, parents = forest.segment_starts, forest.segment_ends, forest.segment_parents
    begins_run = (parents < 0) | (ends[parents] != starts)
    heads = np.nonzero(begins_run)[0]
    run_starts = starts[heads]
    run_ends = np.append(run_starts[1:], layout.unique_tokens)
    # Of every piece of keys: run, source (0 is the row), first row, length. A run's own come last.
    pieces = [_columns(np.arange(len(heads)), 0, run_starts, run_ends - run_starts)]
    left = np.minimum(window, forest.segment_positions[heads])
    runs, above = np.arange(len(heads)), heads
    while True:
        root, above = above, parents[above]
        is_inside = (left > 0) & (above >= 0)
        outside = (left > 0) & (above < 0)
        if outside.any():
            pieces.append(_resident_pieces(layout, runs[outside], root[outside], left[outside]))
        if not is_inside.any():
            break
        runs, above, left = runs[is_inside], above[is_inside], left[is_inside]
        taken = np.minimum(left, forest.segment_lens[above])
        pieces.append(_columns(runs, 0, ends[above] - taken, taken))
        left = left - taken
    # Later pieces stand higher in the tree, so before the others of their run.
    table = np.concatenate(pieces[::-1])
    table = table[np.argsort(table[:, 0], kind="stable")]
    return _gathered_pass(table, np.stack([run_starts, run_ends], axis=1), window)


def _resident_pieces(
    layout: PackedLayout, runs: IntArray, roots: IntArray, lens: IntArray
) -> IntArray:
    """The last tokens of the resident prefixes that ``roots`` continue; source 1 + prefix row."""
    table = np.concatenate(
        [_columns(s.q_spans[:, 0], s.row, s.kv_spans[:, 1]) for s in layout.resident_spans]
    )
    table = table[np.argsort(table[:, 0])]
    found = table[np.searchsorted(table[:, 0], layout.forest.segment_starts[roots])]
    return _columns(runs, 1 + found[:, 1], found[:, 2] - lens, lens)


def _gathered_pass(pieces: IntArray, run_spans: IntArray, window: int) -> AttentionPass:
    runs, sources, first_rows, lens = pieces.T
    num_keys = int(lens.sum())
    kv_ends = np.cumsum(np.bincount(runs, lens, len(run_spans)).astype(np.int64))
    shift = np.repeat(first_rows - (np.cumsum(lens) - lens), lens)
    rows, source_of = np.arange(num_keys) + shift, np.repeat(sources, lens)
    gathers = []
    for source in np.unique(sources).tolist():
        places = np.nonzero(source_of == source)[0]
        gathers.append(Gather(source - 1 if source else None, rows[places], places))
    return AttentionPass(
        causal=True,
        q_begin=0,
        q_end=int(run_spans[-1, 1]),
        kv_begin=0,
        kv_end=num_keys,
        q_spans=run_spans,
        kv_spans=np.stack([np.append(0, kv_ends[:-1]), kv_ends], axis=1),
        window=window,
        gathers=tuple(gathers),
    )


def _columns(*columns: IntArray | int) -> IntArray:
    return np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.int64)
