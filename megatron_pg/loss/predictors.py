"""Hidden states at the positions that predict something, before the vocabulary projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_indices


def gather_predictors(
    hidden: Tensor,
    predictor_ids: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """Rows of the last hidden states at ``predictor_ids``, the same on every tp rank.

    Equals ``full_hidden[predictor_ids]``. Only these rows reach the vocabulary projection, so its
    cost follows the number of predictions, and a last prefix token can predict several targets.

    The backward expects what a vocabulary-parallel consumer produces: a gradient of the rows that
    is partial on each tp rank. It sums them over ``tp_group`` (all-reduce without sequence
    parallelism, reduce-scatter to the row's owner with it); a row that stands several times
    receives the sum of its gradients, accumulated in fp32 and in a fixed order.

    Args:
        hidden: ``[T, 1, H]`` or ``[T, H]``, replicated over ``tp_group``; under sequence
            parallelism ``[T / tp_size, 1, H]``, this rank's contiguous slice.
        predictor_ids: ``[E]`` int64 packed indices on the CPU, the same on every tp rank.
        tp_group: tensor-parallel process group; None means one rank.
        sequence_parallel: whether ``hidden`` is split over ``tp_group`` along its first dim.

    Returns:
        ``[E, H]`` in the dtype of ``hidden``; E may be 0.

    Raises:
        ValueError: on a batch dim other than 1, or indices that are not int64, not on the CPU or
            outside the row.
    """
    if hidden.ndim == 3 and hidden.shape[1] == 1:
        hidden = hidden.squeeze(1)
    if hidden.ndim != 2:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, it must be [T, 1, H] or [T, H]: "
            "a microbatch is one packed row"
        )
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    is_split = sequence_parallel and tp_size > 1
    check_indices("predictor_ids", predictor_ids, len(hidden) * (tp_size if is_split else 1))
    group = tp_group if tp_size > 1 else None
    if is_split:
        plan = _split_plan(predictor_ids, len(hidden), dist.get_rank(tp_group), tp_size)
    else:
        plan = _RowPlan(predictor_ids)
    rows: Tensor = _GatherRows.apply(hidden, plan, group)
    return rows


@dataclass(frozen=True, eq=False)
class _RowPlan:
    """Which rows this rank reads and, under sequence parallelism, how they are exchanged.

    Example, 2 ranks with 4 tokens each, ``predictor_ids = [1, 1, 6, 2]``: rank 0 sends its rows
    1, 1, 2, rank 1 sends its row 2 and two rows of padding; ``order = [0, 1, 3, 2]``.

    Attributes:
        local_ids: rows of the local hidden states, in the order of ``predictor_ids``.
        num_slots: rows that each rank sends, padding included; None when nothing is split.
        order: ``[E]`` place of every predictor among the received rows.
    """

    local_ids: Tensor
    num_slots: int | None = None
    order: Tensor | None = None


def _split_plan(predictor_ids: Tensor, local_tokens: int, rank: int, tp_size: int) -> _RowPlan:
    owners = predictor_ids // local_tokens
    counts = torch.bincount(owners, minlength=tp_size)
    num_slots = int(counts.max())
    # The n-th predictor that a rank owns takes the n-th slot of that rank.
    by_owner = torch.argsort(owners, stable=True)
    slots = torch.empty_like(owners)
    slots[by_owner] = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners[by_owner]]
    local_ids = predictor_ids[owners == rank] - rank * local_tokens
    return _RowPlan(local_ids, num_slots, owners * num_slots + slots)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, plan: _RowPlan, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.plan, ctx.group, ctx.local_tokens = plan, group, len(hidden)
        rows = hidden.index_select(0, _to(plan.local_ids, hidden))
        if plan.order is None or len(plan.order) == 0:
            return rows
        assert plan.num_slots is not None
        sent = rows.new_zeros(plan.num_slots, rows.shape[1])
        sent[: len(rows)] = rows
        received = rows.new_empty(plan.num_slots * dist.get_world_size(group), rows.shape[1])
        dist.all_gather_into_tensor(received, sent, group=group)
        return received.index_select(0, _to(plan.order, hidden))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        plan, group = ctx.plan, ctx.group
        if group is not None and len(grad) > 0:
            if plan.order is None:
                grad = grad.clone(memory_format=torch.contiguous_format)
                dist.all_reduce(grad, group=group)
            else:
                slots = plan.num_slots * dist.get_world_size(group)
                sent = grad.new_zeros(slots, grad.shape[1])
                sent[_to(plan.order, grad)] = grad
                received = grad.new_empty(plan.num_slots, grad.shape[1])
                dist.reduce_scatter_tensor(received, sent, group=group)
                grad = received[: len(plan.local_ids)]
        return _sum_rows(grad, plan.local_ids, ctx.local_tokens), None, None


def _sum_rows(grad_rows: Tensor, ids: Tensor, num_tokens: int) -> Tensor:
    """Transpose of ``index_select(0, ids)``: few rows repeat, so only those need a scratch sum."""
    out = grad_rows.new_zeros(num_tokens, grad_rows.shape[1])
    is_repeated = torch.bincount(ids, minlength=num_tokens)[ids] > 1
    once = torch.nonzero(~is_repeated).flatten()
    out[_to(ids[once], out)] = grad_rows.index_select(0, _to(once, out))
    repeated = torch.nonzero(is_repeated).flatten()
    if len(repeated):
        unique, place = torch.unique(ids[repeated], return_inverse=True)
        scratch_dtype = torch.promote_types(out.dtype, torch.float32)
        sums = out.new_zeros(len(unique), out.shape[1], dtype=scratch_dtype)
        grads = grad_rows.index_select(0, _to(repeated, out)).to(scratch_dtype)
        # index_put_ sorts on CUDA, index_add_ would add in an order that changes between runs.
        sums.index_put_((_to(place, out),), grads, accumulate=True)
        out[_to(unique, out)] = sums.to(out.dtype)
    return out


def _to(ids: Tensor, like: Tensor) -> Tensor:
    return ids.to(like.device, non_blocking=True)
