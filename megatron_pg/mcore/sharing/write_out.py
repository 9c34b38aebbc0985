"""Hidden states of a packed row, written out before the last stage's output layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def write_out(
    hidden: Tensor, packed_ids: Tensor, *, split_over: dist.ProcessGroup | None = None
) -> Tensor:
    """Rows of the hidden states at ``packed_ids``, each as often as it stands there.

    Equals ``full_hidden[packed_ids]``. The gradient of a row is the sum over its copies, on
    whichever ranks they stand, added up in fp32 or more and in a fixed order.

    Args:
        hidden: ``[packed tokens, 1, H]``, or this rank's equal slice of it.
        packed_ids: ``[T]`` int64 on the CPU, the same on every rank.
        split_over: ranks that hold slices of the packed row, and get slices of the other one.

    Returns:
        ``[T, 1, H]``, or this rank's slice; T is a multiple of the ranks.
    """
    rows: Tensor = _WriteOut.apply(hidden, packed_ids, split_over)
    return rows


class _WriteOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ids: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        if group is not None:
            size, rank = dist.get_world_size(group), dist.get_rank(group)
            whole = hidden.new_empty(len(hidden) * size, *hidden.shape[1:])
            dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
            hidden, ids = whole, ids.chunk(size)[rank]
        ids = ids.to(hidden.device, non_blocking=True)
        ctx.group, ctx.num_packed = group, len(hidden)
        ctx.save_for_backward(ids)
        return hidden.index_select(0, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        dtype = torch.promote_types(grad.dtype, torch.float32)
        sums = grad.new_zeros(ctx.num_packed, *grad.shape[1:], dtype=dtype)
        # index_put_ sorts on CUDA, index_add_ would add in an order that changes between runs.
        sums.index_put_((ids,), grad.to(dtype), accumulate=True)
        if ctx.group is not None:
            whole, size = sums, dist.get_world_size(ctx.group)
            sums = whole.new_empty(len(whole) // size, *whole.shape[1:])
            dist.reduce_scatter_tensor(sums, whole, group=ctx.group)
        return sums.to(grad.dtype), None, None
