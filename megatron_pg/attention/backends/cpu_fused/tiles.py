"""Tiles of queries and the keys they see, as the tables that the C++ operators read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ....tree import IntArray
from ...plan import AttentionPass, AttentionPlan

# As in tree_attention.cpp: most queries of a tile, rows of a product, most lanes of a vector.
TILE_ROWS, PRODUCT_ROWS, LANES = 132, 6, 16
# Of the widest panel, a multiple of all others.
PANEL_KEYS = 64
# The first key that a query sees where no window hides any.
_SEES_ALL = -(1 << 40)


@dataclass(frozen=True, eq=False)
class Tiles:
    """What the operators get for one plan.

    Attributes:
        tables: int64 tiles, ranges and panel spans: the structs of tree_attention.cpp.
        prefix_rows: the resident prefix row of source 1, 2, ...; source 0 is the row itself.
        unique_tokens: rows before padding, which no tile holds.
    """

    tables: tuple[Tensor, Tensor, Tensor]
    prefix_rows: tuple[int, ...]
    unique_tokens: int


@dataclass(frozen=True, eq=False)
class _KeySpans:
    """Spans of one source, where their panels begin, and each first key's logical position."""

    source: int
    spans: IntArray
    panel_starts: IntArray
    positions: IntArray

    @classmethod
    def of(cls, source: int, spans: IntArray, positions: IntArray) -> _KeySpans:
        widths = -(-np.diff(spans)[:, 0] // LANES) * LANES
        return cls(source, spans, np.cumsum(widths) - widths, positions)

    def panel_spans(self) -> IntArray:
        starts, ends = self.spans.T
        return _columns(self.source, starts, ends - starts, self.panel_starts)

    def ranges(self, index: IntArray) -> IntArray:
        """Every key of ``spans[index]`` is visible; the last column is their first position."""
        starts, ends = self.spans[index].T
        lens, panel_starts = ends - starts, self.panel_starts[index]
        return _columns(self.source, starts, lens, panel_starts, lens, -1, self.positions[index])


def make_tiles(plan: AttentionPlan) -> Tiles:
    """Tiles and ranges that cover every visible pair of the plan exactly once.

    Tiles split the query spans of all passes, so that each lies in one span of a pass or in none.
    """
    first, *others = plan.passes
    position_of = plan.layout.position_ids.numpy()
    starts, ends = _split([p.q_spans + p.q_begin for p in plan.passes])
    spans = first.q_spans + first.q_begin
    own = _KeySpans.of(0, spans, position_of[spans[:, 0]])
    tile_ids, ranges, sources, prefix_rows = [], [], [own], []
    for p in others:
        spans = p.kv_spans + p.kv_begin
        tiles, index = _tiles_in(p, starts)
        if p.prefix_row is None:
            # An ancestor's segment is a span of the first pass.
            index = np.searchsorted(own.spans[:, 0], spans[:, 0])[index]
            ranges.append(own.ranges(index))
        else:
            if plan.window is not None:
                spans[:, 0] = np.maximum(spans[:, 0], spans[:, 1] - plan.window)
            # Its keys end where the sequences of its queries begin.
            positions = position_of[p.q_spans[:, 0] + p.q_begin] - np.diff(spans)[:, 0]
            sources.append(_KeySpans.of(len(sources), spans, positions))
            prefix_rows.append(p.prefix_row)
            ranges.append(sources[-1].ranges(index))
        tile_ids.append(tiles)
    tiles, index = _tiles_in(first, starts)
    to_diagonal = own.ranges(index)
    segment_starts = to_diagonal[:, 1].copy()
    to_diagonal[:, 2] = ends[tiles] - segment_starts
    to_diagonal[:, 5] = starts[tiles] - segment_starts
    tile_ids.append(tiles)
    tile_of, table_of_ranges = np.concatenate(tile_ids), np.concatenate([*ranges, to_diagonal])
    if plan.window is None:
        table_of_ranges[:, 6] = _SEES_ALL
    else:
        reach = position_of[starts[tile_of]] - plan.window
        table_of_ranges, is_seen = _windowed(table_of_ranges, reach)
        tile_of = tile_of[is_seen]
    order = np.argsort(tile_of, kind="stable")
    end_range = np.cumsum(np.bincount(tile_of, minlength=len(starts)))
    table = _columns(starts, ends - starts, np.append(0, end_range[:-1]), end_range)
    if len(sources) == 1:
        trees = _tree_of(plan, starts)
    else:
        # Resident prefixes are shared between trees.
        trees = np.zeros_like(starts)
    tables = (
        np.column_stack([table, trees]),
        table_of_ranges[order],
        np.concatenate([source.panel_spans() for source in sources]),
    )
    tiles_table, range_table, panel_table = (torch.from_numpy(x) for x in tables)
    return Tiles(
        (tiles_table, range_table, panel_table), tuple(prefix_rows), plan.layout.unique_tokens
    )


def _windowed(ranges: IntArray, reach: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Ranges without whole panels before the first key that is seen, and which of them are left.

    Args:
        ranges: their last column is the position of the first key; it becomes the first key that
            the tile's first query sees, less than 0 where that is not in the range.
        reach: ``[num_ranges]`` position of the first key that the tile's first query sees.
    """
    ranges = ranges.copy()
    ranges[:, 6] = reach - ranges[:, 6]
    hidden = np.maximum(ranges[:, 6] // PANEL_KEYS * PANEL_KEYS, 0)
    is_diagonal = ranges[:, 5] >= 0
    for column in (1, 3):
        ranges[:, column] += hidden
    for column in (2, 4, 6):
        ranges[:, column] -= hidden
    ranges[is_diagonal, 5] -= hidden[is_diagonal]
    is_seen = ranges[:, 6] < ranges[:, 2]
    return ranges[is_seen], is_seen


def _split(spans: list[IntArray]) -> tuple[IntArray, IntArray]:
    """Starts and ends of tiles: all rows, cut at every span's edge, pieces in even parts."""
    edges = np.unique(np.concatenate([x.ravel() for x in spans]))
    lens = np.diff(edges)
    sizes = -(-lens // -(-lens // TILE_ROWS))
    sizes = -(-sizes // PRODUCT_ROWS) * PRODUCT_ROWS
    counts = -(-lens // sizes)
    piece = np.repeat(np.arange(len(lens)), counts)
    number = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = edges[piece] + number * sizes[piece]
    return starts, np.minimum(starts + sizes[piece], edges[piece + 1])


def _tiles_in(attention_pass: AttentionPass, starts: IntArray) -> tuple[IntArray, IntArray]:
    """Tiles that lie in a query span of the pass, and which span."""
    spans = attention_pass.q_spans + attention_pass.q_begin
    index = np.searchsorted(spans[:, 0], starts, side="right") - 1
    tiles = np.nonzero((index >= 0) & (starts < spans[index, 1]))[0]
    return tiles, index[tiles]


def _tree_of(plan: AttentionPlan, starts: IntArray) -> IntArray:
    forest = plan.layout.forest
    roots = forest.segment_starts[forest.segment_parents < 0]
    return np.searchsorted(roots, starts, side="right")


def _columns(*columns: IntArray | int) -> IntArray:
    return np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.int64)
