"""Rows of one prompt side by side, so that all of them attend to it in one product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ...tree import to_device


@dataclass(frozen=True, eq=False)
class PromptSlots:
    """Places of rows in a grid: one slot for each prompt, as wide as the most rows that one has.

    For rows of prompts 0 1 1 the grid has 2 slots of width 2 and the rows stand at 0 2 3.

    Attributes:
        num_slots: prompts with rows.
        width: places of a slot.
        longest: tokens of the longest prompt; prompts end together.
        grid: ``[rows]`` place of every row on the device; None where it is the row's number.
        is_padding: ``[num_slots, 1, 1, longest]`` bool on the device: no token of the prompt; None
            where all prompts are equally long.
    """

    num_slots: int
    width: int
    longest: int
    grid: Tensor | None
    is_padding: Tensor | None

    @classmethod
    def of(cls, slots: Tensor, prompt_lens: Tensor, device: torch.device) -> Self:
        """Places of rows, each beside the other rows of its prompt.

        Args:
            slots: ``[rows]`` int64 slot of every row, on the CPU.
            prompt_lens: ``[num_slots]`` tokens of the prompts, on the CPU.
            device: of what is moved.
        """
        num_slots, longest = len(prompt_lens), int(prompt_lens.max())
        counts = torch.bincount(slots, minlength=num_slots)
        width = int(counts.max())
        by_slot = torch.argsort(slots, stable=True)
        grid = slots * width
        grid[by_slot] += torch.arange(len(slots)) - (counts.cumsum(0) - counts)[slots[by_slot]]
        is_trivial = torch.equal(grid, torch.arange(num_slots * width))
        is_padding = torch.arange(longest, 0, -1) > prompt_lens[:, None]
        has_padding = bool(is_padding.any())
        grid, is_padding = to_device([grid, is_padding[:, None, None]], device)
        return cls(
            num_slots=num_slots,
            width=width,
            longest=longest,
            grid=None if is_trivial else grid,
            is_padding=is_padding if has_padding else None,
        )

    def to_slots(self, x: Tensor) -> Tensor:
        """``[rows, groups, heads, X]`` to ``[slots * groups, width * heads, X]``."""
        if self.grid is not None:
            places = x.new_zeros(self.num_slots * self.width, *x.shape[1:])
            x = places.index_copy_(0, self.grid, x)
        x = x.unflatten(0, (self.num_slots, self.width)).transpose(1, 2)
        return x.flatten(2, 3).flatten(0, 1)

    def from_slots(self, x: Tensor, num_groups: int) -> Tensor:
        """``[slots * groups, width * heads, X]`` to ``[rows, groups, heads, X]``."""
        x = x.unflatten(0, (-1, num_groups)).unflatten(2, (self.width, -1))
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.grid is None else x.index_select(0, self.grid)

    def mask_(self, scores: Tensor, reach: int) -> None:
        """Take scores ``[slots * groups, X, reach]`` of no token out; the prompts' last are there.

        Args:
            scores: changed in place.
            reach: the last tokens of prompts that they are of.
        """
        if self.is_padding is not None:
            is_padding = self.is_padding[..., self.longest - reach :]
            scores.unflatten(0, (self.num_slots, -1)).masked_fill_(is_padding, -torch.inf)
