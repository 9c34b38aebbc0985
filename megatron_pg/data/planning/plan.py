"""Which sample of which group stands in which row: integers only, equal on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...tree import IntArray, PackedLayout, PrefixTree, ResidentSpans, pack_trees, reached_rows
from ..cost import CostModel
from ..shape import GroupShape, select_samples
from .bins import fill_bins, level_bins, rise_and_fall
from .split import split_group


@dataclass(frozen=True, order=True, slots=True)
class RowPart:
    """Samples of one group that stand in one row and share what they have in common.

    Attributes:
        group: index of the group in the global batch.
        samples: indices of the samples in the group, ascending.
        is_resident: whether their prefix stands in a prefix row of the plan instead of in theirs.
    """

    group: int
    samples: tuple[int, ...]
    is_resident: bool = False


Row = tuple[RowPart, ...]


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Rows of one rank that run together, as parts of the groups of the global batch.

    Attributes:
        shapes: all groups of the global batch.
        rows: parts of every row; a row without parts is a filler that contributes nothing.
        pad_to_multiple: every row's length becomes a multiple of this.
        prefix_rows: groups whose prefix stands in every prefix row, ascending; the prefix rows stay
            resident while ``rows`` run. One without groups is a filler.

    Raises:
        ValueError: if a part's prefix should be resident and stands in no prefix row.
    """

    shapes: tuple[GroupShape, ...]
    rows: tuple[Row, ...]
    pad_to_multiple: int = 1
    prefix_rows: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        wanted = {part.group for row in self.rows for part in row if part.is_resident}
        missing = sorted(wanted - self._prefix_places.keys())
        if missing:
            raise ValueError(f"prefixes of groups {missing} stand in no prefix row")

    @property
    def num_fillers(self) -> int:
        """Rows that contribute nothing."""
        return sum(not row for row in self.rows)

    @cached_property
    def sample_offsets(self) -> IntArray:
        """``[num_groups + 1]`` place of every group's first sample in the global batch."""
        return np.cumsum([0] + [shape.num_samples for shape in self.shapes])

    @cached_property
    def loss_offsets(self) -> IntArray:
        """``[num_samples + 1]`` trained pairs of the batch that stand before every sample's."""
        lens = [np.zeros(1, dtype=np.int64), *(shape.loss_lens for shape in self.shapes)]
        return np.cumsum(np.concatenate(lens))

    @property
    def loss_tokens(self) -> int:
        """Trained (sample, token) pairs of the global batch."""
        return int(self.loss_offsets[-1])

    @cached_property
    def most_segments(self) -> int:
        """Segments of the row that has most; each begins from a state in layers that have one."""
        trees = ([part_tree(self.shapes, part) for part in row] for row in self.rows)
        return max((sum(tree.num_segments for tree in row) for row in trees), default=0)

    @cached_property
    def prefix_tokens(self) -> int:
        """Tokens of the prefix rows, padding included."""
        layouts = [self.prefix_layout(number) for number in range(len(self.prefix_rows))]
        return sum(layout.total_tokens for layout in layouts)

    @property
    def num_resident_prefixes(self) -> int:
        """Prefixes in the prefix rows, one for each root of a group that has one."""
        return sum(self.shapes[g].prefixes.num_segments for row in self.prefix_rows for g in row)

    def kept_share(self, window: int | None) -> float:
        """Share of the prefix tokens that a layer keeps: those that its window reaches."""
        if window is None or not self.prefix_rows:
            return 1.0
        rows = [self.prefix_layout(number) for number in range(len(self.prefix_rows))]
        reached = [reached_rows(row, window) for row in rows]
        if all(kept is None for kept in reached):
            return 1.0
        lens = [row.total_tokens if x is None else len(x) for row, x in zip(rows, reached)]
        return sum(lens) / self.prefix_tokens

    def row_layout(self, row: int) -> PackedLayout:
        """Where every token of ``row`` stands, and what it sees of the prefix rows."""
        trees = [part_tree(self.shapes, part) for part in self.rows[row]]
        spans = self._resident_spans(self.rows[row], trees)
        return pack_trees(trees or [_FILLER], self.pad_to_multiple, spans)

    def prefix_layout(self, prefix_row: int) -> PackedLayout:
        """Where every token of a prefix row stands."""
        trees = [self.shapes[group].prefixes for group in self.prefix_rows[prefix_row]]
        return pack_trees(trees or [_FILLER], self.pad_to_multiple)

    def row_costs(self, cost_model: CostModel) -> list[float]:
        """Cost of every row; fillers are free."""
        return [row_cost(self.shapes, row, cost_model) for row in self.rows]

    def prefix_costs(self, cost_model: CostModel) -> list[float]:
        """Cost of every prefix row; fillers are free."""
        return [
            sum(cost_model.estimate(self.shapes[group].prefixes) for group in row)
            for row in self.prefix_rows
        ]

    @cached_property
    def _prefix_places(self) -> dict[int, tuple[int, int]]:
        """Prefix row and first token there of every resident group."""
        places = {}
        for number, row in enumerate(self.prefix_rows):
            start = 0
            for group in row:
                places[group] = number, start
                start += self.shapes[group].resident_tokens
        return places

    def _resident_spans(
        self, row: Sequence[RowPart], trees: Sequence[PrefixTree]
    ) -> list[ResidentSpans]:
        """For each prefix row that the row continues, which of its tokens see which of that."""
        found: dict[int, list[tuple[int, int, int, int]]] = {}
        offset = 0
        for part, tree in zip(row, trees):
            if part.is_resident:
                shape = self.shapes[part.group]
                prefix_row, first = self._prefix_places[part.group]
                starts = np.cumsum(shape.resident_lens) - shape.resident_lens + first
                # Pre-order keeps the roots of the part in the order of the group's.
                originals = np.unique(shape.sample_roots[list(part.samples)])
                roots = np.nonzero(tree.segment_parents < 0)[0]
                for original, root in zip(originals, roots):
                    length = shape.resident_lens[original]
                    if length:
                        q = offset + np.array(
                            [tree.segment_starts[root], tree.segment_subtree_ends[root]]
                        )
                        kv = starts[original] + np.array([0, length])
                        found.setdefault(prefix_row, []).append((*q, *kv))
            offset += tree.unique_tokens
        tables = {number: np.array(table) for number, table in sorted(found.items())}
        return [ResidentSpans(n, table[:, :2], table[:, 2:]) for n, table in tables.items()]


# The smallest tree there is: one prompt token and one response token.
_FILLER = PrefixTree.from_group(1, [1])


def part_shape(shapes: Sequence[GroupShape], part: RowPart) -> GroupShape:
    """The group of a part, without its prefix when that is resident."""
    shape = shapes[part.group]
    return shape.suffixes if part.is_resident else shape


def part_tree(shapes: Sequence[GroupShape], part: RowPart) -> PrefixTree:
    """What stands in a row for ``part``."""
    return select_samples(part_shape(shapes, part).tree, part.samples)


def part_tokens(shapes: Sequence[GroupShape], part: RowPart) -> int:
    """Unique tokens of what stands in a row for ``part``."""
    return part_shape(shapes, part).tokens(part.samples)


def row_cost(shapes: Sequence[GroupShape], row: Sequence[RowPart], cost_model: CostModel) -> float:
    """Cost of the parts of one row."""
    return sum(part_shape(shapes, part).cost(cost_model, part.samples) for part in row)


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
    budget = row_budget(max_tokens, pad_to_multiple)
    cost_model = cost_model or CostModel()
    parts = [
        RowPart(group, samples)
        for group in (range(len(shapes)) if members is None else members)
        for samples in split_group(shapes[group], budget)
    ]
    rows = fill_rows(shapes, parts, budget, cost_model)
    return PackPlan(tuple(shapes), rows, pad_to_multiple)


def row_budget(max_tokens: int, pad_to_multiple: int) -> int:
    """Tokens that a row holds without its padding.

    Raises:
        ValueError: if there is no such row.
    """
    if pad_to_multiple < 1:
        raise ValueError(f"pad_to_multiple={pad_to_multiple} must be at least 1")
    budget = max_tokens // pad_to_multiple * pad_to_multiple
    if budget < 1:
        raise ValueError(
            f"max_tokens={max_tokens} holds no row of a multiple of {pad_to_multiple} tokens; "
            "raise it"
        )
    return budget


def fill_rows(
    shapes: Sequence[GroupShape], parts: Sequence[RowPart], budget: int, cost_model: CostModel
) -> tuple[Row, ...]:
    """Few rows of at most ``budget`` tokens that hold the parts, with even costs where they can."""
    lens = [part_tokens(shapes, part) for part in parts]
    costs = [part_shape(shapes, part).cost(cost_model, part.samples) for part in parts]
    bins = level_bins(fill_bins(lens, budget), lens, costs, budget)
    rows = [_joined(parts[i] for i in members) for members in bins]
    return in_order(rows, [sum(costs[i] for i in members) for members in bins])


def in_order(rows: Sequence[Row], costs: Sequence[float]) -> tuple[Row, ...]:
    """Rows as stages take them: cheap ones first and last, neighbours alike.

    A stage that runs a cheap row forward while its neighbour runs a dear one back waits for it.
    """
    by_row = sorted(range(len(rows)), key=rows.__getitem__)
    return tuple(rows[by_row[i]] for i in rise_and_fall([costs[i] for i in by_row]))


def _joined(parts: Iterable[RowPart]) -> Row:
    """Parts of one row, ascending, with parts of one group made one."""
    samples: dict[tuple[int, bool], list[int]] = {}
    for part in parts:
        samples.setdefault((part.group, part.is_resident), []).extend(part.samples)
    return tuple(
        RowPart(group, tuple(sorted(members)), is_resident)
        for (group, is_resident), members in sorted(samples.items())
    )
