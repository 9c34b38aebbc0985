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
    """Which rows this rank reads and how they are exchanged by ranks that divide the tokens.

    Example, 2 ranks of sequence parallelism with 4 tokens each, ``predictor_ids = [1, 1, 6, 2]``:
    rank 0 sends its rows 1, 1, 2, rank 1 sends its row 2 and two rows of padding; ``order = [0, 1,
    3, 2]``. Row 2 of rank 0 is read ``once``, for the third of the rows that it sends; its row 1 is
    ``repeated``.

    With 2 ranks of context parallelism instead, both predict two: rank 0 keeps its rows 1, 1 and
    sends its row 2 to rank 1, ``sent = (2, 1)``, which has ``received = (1, 1)`` and makes the
    predictions ``share = [3, 2]``.

    Attributes:
        num_predictions: of the row.
        num_tokens: of this rank.
        num_slots: rows that each rank sends, padding included; None when nothing is split.
        local_ids: rows of the local hidden states, in the order of ``predictor_ids``.
        order: ``[E]`` place of every predictor among the received rows; empty when not split.
        once, once_ids: places in ``local_ids`` of rows that are read once, and these rows.
        repeated, group: places of the others, and which of ``repeated_ids`` each reads.
        repeated_ids: rows that are read several times.
        share: which predictions of the row this context-parallel rank makes; None: all.
        sent: rows that it gives to each of these ranks; None where each makes those of its tokens.
        received: rows that it gets from each.
    """

    num_predictions: int
    num_tokens: int
    num_slots: int | None
    local_ids: Tensor
    order: Tensor
    once: Tensor
    once_ids: Tensor
    repeated: Tensor
    group: Tensor
    repeated_ids: Tensor
    share: Tensor | None = None
    sent: tuple[int, ...] | None = None
    received: tuple[int, ...] | None = None

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
    cp_rank: int = 0,
    cp_size: int = 1,
) -> PredictorPlan:
    """What ``gather_predictors`` does with a row, found on the host.

    Args:
        predictor_ids: ``[E]`` int64 packed indices on the CPU, the same on every tp and cp rank.
        num_tokens: of the hidden states on this rank.
        tp_rank: place of this rank in its tensor-parallel group.
        tp_size: ranks of that group.
        sequence_parallel: whether they divide the tokens.
        cp_rank: place of this rank in its context-parallel group.
        cp_size: ranks of that group, which divide the tokens in equal runs.

    Raises:
        ValueError: on indices that are not int64, not on the CPU or outside the row.
    """
    is_split = sequence_parallel and tp_size > 1
    run = num_tokens * (tp_size if is_split else 1)
    check_indices("predictor_ids", predictor_ids, run * cp_size)
    num_predictions = len(predictor_ids)
    dealt: dict[str, Any] = {}
    if cp_size > 1:
        predictor_ids, dealt = _deal(predictor_ids, run, cp_rank, cp_size)
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
        num_predictions=num_predictions,
        num_tokens=num_tokens,
        num_slots=num_slots,
        local_ids=local_ids,
        order=order,
        once=once,
        once_ids=local_ids[once],
        repeated=repeated,
        group=group,
        repeated_ids=repeated_ids,
        **dealt,
    )


def _deal(ids: Tensor, run: int, rank: int, size: int) -> tuple[Tensor, dict[str, Any]]:
    """Predictor ids of this rank's run of tokens, counted from its start, and its equal share.

    Prompts predict nothing, so runs of equally many tokens make anything between no predictions
    and one for every token. Put in the order of the runs, predictions are cut into equal shares;
    what a rank gives to another is a run of its own, too.
    """
    owners = ids // run
    ordered = torch.argsort(owners, stable=True)
    ends = [0, *torch.bincount(owners, minlength=size).cumsum(0).tolist()]
    cuts = [len(ids) * i // size for i in range(size + 1)]
    moved = [
        tuple(max(min(ends[i + 1], cuts[j + 1]) - max(ends[i], cuts[j]), 0) for j in range(size))
        for i in range(size)
    ]
    own = ids[ordered[ends[rank] : ends[rank + 1]]] - rank * run
    dealt: dict[str, Any] = {"share": ordered[cuts[rank] : cuts[rank + 1]]}
    if any(moved[i][j] for i in range(size) for j in range(size) if i != j):
        dealt |= {"sent": moved[rank], "received": tuple(row[rank] for row in moved)}
    return own, dealt


def gather_predictors(
    hidden: Tensor,
    predictors: Tensor | PredictorPlan,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Rows of the last hidden states at ``predictors``, the same on every tp rank.

    Equals ``full_hidden[predictor_ids]``; on ranks of context parallelism a share of it each, as
    the plan's ``share`` says. Only these rows reach the vocabulary projection, so its
    cost follows the number of predictions, and a last prefix token can predict several targets.

    The backward expects what a vocabulary-parallel consumer produces: a gradient of the rows that
    is partial on each tp rank. It sums them over ``tp_group`` (all-reduce without sequence
    parallelism, reduce-scatter to the row's owner with it); a row that stands several times
    receives the sum of its gradients, accumulated in fp32 and in a fixed order. Over ``cp_group``
    gradients go back to the ranks whose rows they are of.

    Args:
        hidden: ``[T, 1, H]`` or ``[T, H]``, replicated over ``tp_group``; under sequence
            parallelism ``[T / tp_size, 1, H]``, this rank's contiguous slice.
        predictors: ``predictor_ids`` as ``plan_predictors`` takes them, or its plan for this rank
            with its arrays on the device of ``hidden``.
        tp_group: tensor-parallel process group; None means one rank.
        sequence_parallel: whether ``hidden`` is split over ``tp_group`` along its first dim.
        cp_group: context-parallel process group, whose ranks hold equal runs of the row; None
            means one rank.

    Returns:
        ``[E, H]`` in the dtype of ``hidden``; E may be 0.

    Raises:
        ValueError: on a batch dim other than 1, a plan for another number of tokens or of
            context-parallel ranks, or indices that ``plan_predictors`` refuses.
    """
    if hidden.ndim == 3 and hidden.shape[1] == 1:
        hidden = hidden.squeeze(1)
    if hidden.ndim != 2:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, it must be [T, 1, H] or [T, H]: "
            "a microbatch is one packed row"
        )
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    cp_size = 1 if cp_group is None else dist.get_world_size(cp_group)
    if isinstance(predictors, Tensor):
        plan = plan_predictors(
            predictors,
            len(hidden),
            tp_rank=0 if tp_group is None else dist.get_rank(tp_group),
            tp_size=tp_size,
            sequence_parallel=sequence_parallel,
            cp_rank=0 if cp_group is None else dist.get_rank(cp_group),
            cp_size=cp_size,
        )
        moved: dict[str, Any] = {
            n: x.to(hidden.device, non_blocking=True) for n, x in plan.arrays.items()
        }
        predictors = replace(plan, **moved)
    if predictors.num_tokens != len(hidden):
        raise ValueError(
            f"the plan is for {predictors.num_tokens} tokens of this rank, hidden has {len(hidden)}"
        )
    if (predictors.share is None) != (cp_size == 1):
        raise ValueError(
            f"the plan is {'for one' if predictors.share is None else 'for several'} "
            f"context-parallel ranks, cp_group has {cp_size}; plan with its cp_rank and cp_size"
        )
    rows: Tensor = _GatherRows.apply(
        hidden, predictors, tp_group if tp_size > 1 else None, cp_group
    )
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        plan: PredictorPlan,
        tp_group: dist.ProcessGroup | None,
        cp_group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.plan, ctx.tp_group, ctx.cp_group = plan, tp_group, cp_group
        rows = hidden.index_select(0, plan.local_ids)
        if len(plan.order):
            assert plan.num_slots is not None
            slots = rows.new_zeros(plan.num_slots, rows.shape[1])
            slots[: len(rows)] = rows
            received = rows.new_empty(plan.num_slots * dist.get_world_size(tp_group), rows.shape[1])
            dist.all_gather_into_tensor(received, slots, group=tp_group)
            rows = received.index_select(0, plan.order)
        return _exchanged(rows, plan.sent, plan.received, cp_group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        plan, group = ctx.plan, ctx.tp_group
        grad = _exchanged(grad, plan.received, plan.sent, ctx.cp_group)
        if group is not None and len(grad) > 0:
            if plan.num_slots is None:
                grad = grad.clone(memory_format=torch.contiguous_format)
                dist.all_reduce(grad, group=group)
            else:
                slots = grad.new_zeros(plan.num_slots * dist.get_world_size(group), grad.shape[1])
                slots[plan.order] = grad
                received = grad.new_empty(plan.num_slots, grad.shape[1])
                dist.reduce_scatter_tensor(received, slots, group=group)
                grad = received[: len(plan.local_ids)]
        return _sum_rows(grad, plan), None, None, None


def _exchanged(
    rows: Tensor,
    sent: tuple[int, ...] | None,
    received: tuple[int, ...] | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Rows of all ranks for this one, in the order of the ranks; ``rows`` where none moves."""
    if sent is None or received is None:
        return rows
    got = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(got, rows.contiguous(), list(received), list(sent), group=group)
    return got


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
