"""The definition: dense masked attention. Any device and dtype, memory quadratic in the row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...tree import dense_mask, resident_mask
from ..plan import AttentionPlan
from ..resident import ResidentKV, accumulation_dtype
from .base import AttentionInputs


class ReferenceBackend:
    """``softmax(scale * q k^T restricted to visible pairs) v``, by autograd."""

    name = "reference"
    merges = False

    def refusal(self, inputs: AttentionInputs) -> str | None:
        """None: it takes every input."""
        return None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        softmax_scale: float,
        resident: Sequence[ResidentKV] = (),
    ) -> Tensor:
        """``[T, Hq, D]`` output, computed in fp32 for 16-bit types."""
        dtype, repeats = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
        kept = [_leaves(kv) for kv in resident[: plan.num_prefix_rows]]
        masks = [resident_mask(plan.layout, i, len(kv[0])) for i, kv in enumerate(kept)]
        k, v = (torch.cat([row, *rows]) for row, *rows in zip((k, v), *kept))
        heads_q = q.to(dtype).transpose(0, 1)
        heads_k, heads_v = (
            x.to(dtype).repeat_interleave(repeats, dim=1).transpose(0, 1) for x in (k, v)
        )
        visible = torch.cat([dense_mask(plan.layout), *masks], dim=1).to(q.device)
        scores = (heads_q @ heads_k.transpose(1, 2)) * softmax_scale
        probabilities = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
        return (probabilities @ heads_v).transpose(0, 1).to(q.dtype)


def _leaves(kept: ResidentKV) -> tuple[Tensor, Tensor]:
    """Keys and values of a prefix row whose gradients go to ``kept``."""
    k, v = kept.k.detach(), kept.v.detach()
    if torch.is_grad_enabled():
        k.requires_grad_().register_hook(lambda grad: kept.grads()[0].add_(grad))
        v.requires_grad_().register_hook(lambda grad: kept.grads()[1].add_(grad))
    return k, v
