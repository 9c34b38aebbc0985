"""The definition of visibility that every attention backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import PackedLayout


def dense_mask(layout: PackedLayout, window: int | None = None) -> Tensor:
    """``[total_tokens, total_tokens]`` bool: True where query q (row) sees key k (column).

    Equals ``k <= q < subtree_end[k]``: k is q itself or stands before q on its path.

    Args:
        layout: the row.
        window: keys that a query sees before itself on its path; None sees all.
    """
    index = torch.arange(layout.total_tokens)
    visible = (index[None, :] <= index[:, None]) & (index[:, None] < layout.subtree_end[None, :])
    if window is not None:
        visible &= layout.position_ids[:, None] - layout.position_ids[None, :] <= window
    return visible


def resident_mask(
    layout: PackedLayout, row: int, prefix_tokens: int, window: int | None = None
) -> Tensor:
    """``[total_tokens, prefix_tokens]`` bool: True where query q sees token k of a prefix row.

    Args:
        layout: the row of the queries.
        row: which of the prefix rows.
        prefix_tokens: its length.
        window: as in ``dense_mask``; a span of keys ends where its queries' sequences begin.
    """
    visible = torch.zeros(layout.total_tokens, prefix_tokens, dtype=torch.bool)
    for spans in layout.resident_spans:
        if spans.row == row:
            for (q_start, q_end), (kv_start, kv_end) in zip(
                spans.q_spans.tolist(), spans.kv_spans.tolist()
            ):
                positions = layout.position_ids[q_start:q_end]
                key_positions = positions.min() - torch.arange(kv_end - kv_start, 0, -1)
                distance = positions[:, None] - key_positions[None, :]
                sees = distance <= (layout.max_position if window is None else window)
                visible[q_start:q_end, kv_start:kv_end] = sees
    return visible
