"""A packed row as recurrent layers run it: depth by depth, every segment after its history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..tree import IntArray, PackedLayout, join_chains
from .copies import Copies
from .depths import Depth, depth_major_order, make_depths, runs
from .staging import on_device


@dataclass(frozen=True, eq=False)
class Forks:
    """Indices of one row for layers that carry a state along every path; on one device.

    A *segment* is scanned in one go: a segment of the layout with its only child, that one's only
    child and so on, unless the state behind each is kept. *Depth-major* order has all roots first,
    then their children, and so on, and no padding. The *history* of a root is what stands before it
    on its path in another row: ``width - 1`` inputs of the convolution, and a state.

    Example, ``width`` 3 and a prompt p0 p1 p2 of two responses a0, b0 b1::

        depth-major  p0 p1 p2 b0 b1 a0            (segments of as many chunks stay in order)
        inputs       -- -- p0 p1 p2 p1 p2 a0 p1 p2 b0 b1
                     halo           halo     halo

    Attributes:
        total_tokens: of the row, padding included.
        width: inputs that an output of the convolution depends on.
        roots: segments of the layout that begin a tree, in depth-major order.
        tokens: ``[unique_tokens]`` int64: packed index of every depth-major token.
        inputs: ``[num_inputs]`` int64: packed index of what a convolution gets, segment after
            segment, each behind its halo: the ``width - 1`` tokens before it on its path. Past the
            path's beginning, anything: these places are ``missing``.
        places: ``[unique_tokens]`` int64: of depth-major tokens among the inputs.
        halos: what the halos' places are copies of: packed tokens, then rows of the histories.
        halo_places: ``[segments * (width - 1)]`` int64: of the halos among the inputs.
        num_shared_tokens: sources of ``halos`` that are tokens.
        missing: ``[num_missing]`` int64: places of the halos that no token of the row is.
        history: ``[num_missing]`` int64: row of the histories ``[roots * (width - 1)]`` of each.
        depths: roots first.
    """

    total_tokens: int
    width: int
    roots: tuple[int, ...]
    tokens: Tensor
    inputs: Tensor
    places: Tensor
    halos: Copies
    halo_places: Tensor
    num_shared_tokens: int
    missing: Tensor
    history: Tensor
    depths: tuple[Depth, ...]

    def depth_major(self, packed: Tensor) -> Tensor:
        """``[unique_tokens, ...]`` of ``[total_tokens, ...]``."""
        return packed.index_select(0, self.tokens)

    def packed(self, depth_major: Tensor) -> Tensor:
        """``[total_tokens, ...]`` of ``[unique_tokens, ...]``; zeros on padding."""
        row: Tensor = _Packed.apply(depth_major, self.tokens, self.total_tokens)
        return row


class _Packed(torch.autograd.Function):
    """Rows put in their places; ``Tensor.index_copy`` would keep them for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, total: int) -> Tensor:
        ctx.places = places
        return rows.new_zeros(total, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.places), None, None


def of_layout(
    layout: PackedLayout,
    width: int,
    device: torch.device | str = "cpu",
    keeps_states: bool = False,
) -> Forks:
    """Forks of a row on a device, made once and kept with the layout.

    Args:
        layout: the row.
        width: kernel size of the layers' causal convolution.
        device: where their tensors live.
        keeps_states: whether the state behind every segment of the layout is asked for. Where it
            is not, chains of only children are joined, so that an agent takes a scan for each
            branching on its path, and not for each turn.
    """
    device = torch.device(device)

    def make() -> Forks:
        forks: Forks = on_device(make_forks(layout, width, keeps_states), device)
        return forks

    return layout.derived(("forks", width, device, keeps_states), make)


def make_forks(layout: PackedLayout, width: int, keeps_states: bool = False) -> Forks:
    """Forks of a row on the CPU; see ``of_layout``.

    Raises:
        ValueError: if ``width`` is below 2.
    """
    if width < 2:
        raise ValueError(
            f"width={width}: a convolution that mixes tokens has a width of at least 2"
        )
    forest = layout.forest if keeps_states else join_chains(layout.forest)
    halo, lens, starts = width - 1, forest.segment_lens, forest.segment_starts
    order = depth_major_order(forest)
    depths, root_of = make_depths(forest, order)
    tokens = runs(starts[order], lens[order])
    sources = path_until(layout, layout.predictor_of.numpy()[starts], root_of, halo)[order].ravel()
    ends = np.cumsum(lens[order] + halo)
    places = runs(ends - lens[order], lens[order])
    halo_places = ((ends - lens[order])[:, None] - np.arange(halo, 0, -1)).ravel()
    is_missing = sources >= layout.total_tokens
    inputs = np.empty(len(places) + len(halo_places), dtype=np.int64)
    inputs[places] = tokens
    inputs[halo_places] = np.where(is_missing, 0, sources)
    halos = Copies.of(sources)
    roots = starts[order[: len(depths[0].lens)]]
    return Forks(
        total_tokens=layout.total_tokens,
        width=width,
        roots=tuple(np.searchsorted(layout.forest.segment_starts, roots).tolist()),
        tokens=torch.from_numpy(tokens),
        inputs=torch.from_numpy(inputs),
        places=torch.from_numpy(places),
        halos=halos,
        halo_places=torch.from_numpy(halo_places),
        num_shared_tokens=int((halos.sources < layout.total_tokens).sum()),
        missing=torch.from_numpy(halo_places[is_missing]),
        history=torch.from_numpy(sources[is_missing] - layout.total_tokens),
        depths=depths,
    )


def path_until(layout: PackedLayout, tokens: IntArray, root_of: IntArray, count: int) -> IntArray:
    """``[n, count]`` packed indices of the last tokens on the paths to ``tokens``, oldest first.

    Where a path begins, rows of the histories follow ``total_tokens``, ``count`` of every root.

    Args:
        layout: the row.
        tokens: ``[n]`` each the last one of its path; -1 for a path of none.
        root_of: ``[n]`` place of its root among the roots.
        count: how many.
    """
    predictor_of = layout.predictor_of.numpy()
    num_missing = np.zeros_like(tokens)
    columns = []
    for _ in range(count):
        num_missing += tokens < 0
        history = layout.total_tokens + (root_of + 1) * count - num_missing
        columns.append(np.where(tokens >= 0, tokens, history))
        tokens = np.where(tokens >= 0, predictor_of[tokens], -1)
    return np.stack(columns[::-1], axis=1)
