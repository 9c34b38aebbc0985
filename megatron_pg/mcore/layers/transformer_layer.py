"""A whole layer: its router or MLP is told which samples hold which token."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from ..positioned import PositionedSeqParams
from .router import row_mask_of


class PrefixGroupedLayer(torch.nn.Module):
    """Mixin over a ``TransformerLayer`` class; ordinary batches go through it untouched.

    Attention gets the row itself as ``packed_seq_params``. What follows it gets ``padding_mask``
    alone, an argument that Megatron-Core hands on in full and selective recompute and on every
    pipeline stage; so the row's mask takes its place. Nothing that a later call reads is left on
    modules, where the next microbatch would overwrite it before this one is recomputed.
    """

    def forward(
        self,
        *args: Any,
        packed_seq_params: Any = None,
        padding_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the given class, with what its MLP or router reads of a packed row."""
        row = nullcontext(padding_mask)
        if isinstance(packed_seq_params, PositionedSeqParams):
            row = row_mask_of(self, packed_seq_params)
        with row as mask:
            return super().forward(
                *args, packed_seq_params=packed_seq_params, padding_mask=mask, **kwargs
            )


@cache
def prefix_grouped_layer(cls: type) -> type:
    """Subclass of a ``TransformerLayer`` class that hands the row's mask to what reads it."""
    return type(f"PrefixGrouped{cls.__name__}", (PrefixGroupedLayer, cls), {})
