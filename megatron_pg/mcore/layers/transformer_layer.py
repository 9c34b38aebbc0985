"""A whole layer: its router or MLP is told which samples hold which token."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from ..params import PositionedSeqParams


class PrefixGroupedLayer(torch.nn.Module):
    """Mixin over a ``TransformerLayer`` class; ordinary batches go through it untouched.

    Attention gets the row itself as ``packed_seq_params``. What follows it gets ``padding_mask``
    alone, an argument that Megatron-Core hands on in full and selective recompute and on every
    pipeline stage; so the row's mask takes its place. Nothing is left on modules, where the next
    microbatch would overwrite it before this one is recomputed.
    """

    def forward(
        self,
        *args: Any,
        packed_seq_params: Any = None,
        padding_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the given class, with ``PrefixGroupedSeqParams.row_mask`` for packed groups."""
        if isinstance(packed_seq_params, PositionedSeqParams):
            padding_mask = packed_seq_params.row_mask
        return super().forward(
            *args, packed_seq_params=packed_seq_params, padding_mask=padding_mask, **kwargs
        )


@cache
def prefix_grouped_layer(cls: type) -> type:
    """Subclass of a ``TransformerLayer`` class that hands the row's mask to what reads it."""
    return type(f"PrefixGrouped{cls.__name__}", (PrefixGroupedLayer, cls), {})
