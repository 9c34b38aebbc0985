"""The merge in PyTorch operators: the definition, and what runs where Triton does not."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_out_lse(
    out: Tensor, lse: Tensor, pass_out: Tensor, pass_lse: Tensor, rows: Tensor | None
) -> None:
    """Add one pass to a running result, in place.

    Equals attention over the union of both key sets: ``lse <- logaddexp(lse, pass_lse)`` and
    ``out <- out + sigmoid(pass_lse - lse) * (pass_out - out)``. A side without keys has lse -inf
    and weight 0; where neither has any, lse stays -inf and out is NaN.

    Args:
        out: ``[Tq, H, D]`` running output in the accumulation dtype.
        lse: ``[H, Tq]`` its log-sum-exp.
        pass_out: ``[Tq, H, D]`` the pass's output.
        pass_lse: ``[H, Tq]`` its log-sum-exp.
        rows: int64, queries that took part, each once; None for all. Others are not read.
    """
    if rows is not None:
        merged_out, merged_lse = out.index_select(0, rows), lse.index_select(1, rows)
        pass_out, pass_lse = pass_out.index_select(0, rows), pass_lse.index_select(1, rows)
        merge_out_lse(merged_out, merged_lse, pass_out, pass_lse, None)
        out.index_copy_(0, rows, merged_out)
        lse.index_copy_(1, rows, merged_lse)
        return
    weight = torch.sigmoid(pass_lse - lse).t().unsqueeze(-1)
    out.lerp_(pass_out.to(out.dtype), weight.to(out.dtype))
    torch.logaddexp(lse, pass_lse, out=lse)


def add_rows(total: Tensor, share: Tensor, rows: Tensor | None) -> None:
    """``total[rows] += share[rows]``, in place.

    Args:
        total: ``[T, H, D]`` in the accumulation dtype.
        share: ``[T, H, D]`` what a pass adds.
        rows: int64, rows that took part, each once; None for all. Others are not read.
    """
    if rows is None:
        total.add_(share)
    else:
        total.index_add_(0, rows, share.index_select(0, rows).to(total.dtype))
