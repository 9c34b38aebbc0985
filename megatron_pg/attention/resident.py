"""Keys and values of a prefix row that stay while other rows attend to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for 16-bit types, else the type itself."""
    return torch.float32 if dtype.itemsize < 4 else dtype


@dataclass(eq=False)
class ResidentKV:
    """Keys and values of one prefix row in one layer, and what attention to them gives back.

    The backward pass of every row that attends to them adds its share to ``dk`` and ``dv``;
    autograd sees neither, so the prefix can run its backward once, after all of them.

    Attributes:
        k: ``[tokens of the prefix row, num_kv_heads, head_dim]``, positions encoded, no graph.
        v: ``[tokens of the prefix row, num_kv_heads, value_dim]``, no graph.
        dk, dv: gradients so far, fp32 for 16-bit types; None before the first share.
    """

    k: Tensor
    v: Tensor
    dk: Tensor | None = None
    dv: Tensor | None = None

    def grads(self) -> tuple[Tensor, Tensor]:
        """``dk`` and ``dv`` to add to; zeros the first time."""
        if self.dk is None or self.dv is None:
            dtype = accumulation_dtype(self.k.dtype)
            self.dk = torch.zeros_like(self.k, dtype=dtype)
            self.dv = torch.zeros_like(self.v, dtype=dtype)
        return self.dk, self.dv
