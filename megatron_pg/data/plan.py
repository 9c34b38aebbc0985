"""Which sample of which group stands in which row: integers only, equal on every rank."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush, heapreplace

import numpy as np

from ..tree import PackedLayout, PrefixTree, pack_trees
from .cost import CostModel
from .shape import GroupShape, IntArray, select_samples


@dataclass(frozen=True, order=True, slots=True)
class RowPart:
    """Samples of one group that stand in one row and share what they have in common.

    Attributes:
        group: index of the group in the global batch.
        samples: indices of the samples in the group, ascending.
    """

    group: int
    samples: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GroupSplit:
    """How a group is laid into rows: the samples of every part, each ascending."""

    parts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Rows of one rank, as parts of the groups of the global batch.

    Attributes:
        shapes: all groups of the global batch.
        rows: parts of every row; a row without parts is a filler that contributes nothing.
        pad_to_multiple: every row's length becomes a multiple of this.
    """

    shapes: tuple[GroupShape, ...]
    rows: tuple[tuple[RowPart, ...], ...]
    pad_to_multiple: int = 1

    @property
    def num_fillers(self) -> int:
        """Rows that contribute nothing."""
        return sum(not row for row in self.rows)

    @cached_property
    def sample_offsets(self) -> IntArray:
        """``[num_groups + 1]`` place of every group's first sample in the global batch."""
        return np.cumsum([0] + [shape.num_samples for shape in self.shapes])

    @cached_property
    def loss_tokens(self) -> int:
        """Trained (sample, token) pairs of the global batch."""
        return sum(shape.loss_tokens for shape in self.shapes)

    def row_layout(self, row: int) -> PackedLayout:
        """Where every token of ``row`` stands."""
        trees = [select_samples(self.shapes[p.group].tree, p.samples) for p in self.rows[row]]
        # The smallest tree there is: one prompt token and one response token.
        return pack_trees(trees or [PrefixTree.from_group(1, [1])], self.pad_to_multiple)

    def row_costs(self, cost_model: CostModel) -> list[float]:
        """Cost of every row; fillers are free."""
        return [row_cost(self.shapes, row, cost_model) for row in self.rows]


def row_cost(shapes: Sequence[GroupShape], row: Sequence[RowPart], cost_model: CostModel) -> float:
    """Cost of the parts of one row."""
    return sum(shapes[part.group].cost(cost_model, part.samples) for part in row)


def plan_rows(
    shapes: Sequence[GroupShape],
    max_tokens: int,
    *,
    members: Sequence[int] | None = None,
    cost_model: CostModel | None = None,
    pad_to_multiple: int = 1,
) -> PackPlan:
    """Rows of at most ``max_tokens`` unique tokens each, padding included.

    A group that fits into one row is never divided. Few rows come first (best fit decreasing);
    among as many rows the costs are evened out where the budget leaves room. Deterministic, and
    every sample of the members stands in exactly one row.

    Args:
        shapes: all groups of the global batch, the same on every rank.
        max_tokens: budget of a row.
        members: indices of the groups to be planned (one rank's share); None plans all.
        cost_model: what is evened out; the default model when None.
        pad_to_multiple: every row's length becomes a multiple of this.

    Raises:
        ValueError: if one sample alone exceeds the budget (group, sample and length are named), or
            ``pad_to_multiple < 1``.
    """
    if pad_to_multiple < 1:
        raise ValueError(f"pad_to_multiple={pad_to_multiple} must be at least 1")
    cost_model = cost_model or CostModel()
    budget = max_tokens // pad_to_multiple * pad_to_multiple
    if budget < 1:
        raise ValueError(
            f"max_tokens={max_tokens} holds no row of a multiple of {pad_to_multiple} tokens; "
            "raise it"
        )
    parts: list[RowPart] = []
    lens: list[int] = []
    costs: list[float] = []
    for group in range(len(shapes)) if members is None else members:
        shape = shapes[group]
        for samples in split_group(shape, budget).parts:
            tree = select_samples(shape.tree, samples)
            parts.append(RowPart(group, samples))
            lens.append(tree.unique_tokens)
            costs.append(cost_model.estimate(tree, int(shape.loss_lens[list(samples)].sum())))
    bins = _fill_bins(lens, budget)
    bins = _level_bins(bins, lens, costs, budget)
    rows = sorted(tuple(sorted(parts[i] for i in members)) for members in bins)
    return PackPlan(tuple(shapes), tuple(rows), pad_to_multiple)


def split_group(shape: GroupShape, budget: int) -> GroupSplit:
    """Whole when the group fits into ``budget`` tokens, else parts that repeat what they share.

    A part repeats the segments that its samples need. Long samples come first, each into the part
    where it adds the fewest tokens, so that samples that share deep segments stay together.

    Raises:
        ValueError: if one sample alone is longer than the budget.
    """
    tree = shape.tree
    if tree.unique_tokens <= budget:
        return GroupSplit((tuple(range(tree.num_samples)),))
    sample_lens = tree.sample_lens
    longest = int(sample_lens.argmax())
    if sample_lens[longest] > budget:
        raise ValueError(
            f"sample {longest} of group {shape.group_id!r} has {sample_lens[longest]} tokens, a "
            f"row holds {budget}; raise max_tokens or truncate the sample"
        )
    lens = tree.segment_lens.tolist()
    parts: list[list[int]] = []
    held: list[set[int]] = []
    free: list[int] = []
    for sample in np.argsort(-sample_lens, kind="stable").tolist():
        path = tree.segment_path(int(tree.sample_segments[sample])).tolist()
        added = [sum(lens[s] for s in path if s not in segments) for segments in held]
        fitting = [i for i, tokens in enumerate(added) if tokens <= free[i]]
        if fitting:
            best = min(fitting, key=added.__getitem__)
        else:
            best = len(parts)
            parts.append([])
            held.append(set())
            free.append(budget)
            added.append(int(sample_lens[sample]))
        parts[best].append(sample)
        held[best].update(path)
        free[best] -= added[best]
    return GroupSplit(tuple(sorted(tuple(sorted(part)) for part in parts)))


def _fill_bins(lens: Sequence[int], budget: int) -> list[list[int]]:
    """Best fit decreasing: each item into the fullest bin with room, else into a new one."""
    bins: list[list[int]] = []
    by_free: list[tuple[int, int]] = []
    for item in sorted(range(len(lens)), key=lambda i: (-lens[i], i)):
        at = bisect_left(by_free, (lens[item], -1))
        free, place = by_free.pop(at) if at < len(by_free) else (budget, len(bins))
        if place == len(bins):
            bins.append([])
        bins[place].append(item)
        insort(by_free, (free - lens[item], place))
    return bins


def _level_bins(
    bins: list[list[int]], lens: Sequence[int], costs: Sequence[float], budget: int
) -> list[list[int]]:
    """As many bins with a lower greatest cost, or ``bins`` where the budget leaves no room.

    Each item, the dearest first, goes to the cheapest bin with room for it.
    """
    level: list[list[int]] = [[] for _ in bins]
    free = [budget] * len(bins)
    heap = [(0.0, place) for place in range(len(bins))]
    shortest = min(lens, default=0)
    for item in sorted(range(len(lens)), key=lambda i: (-costs[i], i)):
        full = []
        while heap and free[heap[0][1]] < lens[item]:
            full.append(heappop(heap))
        if not heap:
            return bins
        cost, place = heap[0]
        level[place].append(item)
        free[place] -= lens[item]
        heapreplace(heap, (cost + costs[item], place))
        for entry in full:
            if free[entry[1]] >= shortest:
                heappush(heap, entry)

    def greatest(filled: list[list[int]]) -> float:
        return max((sum(costs[i] for i in members) for members in filled), default=0.0)

    return level if greatest(level) < greatest(bins) else bins
