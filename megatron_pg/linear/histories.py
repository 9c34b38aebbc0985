"""What a row leaves to rows that continue it: where its segments end, and their last inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..tree import PackedLayout, ResidentSpans
from .copies import Copies
from .depths import depth_major_order
from .forks import Forks, path_until
from .staging import on_device


@dataclass(frozen=True, eq=False)
class Tails:
    """The last ``width - 1`` inputs of a convolution on the path of every segment of a row.

    Attributes:
        width: of the convolution.
        copies: of packed tokens, ``[segments * (width - 1)]`` in depth-major order, oldest first.
        missing: ``[num_missing]`` int64: places among them where the path is shorter.
    """

    width: int
    copies: Copies
    missing: Tensor

    def take(self, x: Tensor) -> Tensor:
        """``[segments, width - 1, channels]`` of ``[total_tokens, channels]``; zeros if missing."""
        taken = x.index_select(0, self.copies.rows).index_fill_(0, self.missing, 0)
        return taken.reshape(-1, self.width - 1, *x.shape[1:])

    def add(self, dx: Tensor, dtails: Tensor) -> Tensor:
        """``dx`` with what the tails are told added to their tokens, rounded once."""
        sums = self.copies.sums(dtails.flatten(0, 1).index_fill(0, self.missing, 0))
        rows = self.copies.sources
        return dx.index_copy(0, rows, (dx.index_select(0, rows) + sums).to(dx.dtype))


def tails_of(layout: PackedLayout, width: int, device: torch.device) -> Tails:
    """Tails of a row on a device, made once and kept with the layout."""

    def make() -> Tails:
        forest = layout.forest
        roots = np.zeros(forest.num_segments, dtype=np.int64)
        found = path_until(layout, forest.segment_ends - 1, roots, width - 1)
        sources = found[depth_major_order(forest)].ravel()
        is_missing = sources >= layout.total_tokens
        copies = Copies.of(np.where(is_missing, 0, sources))
        places = torch.from_numpy(np.nonzero(is_missing)[0])
        tails: Tails = on_device(Tails(width, copies, places), device)
        return tails

    return layout.derived(("tails", width, device), make)


@dataclass(frozen=True, eq=False)
class Continued:
    """Roots of a row that go on where segments of one prefix row end.

    Attributes:
        row: which prefix row.
        roots: ``[n]`` int64 places among the roots, in depth-major order.
        segments: that they continue, by their places in the prefix row's depth-major order.
    """

    row: int
    roots: Tensor
    segments: Copies


def continued(
    layout: PackedLayout, forks: Forks, prefix_rows: Sequence[PackedLayout]
) -> tuple[Continued, ...]:
    """What a row continues of the prefix rows that ``layout.resident_spans`` name; made once.

    Args:
        layout: the row.
        forks: of the row, on the device where the indices go.
        prefix_rows: whose every segment's final state is kept.

    Raises:
        ValueError: if a prefix ends inside a segment of its row, where no state is kept.
    """
    roots, device = forks.roots, forks.tokens.device
    lens = [row.forest.segment_lens.tobytes() for row in prefix_rows]

    def make() -> tuple[Continued, ...]:
        found = [
            _continued(layout, roots, spans, prefix_rows[spans.row])
            for spans in layout.resident_spans
        ]
        moved: tuple[Continued, ...] = on_device(tuple(found), device)
        return moved

    return layout.derived(("continued", device, roots, *lens), make)


def _continued(
    layout: PackedLayout, roots: Sequence[int], spans: ResidentSpans, prefix_row: PackedLayout
) -> Continued:
    # The last span that a root's first token sees ends where the root begins on its path.
    starts = layout.forest.segment_starts[list(roots)]
    span = np.searchsorted(spans.q_spans[:, 1], starts, side="right")
    goes_on = span < len(spans.q_spans)
    goes_on[goes_on] = spans.q_spans[span[goes_on], 0] <= starts[goes_on]
    ends = spans.kv_spans[span[goes_on], 1]
    segments = prefix_row.segment_ids.numpy()[ends - 1]
    if (inside := prefix_row.forest.segment_ends[segments] != ends).any():
        raise ValueError(
            f"a resident prefix ends at token {ends[inside].min()} of prefix row {spans.row}, "
            "inside a segment, at whose end alone layers with a state keep it; let it end where "
            "the segment does"
        )
    place = np.empty(prefix_row.forest.num_segments, dtype=np.int64)
    place[depth_major_order(prefix_row.forest)] = np.arange(len(place))
    return Continued(
        spans.row, torch.from_numpy(np.nonzero(goes_on)[0]), Copies.of(place[segments])
    )
