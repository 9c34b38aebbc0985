"""Rows that are read several times, and the sum of what their copies are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..tree import IntArray


@dataclass(frozen=True, eq=False)
class Copies:
    """``source[rows]``, and which of them are copies of the same row.

    Attributes:
        rows: ``[num_copies]`` int64 of the source.
        order: ``[num_copies]`` int64: the copies, sorted by the row that they are of.
        sources: ``[num_sources]`` int64: every row that has copies, once, ascending.
        counts: ``[num_sources]`` int64: copies of each.
    """

    rows: Tensor
    order: Tensor
    sources: Tensor
    counts: Tensor

    @classmethod
    def of(cls, rows: IntArray) -> Copies:
        """Copies of these rows, on the CPU."""
        sources, counts = np.unique(rows, return_counts=True)
        arrays = (rows, np.argsort(rows, kind="stable"), sources, counts)
        return cls(*(torch.from_numpy(np.asarray(x, dtype=np.int64)) for x in arrays))

    def take(self, source: Tensor) -> Tensor:
        """``source[rows]``; the gradient of a row is the sum of its copies', as ``sums``."""
        taken: Tensor = _Take.apply(source, self)
        return taken

    def sums(self, grads: Tensor) -> Tensor:
        """``[num_sources, ...]`` sums of ``[num_copies, ...]``, in fp32 or wider.

        Always in the same order, so that equal gradients give equal bits.
        """
        grads = grads.index_select(0, self.order)
        grads = grads.to(torch.promote_types(grads.dtype, torch.float32))
        sums = torch.segment_reduce(
            grads.flatten(1), "sum", lengths=self.counts, axis=0, unsafe=True, initial=0
        )
        return sums.unflatten(1, grads.shape[1:]) if grads.dim() > 2 else sums


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, copies: Copies) -> Tensor:
        ctx.copies, ctx.shape = copies, source.shape
        return source.index_select(0, copies.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sums = ctx.copies.sums(grad)
        whole = sums.new_zeros(ctx.shape)
        return whole.index_copy_(0, ctx.copies.sources, sums).to(grad.dtype), None
