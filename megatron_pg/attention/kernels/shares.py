"""What a pass adds to a running result."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PassOut(NamedTuple):
    """Output of a pass for a slice of the running result's rows.

    Attributes:
        rows: slice of the running result.
        selected: which rows of the slice took part, as ``select_rows`` says it; None: all. What
            others hold is not read.
        out: ``[rows, H, D]``.
        lse: ``[H, rows]``.
    """

    rows: slice
    selected: Tensor | None
    out: Tensor
    lse: Tensor


class PassGrads(NamedTuple):
    """Gradients that a pass gives to a slice of the totals' rows.

    Attributes:
        rows: slice of the totals.
        selected: as in ``PassOut``.
        grads: ``[rows, H, D]`` for each total.
    """

    rows: slice
    selected: Tensor | None
    grads: tuple[Tensor, ...]
