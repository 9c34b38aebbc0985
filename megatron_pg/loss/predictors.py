"""Hidden states at the positions that predict something, before the vocabulary projection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_indices


@dataclass(frozen=True, eq=False, kw_only=True)
class PredictorPlan:
    """Which rows this rank reads and, under sequence parallelism, how they are exchanged.

    Example, 2 ranks with 4 tokens each, ``predictor_ids = [1, 1, 6, 2]``: rank 0 sends its rows
    1, 1, 2, rank 1 sends its row 2 and two rows of padding; ``order = [0, 1, 3, 2]``. Row 2 of
    rank 0 is read ``once``, for the third of the rows that it sends; its row 1 is ``repeated``.

    Attributes:
        num_tokens: of this rank.
        num_slots: rows that each rank sends, padding included; None when nothing is split.
        local_ids: rows of the local hidden states, in the order of ``predictor_ids``.
        order: ``[E]`` place of every predictor among the received rows; empty when not split.
        once, once_ids: places in ``local_ids`` of rows that are read once, and these rows.
        repeated, group: places of the others, and which of ``repeated_ids`` each reads.
        repeated_ids: rows that are read several times.
    """

    num_tokens: int
    num_slots: int | None
    local_ids: Tensor
    order: Tensor
    once: Tensor
    once_ids: Tensor
    repeated: Tensor
    group: Tensor
    repeated_ids: Tensor

    @property
    def arrays(self) -> dict[str, Tensor]:
        """By name, what a device needs of it."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}


def plan_predictors(
    predictor_ids: Tensor,
    num_tokens: int,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    sequence_parallel: bool = False,
) -> PredictorPlan:
    """What ``gather_predictors`` does with a row, found on the host.

    Args:
        predictor_ids: ``[E]`` int64 packed indices on the CPU, the same on every tp rank.
        num_tokens: of the hidden states on this rank.
        tp_rank: place of this rank in its tensor-parallel group.
        tp_size: ranks of that group.
        sequence_parallel: whether they divide the tokens.

    Raises:
        ValueError: on indices that are not int64, not on the CPU or outside the row.
    """
    is_split = sequence_parallel and tp_size > 1
    check_indices("predictor_ids", predictor_ids, num_tokens * (tp_size if is_split else 1))
    local_ids, num_slots, order = predictor_ids, None, predictor_ids[:0]
    if is_split:
        owners = predictor_ids // num_tokens
        counts = torch.bincount(owners, minlength=tp_size)
        num_slots = int(counts.max())
        # The n-th predictor that a rank owns takes the n-th slot of that rank.
        by_owner = torch.argsort(owners, stable=True)
        slots = torch.empty_like(owners)
        slots[by_owner] = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners[by_owner]]
        local_ids = predictor_ids[owners == tp_rank] - tp_rank * num_tokens
        order = owners * num_slots + slots
    is_repeated = torch.bincount(local_ids, minlength=num_tokens)[local_ids] > 1
    once = torch.nonzero(~is_repeated).flatten()
    repeated = torch.nonzero(is_repeated).flatten()
    repeated_ids, group = torch.unique(local_ids[repeated], return_inverse=True)
    return PredictorPlan(
        num_tokens=num_tokens,
        num_slots=num_slots,
        local_ids=local_ids,
        order=order,
        once=once,
        once_ids=local_ids[once],
        repeated=repeated,
        group=group,
        repeated_ids=repeated_ids,
    )


def gather_predictors(
    hidden: Tensor,
    predictors: Tensor | PredictorPlan,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """Rows of the last hidden states at ``predictors``, the same on every tp rank.

    Equals ``full_hidden[predictor_ids]``. Only these rows reach the vocabulary projection, so its
    cost follows the number of predictions, and a last prefix token can predict several targets.

    The backward expects what a vocabulary-parallel consumer produces: a gradient of the rows that
    is partial on each tp rank. It sums them over ``tp_group`` (all-reduce without sequence
    parallelism, reduce-scatter to the row's owner with it); a row that stands several times
    receives the sum of its gradients, accumulated in fp32 and in a fixed order.

    Args:
        hidden: ``[T, 1, H]`` or ``[T, H]``, replicated over ``tp_group``; under sequence
            parallelism ``[T / tp_size, 1, H]``, this rank's contiguous slice.
        predictors: ``predictor_ids`` as ``plan_predictors`` takes them, or its plan for this rank
            with its arrays on the device of ``hidden``.
        tp_group: tensor-parallel process group; None means one rank.
        sequence_parallel: whether ``hidden`` is split over ``tp_group`` along its first dim.

    Returns:
        ``[E, H]`` in the dtype of ``hidden``; E may be 0.

    Raises:
        ValueError: on a batch dim other than 1, a plan for another number of tokens, or indices
            that ``plan_predictors`` refuses.
    """
    if hidden.ndim == 3 and hidden.shape[1] == 1:
        hidden = hidden.squeeze(1)
    if hidden.ndim != 2:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, it must be [T, 1, H] or [T, H]: "
            "a microbatch is one packed row"
        )
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    if isinstance(predictors, Tensor):
        plan = plan_predictors(
            predictors,
            len(hidden),
            tp_rank=0 if tp_group is None else dist.get_rank(tp_group),
            tp_size=tp_size,
            sequence_parallel=sequence_parallel,
        )
        moved: dict[str, Any] = {
            n: x.to(hidden.device, non_blocking=True) for n, x in plan.arrays.items()
        }
        predictors = replace(plan, **moved)
    if predictors.num_tokens != len(hidden):
        raise ValueError(
            f"the plan is for {predictors.num_tokens} tokens of this rank, hidden has {len(hidden)}"
        )
    rows: Tensor = _GatherRows.apply(hidden, predictors, tp_group if tp_size > 1 else None)
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, plan: PredictorPlan, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.plan, ctx.group = plan, group
        rows = hidden.index_select(0, plan.local_ids)
        if len(plan.order) == 0:
            return rows
        assert plan.num_slots is not None
        sent = rows.new_zeros(plan.num_slots, rows.shape[1])
        sent[: len(rows)] = rows
        received = rows.new_empty(plan.num_slots * dist.get_world_size(group), rows.shape[1])
        dist.all_gather_into_tensor(received, sent, group=group)
        return received.index_select(0, plan.order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        plan, group = ctx.plan, ctx.group
        if group is not None and len(grad) > 0:
            if plan.num_slots is None:
                grad = grad.clone(memory_format=torch.contiguous_format)
                dist.all_reduce(grad, group=group)
            else:
                slots = plan.num_slots * dist.get_world_size(group)
                sent = grad.new_zeros(slots, grad.shape[1])
                sent[plan.order] = grad
                received = grad.new_empty(plan.num_slots, grad.shape[1])
                dist.reduce_scatter_tensor(received, sent, group=group)
                grad = received[: len(plan.local_ids)]
        return _sum_rows(grad, plan), None, None


def _sum_rows(grad_rows: Tensor, plan: PredictorPlan) -> Tensor:
    """Transpose of ``index_select``: few rows repeat, so only those need a scratch sum."""
    out = grad_rows.new_zeros(plan.num_tokens, grad_rows.shape[1])
    out[plan.once_ids] = grad_rows.index_select(0, plan.once)
    if len(plan.repeated):
        scratch_dtype = torch.promote_types(out.dtype, torch.float32)
        sums = out.new_zeros(len(plan.repeated_ids), out.shape[1], dtype=scratch_dtype)
        grads = grad_rows.index_select(0, plan.repeated).to(scratch_dtype)
        # index_put_ sorts on CUDA, index_add_ would add in an order that changes between runs.
        sums.index_put_((plan.group,), grads, accumulate=True)
        out[plan.repeated_ids] = sums.to(out.dtype)
    return out
