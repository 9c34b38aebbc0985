"""What a row sees of the prefix rows that are resident beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .checks import IntArray
from .tree import PrefixTree


@dataclass(frozen=True, eq=False)
class ResidentSpans:
    """What tokens of a row see of one prefix row: span i of the queries all of span i of the keys.

    Attributes:
        row: which of the resident prefix rows that run beside the row.
        q_spans: ``[num_spans, 2]`` half-open, packed indices of the row, ascending.
        kv_spans: ``[num_spans, 2]`` half-open, packed indices of the prefix row, ascending.

    Raises:
        ValueError: if spans are empty, overlap, do not ascend or begin before 0.
    """

    row: int
    q_spans: IntArray
    kv_spans: IntArray

    def __post_init__(self) -> None:
        for name in ("q_spans", "kv_spans"):
            bounds = getattr(self, name)
            if bounds.shape != self.q_spans.shape or bounds.ndim != 2 or bounds.shape[1] != 2:
                raise ValueError(f"{name} must be [num_spans, 2], got {bounds.shape}")
            flat = bounds.ravel()
            is_empty = (bounds[:, 0] >= bounds[:, 1]).any()
            if is_empty or (flat[1:] < flat[:-1]).any() or (flat < 0).any():
                raise ValueError(
                    f"{name} must ascend from 0 without overlap, got {bounds.tolist()}"
                )

    @property
    def num_pairs(self) -> int:
        """Visible (q, kv) pairs."""
        return int((np.diff(self.q_spans) * np.diff(self.kv_spans)).sum())


def joined_resident_lens(trees: Sequence[PrefixTree]) -> IntArray | None:
    """Resident tokens before every segment of all ``trees``; None when there are none."""
    if all(tree.resident_lens is None for tree in trees):
        return None
    return np.concatenate(
        [
            np.zeros(tree.num_segments, dtype=np.int64)
            if tree.resident_lens is None
            else tree.resident_lens
            for tree in trees
        ]
    )
