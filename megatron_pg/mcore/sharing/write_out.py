"""What the last stage makes of a packed row, written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of whole packed rows at once, 256 MiB in fp32: gradients of logits are many, and rows that ranks
# divide may fit on none.
_SCRATCH_ELEMENTS = 2**26


def write_out(
    packed: Tensor, packed_ids: Tensor, *, split_over: dist.ProcessGroup | None = None
) -> Tensor:
    """Rows of a packed tensor at ``packed_ids``, each as often as it stands there.

    Equals ``whole_packed[packed_ids]``. The gradient of a row is the sum over its copies, on
    whichever ranks they stand, added up in fp32 or more and in a fixed order.

    Args:
        packed: ``[packed tokens, ...]``, or this rank's equal slice of it.
        packed_ids: ``[T]`` int64 on the CPU: the rows that this rank gets.
        split_over: ranks that hold slices of the packed row; each gets rows of its own.

    Returns:
        ``[T, ...]``.
    """
    rows: Tensor = _WriteOut.apply(packed, packed_ids, split_over)
    return rows


class _WriteOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, ids: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ids = ids.to(packed.device, non_blocking=True)
        ctx.group, ctx.num_packed = group, len(packed) * (1 if group is None else group.size())
        ctx.save_for_backward(ids)
        if group is None:
            return packed.index_select(0, ids)
        out = packed.new_empty(len(ids), *packed.shape[1:])
        for rows, columns in _column_parts(ctx.num_packed, out, packed):
            whole = packed.new_empty(ctx.num_packed, columns.shape[1])
            dist.all_gather_into_tensor(whole, columns.contiguous(), group=group)
            rows.copy_(whole.index_select(0, ids))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        size = 1 if ctx.group is None else ctx.group.size()
        out = grad.new_empty(ctx.num_packed // size, *grad.shape[1:])
        for part, columns in _column_parts(ctx.num_packed, out, grad):
            part.copy_(_sum_copies(columns, ids, ctx.num_packed, ctx.group))
        return out, None, None


def _column_parts(num_rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Columns of each, as many at once as fit into the scratch with ``num_rows`` rows."""
    step = max(1, _SCRATCH_ELEMENTS // num_rows)
    return zip(*(x.flatten(1).split(step, 1) for x in tensors))


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
    mine = sums.new_empty(num_packed // group.size(), grad.shape[1])
    dist.reduce_scatter_tensor(mine, sums, group=group)
    return mine
