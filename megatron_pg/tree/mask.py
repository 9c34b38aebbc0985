"""The definition of visibility that every attention backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import PackedLayout


def dense_mask(layout: PackedLayout) -> Tensor:
    """``[total_tokens, total_tokens]`` bool: True where query q (row) sees key k (column).

    Equals ``k <= q < subtree_end[k]``: k is q itself or stands before q on its path.
    """
    index = torch.arange(layout.total_tokens)
    return (index[None, :] <= index[:, None]) & (index[:, None] < layout.subtree_end[None, :])


def resident_mask(layout: PackedLayout, row: int, prefix_tokens: int) -> Tensor:
    """``[total_tokens, prefix_tokens]`` bool: True where query q sees token k of a prefix row.

    Args:
        layout: the row of the queries.
        row: which of the prefix rows.
        prefix_tokens: its length.
    """
    visible = torch.zeros(layout.total_tokens, prefix_tokens, dtype=torch.bool)
    for spans in layout.resident_spans:
        if spans.row == row:
            for (q_start, q_end), (kv_start, kv_end) in zip(
                spans.q_spans.tolist(), spans.kv_spans.tolist()
            ):
                visible[q_start:q_end, kv_start:kv_end] = True
    return visible
