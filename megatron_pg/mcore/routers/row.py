"""What a router is told of its row, as the one tensor that Megatron-Core hands on to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...tree import PackedLayout


@dataclass(frozen=True, eq=False)
class RouterRow:
    """A row as its routers count it.

    It travels as ``padding_mask``: an ordinary bool tensor, which recompute and hooks on saved
    tensors keep, and whose first two dimensions ``MoELayer`` swaps. It is made of planes of one bit
    a token: membership in samples or the binary digits of the multiplicity, after those of expert
    ids. Its shape tells which are there, so that nothing has to be fetched from the device.

    ===================== ==================================================
    ``[*, tokens, 1]``    samples: sample s holds token t
    ``[*, tokens, 2]``    digits of the multiplicity: the row is one sequence
    ``[*, tokens, x, 1]`` as either, after the digits of ``[topk]`` expert ids
    ===================== ==================================================

    Attributes:
        weights: ``[sequences, tokens]`` int64: how often a sequence holds a token. Their sum over
            sequences is the multiplicity, 0 on padding.
        routes: ``[tokens, topk]`` int64 experts to go through, -1 where the router chooses; None
            where it does throughout.
    """

    weights: Tensor
    routes: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor, topk: int, num_experts: int) -> Self:
        """What ``as_mask`` made, after ``MoELayer`` has put tokens first."""
        planes, routes = mask[:, :, 0].flatten(1).t(), None
        if mask.dim() == 4:
            width = num_digits(num_experts)
            digits, planes = planes[: topk * width], planes[topk * width :]
            routes = from_digits(digits.unflatten(0, (topk, width))).t() - 1
        weights = from_digits(planes)[None] if mask.shape[2] == 2 else planes.long()
        return cls(weights, routes)

    @property
    def multiplicity(self) -> Tensor:
        """``[tokens]`` int64: samples that hold the token; 0 on padding."""
        return self.weights.sum(0)

    def part(self, rank: int, num_tokens: int) -> RouterRow:
        """The slice of one rank under sequence parallelism."""
        own = slice(rank * num_tokens, (rank + 1) * num_tokens)
        return RouterRow(self.weights[:, own], None if self.routes is None else self.routes[own])


def as_mask(
    *,
    samples: Tensor | None = None,
    multiplicity_digits: Tensor | None = None,
    routes: Tensor | None = None,
    num_experts: int,
) -> Tensor | None:
    """The mask that tells a router of its row; None for one whose tokens count once each.

    Args:
        samples: ``[samples, tokens, 1]`` bool, or
        multiplicity_digits: ``[digits, tokens]`` bool for a row that counts as one sequence.
        routes: ``[tokens, topk]`` expert ids, or -1.
        num_experts: of the layer.
    """
    if samples is None:
        if multiplicity_digits is None:
            return None
        samples = multiplicity_digits[..., None].expand(-1, -1, 2)
    if routes is None:
        return samples
    digits = to_digits(routes.t().long() + 1, num_experts).flatten(0, 1)
    return torch.cat([digits[..., None].expand(-1, -1, samples.shape[2]), samples])[..., None]


def membership(layout: PackedLayout, sample_counts: Sequence[int] | None) -> Tensor:
    """``[samples, tokens, 1]`` bool: sample s, as often as it counts, holds token t."""
    samples = torch.repeat_interleave(layout.sample_lens)
    members = torch.zeros(layout.num_samples, layout.total_tokens, 1, dtype=torch.bool)
    members[samples, layout.logical_to_packed] = True
    if sample_counts is None:
        return members
    return members.repeat_interleave(torch.tensor(sample_counts), dim=0)


def multiplicity_digits(layout: PackedLayout, sample_counts: Sequence[int] | None) -> Tensor:
    """``[digits, tokens]`` bool of the samples that hold a token, each as often as it counts."""
    multiplicity = layout.multiplicity
    if sample_counts is not None:
        counts = torch.tensor(sample_counts).repeat_interleave(layout.sample_lens)
        multiplicity = layout.reduce(counts)
    return to_digits(multiplicity, int(multiplicity.max()))


def to_digits(values: Tensor, largest: int) -> Tensor:
    """``[..., N]`` integers from 0 to ``largest`` as ``[..., digits, N]`` bool, lowest first."""
    places = torch.arange(num_digits(largest), device=values.device)
    return (values[..., None, :] >> places[:, None]).bitwise_and(1).bool()


def from_digits(digits: Tensor) -> Tensor:
    """The inverse of ``to_digits``: int64."""
    places = torch.arange(digits.shape[-2], device=digits.device)
    return (digits.long() << places[:, None]).sum(-2)


def num_digits(largest: int) -> int:
    """Binary digits that numbers up to ``largest`` need, at least one."""
    return max(1, largest.bit_length())
