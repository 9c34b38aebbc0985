"""Which sample of which group stands in which row: integers only, equal on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..tree import IntArray, PackedLayout, PrefixTree, ResidentSpans, pack_trees
from .bins import fill_bins, level_bins
from .cost import CostModel
from .shape import GroupShape, select_samples


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
    rows: tuple[tuple[RowPart, ...], ...]
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
    def prefix_tokens(self) -> int:
        """Tokens of the prefix rows, padding included."""
        layouts = [self.prefix_layout(number) for number in range(len(self.prefix_rows))]
        return sum(layout.total_tokens for layout in layouts)

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
) -> tuple[tuple[RowPart, ...], ...]:
    """Few rows of at most ``budget`` tokens that hold the parts, with even costs where they can."""
    lens = [part_tree(shapes, part).unique_tokens for part in parts]
    costs = [part_shape(shapes, part).cost(cost_model, part.samples) for part in parts]
    bins = level_bins(fill_bins(lens, budget), lens, costs, budget)
    return tuple(sorted(_joined(parts[i] for i in members) for members in bins))


def _joined(parts: Iterable[RowPart]) -> tuple[RowPart, ...]:
    """Parts of one row, ascending, with parts of one group made one."""
    samples: dict[tuple[int, bool], list[int]] = {}
    for part in parts:
        samples.setdefault((part.group, part.is_resident), []).extend(part.samples)
    return tuple(
        RowPart(group, tuple(sorted(members)), is_resident)
        for (group, is_resident), members in sorted(samples.items())
    )


def split_group(shape: GroupShape, budget: int) -> tuple[tuple[int, ...], ...]:
    """The samples of every part, ascending: one part when the group fits into ``budget`` tokens.

    A part repeats the segments that its samples need. Long samples come first, each into the part
    where it adds the fewest tokens, so that samples that share deep segments stay together.

    Raises:
        ValueError: if one sample alone is longer than the budget.
    """
    tree = shape.tree
    if tree.unique_tokens <= budget:
        return (tuple(range(tree.num_samples)),)
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
    return tuple(sorted(tuple(sorted(part)) for part in parts))
