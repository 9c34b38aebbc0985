"""The merge in PyTorch operators: the definition, and what runs where Triton does not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...tree import IntArray
from ..resident import accumulation_dtype
from ..sink import add_sink
from .shares import PassGrads, PassOut

# One at a time holds no more than one pass's output.
MAX_PASSES = 1


def select_rows(spans: IntArray, num_rows: int) -> IntArray | None:
    """Rows that lie in spans, ``[num_spans, 2]`` half-open, as int64 indices; None for all."""
    if np.diff(spans).sum() == num_rows:
        return None
    return np.concatenate([np.arange(start, end) for start, end in spans])


def merge_out_lse(
    out: Tensor, lse: Tensor, passes: Sequence[PassOut], sink: Tensor | None = None
) -> None:
    """Merge passes, and then a sink, into a running result, in place; ``out`` is rounded once.

    Equals attention over the union of all key sets. With each pass ``lse <- logaddexp(lse,
    pass_lse)`` and ``out <- out + sigmoid(pass_lse - lse) * (pass_out - out)``, in fp32 or wider.
    A side without keys has lse -inf and weight 0; where neither has any, lse stays -inf and out
    is NaN.

    Args:
        out: ``[T, H, D]`` running output.
        lse: ``[H, T]`` its log-sum-exp, natural.
        passes: what is merged; each row of a pass once.
        sink: ``[H]`` as in ``add_sink``, which takes all rows.
    """
    wide = out.to(accumulation_dtype(out.dtype))
    for rows, selected, pass_out, pass_lse in passes:
        _merge(wide[rows], lse[:, rows], pass_out, pass_lse, selected)
    if sink is not None:
        add_sink(wide, lse, sink)
    if wide is not out:
        out.copy_(wide)


def _merge(
    out: Tensor, lse: Tensor, pass_out: Tensor, pass_lse: Tensor, selected: Tensor | None
) -> None:
    if selected is not None:
        merged_out, merged_lse = out.index_select(0, selected), lse.index_select(1, selected)
        pass_out, pass_lse = pass_out.index_select(0, selected), pass_lse.index_select(1, selected)
        _merge(merged_out, merged_lse, pass_out, pass_lse, None)
        out.index_copy_(0, selected, merged_out)
        lse.index_copy_(1, selected, merged_lse)
        return
    weight = torch.sigmoid(pass_lse - lse).t().unsqueeze(-1)
    out.lerp_(pass_out.to(out.dtype), weight.to(out.dtype))
    torch.logaddexp(lse, pass_lse, out=lse)


def add_grads(totals: Sequence[Tensor], passes: Sequence[PassGrads]) -> None:
    """``total[rows] += grad`` for each total and pass, in place; totals are rounded once.

    Args:
        totals: ``[T, H, D]`` each.
        passes: what is added; each row of a pass once.
    """
    for number, total in enumerate(totals):
        wide = total
        if len(passes) > 1:
            wide = total.to(accumulation_dtype(total.dtype))
        for rows, selected, grads in passes:
            part, grad = wide[rows], grads[number]
            if selected is None:
                part.add_(grad)
            else:
                part.index_add_(0, selected, grad.index_select(0, selected).to(part.dtype))
        if wide is not total:
            total.copy_(wide)
