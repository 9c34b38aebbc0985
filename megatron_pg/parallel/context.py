"""Context parallelism of a packed row: every rank holds a part of its tokens, or of its heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class ContextPart:
    """The part of a packed row that one context-parallel rank runs.

    Layers work on equal runs of tokens, one a rank. Core attention needs all tokens of a sample, so
    there the ranks exchange tokens for heads and back: one all-to-all each way, whatever tree the
    row holds, and every rank computes all pairs of its own heads.

    Attributes:
        group: the ranks.
        total_tokens: of the row, a multiple of the group's size.
    """

    group: dist.ProcessGroup
    total_tokens: int

    @property
    def tokens(self) -> slice:
        """Of this rank."""
        length = self.total_tokens // self.group.size()
        return slice(self.group.rank() * length, (self.group.rank() + 1) * length)

    def heads(self, num_heads: int) -> slice:
        """Of this rank among ``num_heads``."""
        number = num_heads // self.group.size()
        return slice(self.group.rank() * number, (self.group.rank() + 1) * number)

    def spread(self, kv: Tensor, num_heads: int) -> Tensor:
        """``[tokens, num_kv_heads, dim]`` with every head as often as ranks need it.

        Ranks that share a key head each get it, and its gradient is the sum of theirs.
        """
        copies = kv_head_copies(num_heads, kv.shape[1], self.group.size())
        return kv if copies == 1 else kv.repeat_interleave(copies, 1)

    def heads_from_tokens(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """All tokens of this rank's heads from all heads of its tokens; one collective.

        Args:
            tensors: ``[tokens of this rank, heads, dim]``, heads a multiple of the ranks.

        Returns:
            ``[tokens of all ranks, heads / ranks, dim]`` of each.
        """
        size = self.group.size()
        parts = [x.reshape(len(x), size, -1) for x in tensors]
        # Laid out by receiving rank in one pass.
        sent = torch.cat([part.transpose(0, 1) for part in parts], 2)
        got = _AllToAll.apply(sent, self.group).flatten(0, 1)
        split = got.split([part.shape[2] for part in parts], 1)
        return tuple(x.unflatten(1, (-1, t.shape[2])) for x, t in zip(split, tensors))

    def tokens_from_heads(self, out: Tensor) -> Tensor:
        """``[tokens of this rank, heads, dim]`` from ``[total_tokens, heads of rank, dim]``."""
        size = self.group.size()
        sent = out.reshape(size, len(out) // size, -1)
        got: Tensor = _AllToAll.apply(sent, self.group)
        return got.transpose(0, 1).reshape(sent.shape[1], size * out.shape[1], out.shape[2])

    def join(self, own: Tensor, places: Tensor, total: int) -> Tensor:
        """``[total]`` values of all ranks on every rank, where ``places`` are this rank's.

        What every rank makes of them is made on every rank, so each takes the gradient of its own
        and nothing is summed: over all ranks together every value's gradient counts once.
        """
        joined: Tensor = _Join.apply(own, places, total, self.group)
        return joined


def kv_head_copies(num_heads: int, num_kv_heads: int, size: int) -> int:
    """How often each key head is sent when ``size`` ranks divide ``num_heads`` query heads.

    Query heads are dealt in blocks of equally many that share one key head, the greatest that fit
    into a rank: 1 where every rank has whole groups of query heads.
    """
    per_kv_head = num_heads // num_kv_heads
    return per_kv_head // math.gcd(num_heads // size, per_kv_head)


def exchanged_values(num_heads: int, num_kv_heads: int, head_width: int, size: int) -> float:
    """Numbers that one of ``size`` ranks sends for each token of a row in one layer's forward pass.

    As many again in the backward pass, see the README of this folder.

    Args:
        num_heads: query heads of a tensor-parallel rank.
        num_kv_heads: its key and value heads.
        head_width: channels of a key and of a value together.
        size: ranks that divide the row.
    """
    heads = num_heads + num_kv_heads * kv_head_copies(num_heads, num_kv_heads, size)
    return heads * head_width * (size - 1) / size**2


class _AllToAll(torch.autograd.Function):
    """Block i of the first dimension goes to rank i; the gradient takes the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.group), None


def _exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own: Tensor, places: Tensor, total: int, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.save_for_backward(places)
        joined = own.new_zeros(total)
        joined[places] = own
        dist.all_reduce(joined, group=group)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return grad[places], None, None, None
