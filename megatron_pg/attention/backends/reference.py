"""The definition: dense masked attention. Any device and dtype, memory quadratic in the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...tree import dense_mask, resident_mask
from ..kinds import AttentionKind
from ..plan import AttentionPlan
from ..resident import ResidentKV, accumulation_dtype
from .base import AttentionBackend


@dataclass(frozen=True, eq=False)
class Visibility:
    """What the queries of a row see.

    Attributes:
        mask: ``[total_tokens, total_tokens + sum(prefix_lens)]`` bool.
        prefix_lens: of every resident prefix row, tokens up to the last that is seen.
        unique_tokens: rows before padding.
    """

    mask: Tensor
    prefix_lens: tuple[int, ...]
    unique_tokens: int


class ReferenceBackend(AttentionBackend):
    """``AttentionKind`` written out over the visible pairs, by autograd."""

    name = "reference"
    features = frozenset({"window", "has_sink", "softcap", "value_dim"})

    def prepare(self, plan: AttentionPlan, device: torch.device) -> Visibility:
        """The dense mask."""
        layout, spans = plan.layout, plan.layout.resident_spans
        lens = [0] * (1 + max((s.row for s in spans), default=-1))
        for s in spans:
            lens[s.row] = max(lens[s.row], int(s.kv_spans.max()))
        masks = [resident_mask(layout, i, n, plan.window) for i, n in enumerate(lens)]
        mask = torch.cat([dense_mask(layout, plan.window), *masks], dim=1)
        return Visibility(mask.to(device, non_blocking=True), tuple(lens), layout.unique_tokens)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prepared: Visibility,
        kind: AttentionKind,
        sink: Tensor | None = None,
        resident: Sequence[ResidentKV] = (),
    ) -> Tensor:
        """See ``AttentionBackend``; computed in fp32 for 16-bit types."""
        dtype, repeats = accumulation_dtype(q.dtype), q.shape[1] // k.shape[1]
        kept = [_leaves(kv, n) for kv, n in zip(resident, prepared.prefix_lens)]
        k, v = (torch.cat([row, *rows]) for row, *rows in zip((k, v), *kept))
        heads_q = q.to(dtype).transpose(0, 1)
        heads_k, heads_v = (
            x.to(dtype).repeat_interleave(repeats, dim=1).transpose(0, 1) for x in (k, v)
        )
        scores = (heads_q @ heads_k.transpose(1, 2)) * kind.scale(q.shape[2])
        if kind.softcap is not None:
            scores = kind.softcap * torch.tanh(scores / kind.softcap)
        scores = scores.masked_fill(~prepared.mask, float("-inf"))
        if sink is not None:
            column = sink.to(dtype)[:, None, None].expand(-1, len(q), 1)
            is_padding = torch.arange(len(q), device=q.device) >= prepared.unique_tokens
            column = column.masked_fill(is_padding[:, None], float("-inf"))
            scores = torch.cat([scores, column], dim=2)
        probabilities = torch.softmax(scores, dim=-1)[..., : heads_v.shape[1]]
        return (probabilities @ heads_v).transpose(0, 1).to(q.dtype)


def _leaves(kept: ResidentKV, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a prefix row whose gradients go to ``kept``."""
    k, v = kept.k.detach(), kept.v.detach()
    if torch.is_grad_enabled():
        for i, leaf in enumerate((k, v)):
            leaf.requires_grad_().register_hook(partial(_add, kept, i))
    return k[:num_tokens], v[:num_tokens]


def _add(kept: ResidentKV, place: int, grad: Tensor) -> None:
    kept.grads()[place].add_(grad)
