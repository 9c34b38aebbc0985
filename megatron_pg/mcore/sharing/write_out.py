"""What the last stage makes of a packed row, written out."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of sums in fp32 at once, 256 MiB: gradients of logits are many.
_SCRATCH_ELEMENTS = 2**26


def write_out(
    packed: Tensor, packed_ids: Tensor, *, split_over: dist.ProcessGroup | None = None
) -> Tensor:
    """Rows of a packed tensor at ``packed_ids``, each as often as it stands there.

    Equals ``whole_packed[packed_ids]``. The gradient of a row is the sum over its copies, on
    whichever ranks they stand, added up in fp32 or more and in a fixed order.

    Args:
        packed: ``[packed tokens, ...]``, or this rank's equal slice of it.
        packed_ids: ``[T]`` int64 on the CPU, the same on every rank.
        split_over: ranks that hold slices of the packed row, and get slices of the other one.

    Returns:
        ``[T, ...]``, or this rank's slice; T is a multiple of the ranks.
    """
    rows: Tensor = _WriteOut.apply(packed, packed_ids, split_over)
    return rows


class _WriteOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, ids: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        if group is not None:
            size, rank = dist.get_world_size(group), dist.get_rank(group)
            whole = packed.new_empty(len(packed) * size, *packed.shape[1:])
            dist.all_gather_into_tensor(whole, packed.contiguous(), group=group)
            packed, ids = whole, ids.chunk(size)[rank]
        ids = ids.to(packed.device, non_blocking=True)
        ctx.group, ctx.num_packed = group, len(packed)
        ctx.save_for_backward(ids)
        return packed.index_select(0, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        size = 1 if ctx.group is None else dist.get_world_size(ctx.group)
        out = grad.new_empty(ctx.num_packed // size, *grad.shape[1:])
        step = max(1, _SCRATCH_ELEMENTS // ctx.num_packed)
        for part, columns in zip(out.flatten(1).split(step, 1), grad.flatten(1).split(step, 1)):
            part.copy_(_sum_copies(columns, ids, ctx.num_packed, ctx.group))
        return out, None, None


def _sum_copies(
    grad: Tensor, ids: Tensor, num_packed: int, group: dist.ProcessGroup | None
) -> Tensor:
    """``[num_packed, columns]`` sums in fp32 or more, or this rank's slice of those of all."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    sums = grad.new_zeros(num_packed, grad.shape[1], dtype=dtype)
    # index_put_ sorts on CUDA, index_add_ would add in an order that changes between runs.
    sums.index_put_((ids,), grad.to(dtype), accumulate=True)
    if group is None:
        return sums
    mine = sums.new_empty(num_packed // dist.get_world_size(group), grad.shape[1])
    dist.reduce_scatter_tensor(mine, sums, group=group)
    return mine
