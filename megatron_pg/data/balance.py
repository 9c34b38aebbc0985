"""Equal work and equal microbatch counts on all data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np

from .cost import CostModel
from .plan import PackPlan, RowPart, part_shape, row_cost
from .shape import GroupShape, group_shape
from .types import Group

Row = tuple[RowPart, ...]


def balance_groups(
    groups: Sequence[Group] | Sequence[GroupShape],
    dp_size: int,
    cost_model: CostModel | None = None,
    *,
    min_shared: int | None = None,
) -> list[list[int]]:
    """Indices of the groups that each data-parallel rank trains, of nearly equal cost.

    Whole groups only. Karmarkar and Karp's differencing method in its k-way form; deterministic, so
    every rank computes the same answer from the same shapes. Ranks get nothing when there are fewer
    groups than ranks.

    Args:
        groups: groups of the global batch, or their shapes.
        dp_size: number of ranks.
        cost_model: cost of a group; the default model when None.
        min_shared: as in ``group_tree``; ignored for shapes, which are shared already.

    Returns:
        ``dp_size`` lists, each ascending; every index stands in exactly one.

    Raises:
        ValueError: if ``dp_size < 1``.

    Source:
        Karmarkar and Karp, "The differencing method of set partitioning", 1982.
    """
    cost_model = cost_model or CostModel()
    shapes = (g if isinstance(g, GroupShape) else group_shape(g, min_shared) for g in groups)
    return balance_costs([shape.cost(cost_model) for shape in shapes], dp_size)


def balance_costs(costs: Sequence[float], dp_size: int) -> list[list[int]]:
    """``balance_groups`` of groups whose ``costs`` are known.

    Raises:
        ValueError: if ``dp_size < 1``.
    """
    if dp_size < 1:
        raise ValueError(f"dp_size={dp_size} must be at least 1")
    # An entry is one assignment to the ranks, dearest rank first and idle ranks left out; the most
    # uneven two are merged.
    heap = [(-cost, index, [(cost, [index])]) for index, cost in enumerate(costs)]
    if not heap:
        return [[] for _ in range(dp_size)]
    heapify(heap)
    serial = len(heap)
    while len(heap) > 1:
        a, b = heappop(heap)[2], heappop(heap)[2]
        # The dearest rank of the one joins the cheapest of the other.
        overlap = max(len(a) + len(b) - dp_size, 0)
        b.reverse()
        kept = len(a) - overlap
        both = [(x + y, m + n) for (x, m), (y, n) in zip(a[kept:], b)]
        merged = a[:kept] + both + b[overlap:]
        merged.sort(key=lambda load: -load[0])
        least = merged[-1][0] if len(merged) == dp_size else 0.0
        heappush(heap, (least - merged[0][0], serial, merged))
        serial += 1
    loads = heap[0][2]
    return [sorted(members) for _, members in loads] + [[]] * (dp_size - len(loads))


def equalize_num_microbatches(
    plans: Sequence[PackPlan], *, multiple_of: int = 1, cost_model: CostModel | None = None
) -> list[PackPlan]:
    """Plans of all ranks with one number of rows: the greatest, rounded up to ``multiple_of``.

    Prefix rows likewise, but they are never divided.

    A rank that has too few rows divides its dearest rows: first rows that hold several parts,
    which repeats nothing, then parts that hold several samples, which repeats what they share. Only
    when every row holds one sample does it get fillers, rows that contribute nothing;
    ``PackPlan.num_fillers`` tells how many.

    Args:
        plans: one plan per data-parallel rank. Every rank can make them all, since a plan needs
            lengths only.
        multiple_of: pipeline size under the interleaved schedule, else 1.
        cost_model: which rows are dear; the default model when None.

    Raises:
        ValueError: on no plans or ``multiple_of < 1``.
    """
    if multiple_of < 1 or not plans:
        raise ValueError(
            f"got {len(plans)} plans and multiple_of={multiple_of}; both must be at least 1"
        )
    num_rows = max(len(plan.rows) for plan in plans)
    num_prefix_rows = max(len(plan.prefix_rows) for plan in plans)
    return [
        with_num_rows(
            plan, num_rows, num_prefix_rows, multiple_of=multiple_of, cost_model=cost_model
        )
        for plan in plans
    ]


def with_num_rows(
    plan: PackPlan,
    num_rows: int,
    num_prefix_rows: int,
    *,
    multiple_of: int = 1,
    cost_model: CostModel | None = None,
) -> PackPlan:
    """One rank's part of ``equalize_num_microbatches``, where the greatest numbers are known."""
    cost_model = cost_model or CostModel()
    num_rows = -(-num_rows // multiple_of) * multiple_of
    num_prefix_rows = -(-num_prefix_rows // multiple_of) * multiple_of
    return replace(
        plan,
        rows=_divided(plan, num_rows, cost_model),
        prefix_rows=plan.prefix_rows + ((),) * (num_prefix_rows - len(plan.prefix_rows)),
    )


def _divided(plan: PackPlan, num_rows: int, cost_model: CostModel) -> tuple[Row, ...]:
    fillers = [row for row in plan.rows if not row]
    heap: list[tuple[bool, float, Row]] = []

    def push(row: Row) -> None:
        heappush(heap, (len(row) == 1, -row_cost(plan.shapes, row, cost_model), row))

    for row in plan.rows:
        if row:
            push(row)
    indivisible: list[Row] = []
    while heap and len(heap) + len(indivisible) + len(fillers) < num_rows:
        row = heappop(heap)[2]
        if len(row) > 1:
            halves = _halve_row(plan, row, cost_model)
        elif len(row[0].samples) > 1:
            halves = _halve_part(plan, row[0])
        else:
            indivisible.append(row)
            continue
        for half in halves:
            push(half)
    rows = sorted([row for _, _, row in heap] + indivisible)
    fillers += [()] * (num_rows - len(rows) - len(fillers))
    return tuple(rows + fillers)


def _halve_row(plan: PackPlan, row: Row, cost_model: CostModel) -> tuple[Row, Row]:
    """Two rows that hold the parts of ``row``, each part in the one that is cheaper so far."""
    costs = {part: row_cost(plan.shapes, (part,), cost_model) for part in row}
    halves: tuple[list[RowPart], list[RowPart]] = ([], [])
    loads = [0.0, 0.0]
    for part in sorted(row, key=lambda part: (-costs[part], part)):
        side = int(loads[1] < loads[0])
        halves[side].append(part)
        loads[side] += costs[part]
    return tuple(sorted(halves[0])), tuple(sorted(halves[1]))


def _halve_part(plan: PackPlan, part: RowPart) -> tuple[Row, Row]:
    """Two rows with neighbours in the tree kept together, cut where half of the tokens stand."""
    tree = part_shape(plan.shapes, part).tree
    order = sorted(part.samples, key=lambda sample: (tree.sample_segments[sample], sample))
    before = np.cumsum(tree.sample_lens[order])[:-1]
    cut = 1 + int(np.abs(2 * before - tree.sample_lens[order].sum()).argmin())
    first, second = tuple(sorted(order[:cut])), tuple(sorted(order[cut:]))
    return (replace(part, samples=first),), (replace(part, samples=second),)
