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
