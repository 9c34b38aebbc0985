"""What merges passes: PyTorch operators, the definition, and Triton kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...tree import IntArray
from .shares import PassGrads, PassOut


class MergeFunctions(Protocol):
    """What ``merge_plain``, the definition, and ``merge_triton`` both offer.

    Attributes:
        MAX_PASSES: how many passes a call merges at most.
    """

    MAX_PASSES: int

    def select_rows(self, spans: IntArray, num_rows: int) -> NDArray[np.generic] | None:
        """Which of a pass's rows lie in its spans, as the other functions want it; None: all."""

    def merge_out_lse(
        self, out: Tensor, lse: Tensor, passes: Sequence[PassOut], sink: Tensor | None
    ) -> None:
        """Merge passes, and then a sink, into a running ``(out, lse)``, in place."""

    def add_grads(self, totals: Sequence[Tensor], passes: Sequence[PassGrads]) -> None:
        """Add what passes give to rows of each total, in place."""


def merge_implementation(device: torch.device | str) -> Literal["triton", "plain"]:
    """What merges passes on the device: its type and what is installed decide, nothing else.

    "triton" on CUDA where Triton is installed: a launch for up to four passes, which touches merged
    rows alone and rounds each once. Triton needs a C compiler for its first launch; an error in it
    is raised. Else "plain": PyTorch's operators, 5 per pass of whole slices, 11 where the slice has
    gaps.
    """
    if torch.device(device).type != "cuda" or importlib.util.find_spec("triton") is None:
        return "plain"
    return "triton"


def merge_functions(device: torch.device) -> MergeFunctions:
    """The module that ``merge_implementation`` names."""
    if merge_implementation(device) == "triton":
        from . import merge_triton

        return merge_triton
    from . import merge_plain

    return merge_plain


__all__ = ["MergeFunctions", "PassGrads", "PassOut", "merge_functions", "merge_implementation"]
