"""The definition: dense masked attention. Any device and dtype, memory quadratic in the row."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tree import dense_mask
from ..merge import accumulation_dtype
from ..plan import AttentionPlan
from .base import AttentionInputs


class ReferenceBackend:
    """``softmax(scale * q k^T restricted to visible pairs) v``, by autograd."""

    name = "reference"

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """None: it takes every input."""
        return None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, softmax_scale: float
    ) -> Tensor:
        """``[T, Hq, D]`` output, computed in fp32 for 16-bit types."""
        dtype, repeats = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
        heads_q = q.to(dtype).transpose(0, 1)
        heads_k, heads_v = (
            x.to(dtype).repeat_interleave(repeats, dim=1).transpose(0, 1) for x in (k, v)
        )
        visible = dense_mask(plan.layout).to(q.device)
        scores = (heads_q @ heads_k.transpose(1, 2)) * softmax_scale
        probabilities = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
        return (probabilities @ heads_v).transpose(0, 1).to(q.dtype)
