"""Equal work and equal microbatch counts on all data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt

from ..cost import CostModel
from ..shape import GroupShape, group_shape
from ..types import Group
from .plan import PackPlan, Row, RowPart, in_order, row_cost

FloatArray = npt.NDArray[np.float64]
# A rank that takes so much longer than the mean is not worth the search for a better place.
_EVEN = 0.002


def balance_groups(
    groups: Sequence[Group] | Sequence[GroupShape],
    dp_size: int,
    cost_model: CostModel | None = None,
    *,
    min_shared: int | None = None,
) -> list[list[int]]:
    """Indices of the groups that each data-parallel rank trains, of nearly equal cost.

    Whole groups only. Karmarkar and Karp's differencing method in its k-way form, then exchanges
    between the dearest rank and others; deterministic, so every rank computes the same answer from
    the same shapes. Ranks get nothing when there are fewer groups than ranks.

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
    ranks = [members for _, members in loads] + [[] for _ in range(dp_size - len(loads))]
    return [sorted(members) for members in _exchanged(ranks, np.array(costs, dtype=np.float64))]


def _exchanged(ranks: list[list[int]], costs: FloatArray) -> list[list[int]]:
    """Groups of the dearest rank moved, or exchanged for another's, while that makes it cheaper.

    Differencing leaves a few hundredths where ranks have a handful of groups.
    """
    owner = np.empty(len(costs), dtype=np.int64)
    for rank, members in enumerate(ranks):
        owner[members] = rank
    # Behind the groups stands what a group is exchanged for when it is only moved.
    given, owner = np.append(costs, np.zeros(len(ranks))), np.append(owner, range(len(ranks)))
    loads: FloatArray = np.bincount(owner, given).astype(np.float64)
    enough = loads.mean() * (1 + _EVEN)
    while loads[rank := int(loads.argmax())] > enough:
        own = np.nonzero(owner[: len(costs)] == rank)[0]
        lost = given[own, None] - given
        dearer = np.maximum(loads[rank] - lost, loads[owner] + lost)
        dearer[:, owner == rank] = np.inf
        group, other = np.unravel_index(dearer.argmin(), dearer.shape)
        if len(own) == 1 or not dearer[group, other] < loads[rank]:
            break
        taker, moved = owner[other], lost[group, other]
        loads[rank] -= moved
        loads[taker] += moved
        owner[own[group]] = taker
        if other < len(costs):
            owner[other] = rank
    return [np.nonzero(owner[: len(costs)] == rank)[0].tolist() for rank in range(len(ranks))]


def equalize_num_microbatches(
    plans: Sequence[PackPlan], *, multiple_of: int = 1, cost_model: CostModel | None = None
) -> list[PackPlan]:
    """Plans of all ranks with one number of rows: the greatest, rounded up to ``multiple_of``.

    Prefix rows likewise, but they are never divided.

    A rank that has too few rows divides its dearest rows that hold several parts, which repeats
    nothing. When none is left it gets fillers, rows that contribute nothing:
    ``PackPlan.num_fillers`` tells how many. Dividing a part would encode once more what its samples
    share, and a filler takes next to no time.

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
    num_fillers = plan.num_fillers
    whole: list[tuple[float, Row]] = []
    heap = [(-row_cost(plan.shapes, row, cost_model), row) for row in plan.rows if row]
    heapify(heap)
    while heap and len(heap) + len(whole) + num_fillers < num_rows:
        cost, row = heappop(heap)
        if len(row) == 1:
            whole.append((cost, row))
            continue
        for half in halve_row(plan.shapes, row, cost_model):
            heappush(heap, (-row_cost(plan.shapes, half, cost_model), half))
    heap += whole
    rows = in_order([row for _, row in heap], [-cost for cost, _ in heap])
    return rows + ((),) * max(num_rows - len(rows), num_fillers)


def halve_row(shapes: Sequence[GroupShape], row: Row, cost_model: CostModel) -> tuple[Row, Row]:
    """Two rows that hold the parts of ``row``, each part in the one that is cheaper so far."""
    costs = {part: row_cost(shapes, (part,), cost_model) for part in row}
    halves: tuple[list[RowPart], list[RowPart]] = ([], [])
    loads = [0.0, 0.0]
    for part in sorted(row, key=lambda part: (-costs[part], part)):
        side = int(loads[1] < loads[0])
        halves[side].append(part)
        loads[side] += costs[part]
    return tuple(sorted(halves[0])), tuple(sorted(halves[1]))
